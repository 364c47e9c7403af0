"""A start over a quantised base that takes back some of what quantising took away (after LoftQ,
arXiv 2310.08659).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gralora.engines.distributed import is_spread
from gralora.engines.walk import named_modules
from gralora.layers.base import GraloraLayer
from gralora.layers.class_change import join
from gralora.layers.linear import LinearLayer
from gralora.model.fit import difference, fill

Reference = Any
"""The full-precision model: a module, a mapping name -> tensor, or the path of a checkpoint, a file
or a folder.
"""


@torch.no_grad()
def start_near(
    model: nn.Module,
    layers: Mapping[str, GraloraLayer],
    adapter_name: str,
    reference: Reference,
    errors: dict[str, tuple[float, float]] | None,
) -> None:
    """Give the adapters of `layers` the ΔW nearest to reference - base, block by block.

    LoftQ goes on to quantise W - ΔW, and so on in turn; here the base is never changed, so it ends
    after its first round.

    Args:
        errors: filled with ‖reference - base‖ / ‖reference‖ of each layer, and the same with ΔW
            added to the base.

    Raises:
        ValueError: a weight is missing in the reference or of another shape, not finite, on meta,
            or spread over processes.
    """
    look_up = _values(reference)
    paths = {id(module): path for path, module in named_modules(model)}
    for name, layer in layers.items():
        owner, parameter = layer.map.place
        key = join(paths[id(owner)], parameter)
        if is_spread(layer.map.weight) or layer.map.weight.is_meta:
            raise ValueError(
                f"{key} is spread over processes, or on meta, where there is no base to compare"
                " with the reference."
            )
        base = (
            layer.computed_matrix() if isinstance(layer, LinearLayer) else layer.map.base_matrix()
        )
        there = look_up(key)
        delta = difference(key, base, None if there is None else _matrix(layer, there.detach()))
        adapter = layer.gralora_adapters[adapter_name]
        before = float(delta.norm()) / (float((delta + base.to(delta.dtype)).norm()) or 1.0)
        after = before * fill(adapter.tensors, delta, adapter.config)
        adapter.has_values()
        if errors is not None:
            errors[name] = before, after


def _matrix(layer: GraloraLayer, weight: Tensor) -> Tensor:
    """A weight in the layout of the layer's as a matrix; as it is where its shape forbids that."""
    try:
        return layer.map.matrix(weight)
    except (RuntimeError, ValueError):  # einops' errors are such as well
        return weight


def _values(reference: Reference) -> Callable[[str], Tensor | None]:
    if isinstance(reference, nn.Module):
        return dict(reference.named_parameters(remove_duplicate=False)).get
    if isinstance(reference, Mapping):
        return reference.get
    if not isinstance(reference, (str, Path)):
        raise TypeError(
            f"reference is a {type(reference).__name__}: it must be a module, a mapping of names to"
            " tensors, or a path."
        )
    path = Path(reference)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no checkpoint at {path}: it must be a .safetensors file, or a folder with some."
        )
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            where.update(dict.fromkeys(opened.keys(), file))

    def read(key: str) -> Tensor | None:
        if key not in where:
            return None
        with safe_open(where[key], "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor

    return read
