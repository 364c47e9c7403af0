"""What was adapted, on record: a layer that a framework has rebuilt since has lost its adapter, and nobody would know."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from gralora.engines.walk import named_modules
from gralora.layers.base import gralora_layers
from gralora.layers.class_change import join
from gralora.model.saved import bias_swaps, saved_modules

RECORD = "_gralora_record"
"""On the module that was injected into: adapter name -> names of all that it has there."""


LEFT_OUT = "_gralora_left_out"
"""On the same module: linear layers that "all-linear" could not take."""


def parts_of(model: nn.Module, adapter_name: str) -> list[str]:
    """The layers, saved modules and biases of an adapter, by name."""
    layers = [name for name, layer in gralora_layers(model) if adapter_name in layer.gralora_adapters]
    saved = [name for name, module in saved_modules(model) if adapter_name in module.gralora_saved]
    return layers + saved + [key for key, _, swap in bias_swaps(model) if adapter_name in swap.names]


def record(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """Write down what the adapter has in `model`: layers, saved modules and biases by name."""
    model.__dict__[RECORD] = {**model.__dict__.get(RECORD, {}), adapter_name: tuple(names)}


def forget(model: nn.Module, adapter_name: str | None = None) -> None:
    """Strike an adapter, or all, from the records in `model`."""
    for _, module in named_modules(model):
        if RECORD in module.__dict__:
            left = (
                {} if adapter_name is None else {n: p for n, p in module.__dict__[RECORD].items() if n != adapter_name}
            )
            module.__dict__.pop(RECORD)
            if left:
                module.__dict__[RECORD] = left


def vanished(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What was adapted by these adapters, and is there no more."""
    recorded = [(path, module.__dict__[RECORD]) for path, module in named_modules(model) if RECORD in module.__dict__]
    gone = []
    for adapter_name in names if recorded else ():
        there = set(parts_of(model, adapter_name))
        full = (join(path, part) if part else path for path, own in recorded for part in own.get(adapter_name, ()))
        gone += [part for part in full if part not in there]
    return gone


def story(gone: list[str]) -> str:
    """What to say of what has vanished."""
    shown = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
    return (
        f"{shown}: adapted once, and there no more. Something has rebuilt these modules since inject, and their adapters are "
        "gone; do that first, then inject."
    )


def warn_of_vanished(model: nn.Module, names: Iterable[str], *, stacklevel: int = 3) -> None:
    """Tell of what some adapters were injected into and that is there no more."""
    gone = vanished(model, names)
    if gone:
        warnings.warn(story(gone), UserWarning, stacklevel=stacklevel)
