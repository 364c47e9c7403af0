"""What a model has adapted, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from gralora.layers.base import gralora_layers
from gralora.model.biases import adapted_biases
from gralora.model.control import adapter_names, count_parameters
from gralora.model.index import LEFT_OUT, missing
from gralora.model.saved import saved_modules


class LayerRow(NamedTuple):
    """One adapter on one layer."""

    layer: str
    shape: tuple[int, ...]
    adapter: str
    r: int
    gralora_k: int
    hybrid_r: int
    alpha: float
    scaling: float
    parameters: int
    active: float | None
    merged: float | None


class Summary(list[LayerRow]):
    """The rows of `summary`; printed, a table with totals below."""

    def __init__(self, rows: list[LayerRow], totals: str) -> None:
        super().__init__(rows)
        self.totals = totals

    def __repr__(self) -> str:
        head = (
            "layer",
            "shape",
            "adapter",
            "r",
            "k",
            "hybrid_r",
            "alpha",
            "scaling",
            "parameters",
            "active",
            "merged",
        )
        shown, last = [], None
        for row in self:
            name, shape = (
                (row.layer, " x ".join(map(str, row.shape))) if row.layer != last else ("", "")
            )
            numbers = [
                row.r,
                row.gralora_k,
                row.hybrid_r,
                f"{row.alpha:g}",
                f"{row.scaling:g}",
                f"{row.parameters:,}",
            ]
            marks = [
                "" if weight is None else "yes" if weight == 1 else f"{weight:g}"
                for weight in row[-2:]
            ]
            shown.append([name, shape, row.adapter, *map(str, numbers), *marks])
            last = row.layer
        return f"{table(head, shown)}\n\n{self.totals}"

    __str__ = __repr__


def summary(model: nn.Module) -> Summary:
    """One row per adapted layer and adapter: shape, r, k, alpha, parameters, and the weights with
    which it acts or is merged.

    Returns:
        a list of rows that prints as a table, with totals below.
    """
    rows = []
    for name, layer in gralora_layers(model):
        adapters = layer.gralora_adapters
        for key in adapters:
            adapter, config = adapters[key], adapters[key].config
            count = sum(p.numel() for p in adapter.parameters())
            sizes = (
                config.r,
                config.gralora_k,
                config.hybrid_r,
                config.alpha,
                config.scaling,
                count,
            )
            rows.append(
                LayerRow(
                    name,
                    layer.map.shape,
                    key,
                    *sizes,
                    adapters.active.get(key),
                    adapters.merged.get(key),
                )
            )
    trainable, total = count_parameters(model)
    layers = len({row.layer for row in rows})
    beside = [f"{name} (saved)" for name, _ in saved_modules(model)]
    beside += [key for name in adapter_names(model) for key in adapted_biases(model, name)]
    beside = list(dict.fromkeys(beside))
    lines = [
        f"{layers} layers, adapters: {', '.join(adapter_names(model)) or 'none'}",
        *([f"trained in addition: {', '.join(beside)}"] if beside else []),
        (
            f"{sum(row.parameters for row in rows):,} parameters in adapters, {trainable:,}"
            f" trainable of {total:,}"
        ),
    ]
    gone = missing(model, adapter_names(model))
    left = model.__dict__.get(LEFT_OUT, ())
    lines += [f"adapted by inject and no longer in the model: {', '.join(gone)}"] if gone else []
    lines += [f"left out by all-linear: {', '.join(left)}"] if left else []
    return Summary(rows, "\n".join(lines))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry."""
    texts = [head, *rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in texts
    )
