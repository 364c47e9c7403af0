"""Room for adapters of other ranks in the place of one that is there, so that compiled code stays
valid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from gralora.config import GraloraConfig
from gralora.engines.distributed import check_unwrapped, is_spread
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import gralora_layers
from gralora.maths.functional import Tensors, with_room
from gralora.model.state import all_or_nothing, check_known, check_unmerged


@torch.no_grad()
def prepare_hotswap(model: nn.Module, max_r: int, adapter_name: str = "default") -> None:
    """Make room for adapters of up to `max_r` in the place of one: call it before `torch.compile`,
    then `load_adapter` swaps.

    The adapter is given zeros up to `max_r` in every layer, which changes nothing that it computes.
    Afterwards `load_adapter(model, path, adapter_name)` takes files of the same k and of any rank
    up to `max_r`, on all of its layers or on some: what is left over is zero. The place keeps its
    scaling and B takes the file's in, so nothing is compiled anew, and nothing is rounded but B,
    once, where the scalings differ.

    Args:
        max_r: a multiple of each layer's k, and at least each layer's r. The parameters are new: an
            optimiser made before does not know them.

    Raises:
        KeyError: no such adapter. ValueError: `max_r` does not fit, or the adapter is merged or
            spread over processes. The model is then unchanged.
    """
    check_known(model, adapter_name)
    check_unmerged(model, adapter_name)
    check_unwrapped(model)
    if isinstance(max_r, bool) or not isinstance(max_r, int):
        raise TypeError(f"max_r={max_r!r} is a {type(max_r).__name__}: it must be an integer.")
    with all_or_nothing(model):
        made: dict[int, GraloraAdapter] = {}
        for path, layer in gralora_layers(model):
            if adapter_name not in layer.gralora_adapters:
                continue
            old = layer.gralora_adapters[adapter_name]
            if max_r < old.config.r or max_r % old.config.gralora_k:
                raise ValueError(
                    f"max_r={max_r} does not fit {path!r}, of r={old.config.r} and"
                    f" gralora_k={old.config.gralora_k}: it must be a multiple of the k, and not"
                    " below the r."
                )
            if is_spread(old.A):
                raise ValueError(
                    f"the adapter of {path!r} is spread over processes, where none is swapped."
                )
            if id(old) not in made:
                made[id(old)] = _roomy(
                    old,
                    layer.map.new_adapter(_larger(old.config, max_r), old.A.dtype, reset=False),
                )
            layer.gralora_adapters.add(adapter_name, made[id(old)])


def _larger(config: GraloraConfig, r: int) -> GraloraConfig:
    return config if r == config.r else replace(config, r=r).scaled(config.scaling)


def _roomy(old: GraloraAdapter, new: GraloraAdapter) -> GraloraAdapter:
    values = with_room(old.tensors, new.config.r, new.config.hybrid_r)
    for own, value in zip(new.tensors, values, strict=True):
        if own is not None and value is not None:
            own.copy_(value)
            own.requires_grad_(old.A.requires_grad)
    new.copy_bias_from(old)
    if new.bias is not None:
        new.bias.requires_grad_(old.A.requires_grad)
    new.train(old.training)
    new.roomy = True
    return new


def placed(
    adapter: GraloraAdapter, tensors: Tensors, config: GraloraConfig
) -> tuple[Tensors, GraloraConfig] | None:
    """What a file's values and config are in the place of `adapter`; None where they have no room
    there.

    A place that `prepare_hotswap` has made keeps its scaling, and B takes the other in; any other
    takes the file's.
    """
    own = adapter.config
    if config.gralora_k != own.gralora_k or config.r > own.r or config.hybrid_r > own.hybrid_r:
        return None
    A, B, A_general, B_general = with_room(tensors, own.r, own.hybrid_r)
    if not adapter.roomy:
        config = replace(config, bias=own.bias)
        same = (config.r, config.hybrid_r) == (own.r, own.hybrid_r)
        larger = (
            config
            if same
            else replace(config, r=own.r, hybrid_r=own.hybrid_r).scaled(config.scaling)
        )
        return (A, B, A_general, B_general), larger
    factor = config.scaling / own.scaling
    if factor != 1:
        B, B_general = B * factor, None if B_general is None else B_general * factor
    return (A, B, A_general, B_general), replace(own, gralora_dropout=config.gralora_dropout)
