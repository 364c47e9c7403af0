"""The biases that an adapter trains on its own maps, under the keys of a file.

An adapter holds the difference Δb, zero at the start. A file holds the bias itself, base + Δb, as
PEFT's does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gralora.engines.distributed import whole
from gralora.engines.walk import named_modules
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.class_change import join

Biases = dict[str, list[GraloraLayer]]


def adapted_biases(model: nn.Module, adapter_name: str) -> Biases:
    """The biases that an adapter trains on its maps, by name, with the maps that share each one."""
    found: Biases = {}
    paths: dict[int, str] = {}
    for _, layer in gralora_layers(model):
        adapters = layer.gralora_adapters
        if adapter_name in adapters and adapters[adapter_name].bias is not None:
            paths = paths or {id(module): path for path, module in named_modules(model)}
            owner, name = layer.map.bias_place
            found.setdefault(join(paths[id(owner)], name), []).append(layer)
    return found


@torch.no_grad()
def bias_values(biases: Biases, adapter_name: str) -> dict[str, Tensor]:
    """base + Δb of each, in the type of the adapter or of the base, whichever is wider."""
    values: dict[str, Tensor] = {}
    for key, layers in biases.items():
        differences = [whole(_difference(layer, adapter_name)) for layer in layers]
        base = whole(base_bias(layers[0]))
        dtype = torch.promote_types(base.dtype, differences[0].dtype)
        values[key] = base.to(dtype, copy=True)
        for layer, difference in zip(layers, differences, strict=True):
            layer.map.bias_part(values[key]).add_(difference)
    return values


@torch.no_grad()
def bias_differences(
    biases: Biases, adapter_name: str, given: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(Δb of an adapter, its new value) for every given bias.

    Raises:
        ValueError: a bias is of another shape, or differs from the base's where no map is adapted.
    """
    found = []
    for key, layers in biases.items():
        if key not in given:
            continue
        base = whole(base_bias(layers[0]))
        value = given[key].to(base.device)
        if value.shape != base.shape:
            raise ValueError(
                f"shapes differ, nothing was loaded: {key} is {tuple(value.shape)} in the file and"
                f" {tuple(base.shape)} in the model"
            )
        own = [_difference(layer, adapter_name) for layer in layers]
        dtype = torch.promote_types(base.dtype, own[0].dtype)
        rest = value.to(dtype) - base.to(dtype)
        for layer, difference in zip(layers, own, strict=True):
            found.append((difference, layer.map.bias_part(rest).clone()))
            layer.map.bias_part(rest).zero_()
        if rest.any():
            raise ValueError(
                f"{key} differs from the base's in a part that belongs to no adapted layer: nothing"
                " was loaded"
            )
    return found


def base_bias(layer: GraloraLayer) -> Tensor:
    bias = layer.map.base_bias
    assert bias is not None
    return bias.detach()


def _difference(layer: GraloraLayer, adapter_name: str) -> Tensor:
    bias = layer.gralora_adapters[adapter_name].bias
    assert bias is not None
    return bias.detach()
