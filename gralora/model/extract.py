"""Adapters from weights: the best GraLoRA for the difference of two models, and an adapter cut into other blocks."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from gralora.config import GraloraConfig
from gralora.engines.distributed import check_unwrapped, copy_into, whole
from gralora.engines.walk import named_modules
from gralora.layers.base import gralora_layers
from gralora.layers.class_change import join
from gralora.maths import functional
from gralora.maths.functional import Tensors
from gralora.model.inject import inject
from gralora.model.state import all_or_nothing, check_known, check_unmerged, named_adapter_parameters
from gralora.model.targets import Targets, shorten


def extract(
    base: nn.Module,
    tuned: nn.Module,
    targets: Targets = None,
    config: GraloraConfig | None = None,
    *,
    adapter_name: str = "default",
    errors: dict[str, float] | None = None,
) -> nn.Module:
    """Give `base`, in place, the GraLoRA adapter that comes nearest to making it `tuned`; returns `base`.

    Every block of tuned - base has its own truncated SVD, which is the best there is at this r and k. What `config.bias`
    and `config.modules_to_save` name is taken from `tuned` whole; a warning names what else differs.

    Args:
        tuned: a plain model of the same architecture.
        targets, config, adapter_name: as for `inject`.
        errors: a dict to be filled with ‖ΔW - (tuned - base)‖ / ‖tuned - base‖ of each layer.

    Raises:
        ValueError: a weight of `tuned` is missing, of another shape or not finite, or as for `inject`. `base` is then
            unchanged.
    """
    with all_or_nothing(base):
        inject(base, targets, config, adapter_name=adapter_name)
        there = dict(tuned.named_parameters(remove_duplicate=False))
        before = dict(base.named_parameters(remove_duplicate=False))
        layers = [(name, layer) for name, layer in gralora_layers(base) if adapter_name in layer.gralora_adapters]
        covered = set()
        paths = {id(module): path for path, module in named_modules(base)}
        for name, layer in layers:
            owner, parameter = layer.place
            key = join(paths[id(owner)], parameter)
            covered.add(key)
            delta = layer.matrix(layer.host, layer.part, difference(key, layer.spot.base_weight, there.get(key)))
            adapter = layer.gralora_adapters[adapter_name]
            error = fill(adapter.tensors, delta, adapter.config)
            if errors is not None:
                errors[name] = error
        with torch.no_grad():
            for key, own in named_adapter_parameters(base, adapter_name).items():
                if key in there:
                    covered.add(key)
                    copy_into(own, there[key])
    rest = [k for k, p in there.items() if k not in covered and (k not in before or not torch.equal(p, before[k]))]
    if rest:
        warnings.warn(
            f"the two models differ in {shorten(rest)} as well, which is not in the adapter.", UserWarning, stacklevel=2
        )
    return base


def reblock(
    model: nn.Module,
    gralora_k: int,
    adapter_name: str = "default",
    *,
    r: int | None = None,
    errors: dict[str, float] | None = None,
) -> None:
    """Cut an adapter into other blocks: the nearest adapter of `gralora_k`, and of rank `r` if given.

    Exact where the rank of every new block suffices: from k to a multiple k' with r' = r * k' / k, and to a divisor k'
    with r' = r * k / k'.

    Args:
        errors: a dict to be filled with ‖new ΔW - ΔW‖ / ‖ΔW‖ of each layer.

    Raises:
        KeyError: no such adapter. ValueError: it is merged, or `gralora_k` does not fit. The model is then unchanged.
    """
    check_known(model, adapter_name)
    check_unmerged(model, adapter_name)
    check_unwrapped(model)
    with all_or_nothing(model):
        for name, layer in gralora_layers(model):
            if adapter_name not in layer.gralora_adapters:
                continue
            old = layer.gralora_adapters[adapter_name]
            r_new = old.config.r if r is None else r
            scaling = old.config.scaling
            try:
                config = replace(old.config, r=r_new, gralora_k=gralora_k).scaled(scaling)
                new = layer.spot.new_adapter(config, old.A.dtype, reset=False)
            except ValueError as problem:
                raise ValueError(f"{name!r}: {problem}") from None
            delta = functional.delta_weight(*widened(old.tensors), scaling=scaling)
            error = fill(new.tensors, delta, new.config)
            for parameter in new.parameters():
                parameter.requires_grad_(old.A.requires_grad)
            layer.gralora_adapters.add(adapter_name, new)
            if errors is not None:
                errors[name] = error


def difference(key: str, base: Tensor, tuned: Tensor | None) -> Tensor:
    """tuned - base in float32 at least, or a ValueError that names `key`."""
    if tuned is None or tuned.shape != base.shape:
        found = "missing there" if tuned is None else f"of shape {tuple(tuned.shape)} there"
        raise ValueError(f"{key} is of shape {tuple(base.shape)} in the base, and {found}.")
    dtype = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    delta = tuned.detach().to(base.device, dtype) - base.detach().to(dtype)
    if not delta.isfinite().all():
        raise ValueError(f"{key} is not finite in one of the two models.")
    return delta


def fitted(delta: Tensor, config: GraloraConfig) -> tuple[Tensors, float]:
    """The factors of the adapter nearest to `delta` (out, in), with its scaling taken out, and the relative error."""
    tensors = functional.nearest_factors(delta, config.r, config.gralora_k, config.hybrid_r)
    root = math.sqrt(config.scaling)
    factors = cast(Tensors, tuple(None if t is None else t / root for t in tensors))
    total = float(delta.norm())
    off = float((functional.delta_weight(*factors, scaling=config.scaling) - delta).norm())
    return factors, off / total if total else 0.0


@torch.no_grad()
def fill(tensors: Tensors, delta: Tensor, config: GraloraConfig) -> float:
    """Give an adapter the values nearest to `delta` (..., out, in); returns the relative error."""
    factors, error = fitted(delta, config)
    for parameter, factor in zip(tensors, factors, strict=True):
        if parameter is not None and factor is not None:
            copy_into(parameter, factor)
    return error


def widened(tensors: Tensors) -> Tensors:
    """Whole, without gradients, and in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return cast(Tensors, tuple(None if t is None else whole(t.detach()).to(dtype) for t in tensors))
