"""Adapters from weights: the best GraLoRA for the difference of two models, and an adapter cut into
other blocks.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from gralora.config import GraloraConfig
from gralora.engines.distributed import check_unwrapped, copy_into
from gralora.engines.walk import named_modules
from gralora.layers.base import gralora_layers
from gralora.layers.class_change import join
from gralora.maths import functional
from gralora.model.fit import difference, fill, rank_for, widened
from gralora.model.inject import inject
from gralora.model.state import (
    all_or_nothing,
    check_known,
    check_unmerged,
    named_adapter_parameters,
)
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
    """Give `base`, in place, the GraLoRA adapter that comes nearest to making it `tuned`; returns
    `base`.

    Every block of tuned - base has its own truncated SVD, which is the best there is at this r and
    k. What `config.bias` and `config.modules_to_save` name is taken from `tuned` whole; a warning
    names what else differs.

    Args:
        tuned: a plain model of the same architecture.
        targets, config, adapter_name: as for `inject`.
        errors: a dict to be filled with ‖ΔW - (tuned - base)‖ / ‖tuned - base‖ of each layer.

    Raises:
        ValueError: a weight of `tuned` is missing, of another shape or not finite, or as for
            `inject`. `base` is then unchanged.
    """
    with all_or_nothing(base):
        inject(base, targets, config, adapter_name=adapter_name)
        there = dict(tuned.named_parameters(remove_duplicate=False))
        before = dict(base.named_parameters(remove_duplicate=False))
        layers = [
            (name, layer)
            for name, layer in gralora_layers(base)
            if adapter_name in layer.gralora_adapters
        ]
        covered = set()
        paths = {id(module): path for path, module in named_modules(base)}
        for name, layer in layers:
            owner, parameter = layer.map.place
            key = join(paths[id(owner)], parameter)
            covered.add(key)
            delta = layer.map.matrix(difference(key, layer.map.base_weight, there.get(key)))
            adapter = layer.gralora_adapters[adapter_name]
            error = fill(adapter.tensors, delta, adapter.config)
            if errors is not None:
                errors[name] = error
        with torch.no_grad():
            for key, own in named_adapter_parameters(base, adapter_name).items():
                if key in there:
                    covered.add(key)
                    copy_into(own, there[key])
    rest = [
        k
        for k, p in there.items()
        if k not in covered and (k not in before or not torch.equal(p, before[k]))
    ]
    if rest:
        warnings.warn(
            f"the two models differ in {shorten(rest)} as well, which is not in the adapter.",
            UserWarning,
            stacklevel=2,
        )
    return base


def reblock(
    model: nn.Module,
    gralora_k: int,
    adapter_name: str = "default",
    *,
    r: int | float | None = None,
    errors: dict[str, float] | None = None,
) -> None:
    """Cut an adapter into other blocks: the nearest adapter of `gralora_k`, and of rank `r` if
    given.

    Exact where the rank of every new block suffices: from k to a multiple k' with r' = r * k' / k,
    and to a divisor k' with r' = r * k / k'.

    Args:
        r: a rank, or a share below 1: each layer gets the smallest rank whose blocks keep this
            share of ‖ΔW‖².
        errors: a dict to be filled with ‖new ΔW - ΔW‖ / ‖ΔW‖ of each layer.

    Raises:
        KeyError: no such adapter. ValueError: it is merged, or `gralora_k` does not fit. The model
            is then unchanged.
    """
    check_known(model, adapter_name)
    check_unmerged(model, adapter_name)
    check_unwrapped(model)
    with all_or_nothing(model):
        for name, layer in gralora_layers(model):
            if adapter_name not in layer.gralora_adapters:
                continue
            old = layer.gralora_adapters[adapter_name]
            delta = functional.delta_weight(*widened(old.tensors), scaling=old.config.scaling)
            try:
                r_new = rank_for(delta, r, gralora_k, old.config.r)
                config = replace(old.config, r=r_new, gralora_k=gralora_k).scaled(
                    old.config.scaling
                )
                new = layer.map.new_adapter(config, old.A.dtype, reset=False)
            except ValueError as problem:
                raise ValueError(f"{name!r}: {problem}") from None
            error = fill(new.tensors, delta, new.config)
            for parameter in new.parameters():
                parameter.requires_grad_(old.A.requires_grad)
            layer.gralora_adapters.add(adapter_name, new)
            if errors is not None:
                errors[name] = error
