"""What was adapted, on record: a layer that a framework has rebuilt since has lost its adapter, and
nobody would know.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from gralora.engines.walk import named_modules
from gralora.model.survey import RECORD, survey

LEFT_OUT = "_gralora_left_out"
"""On the module that was injected into: linear layers that "all-linear" could not take."""


def record(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """Write down what the adapter has in `model`: layers, saved modules and biases by name."""
    model.__dict__[RECORD] = {**model.__dict__.get(RECORD, {}), adapter_name: tuple(names)}


def forget(model: nn.Module, adapter_name: str | None = None) -> None:
    """Strike an adapter, or all, from the records in `model`."""
    for _, module in named_modules(model):
        if RECORD in module.__dict__:
            left = (
                {}
                if adapter_name is None
                else {n: p for n, p in module.__dict__[RECORD].items() if n != adapter_name}
            )
            module.__dict__.pop(RECORD)
            if left:
                module.__dict__[RECORD] = left


def vanished(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What was adapted by these adapters, and is there no more."""
    found = survey(model)
    return [part for name in names for part in found.gone(name)]


def story(gone: list[str]) -> str:
    """What to say of what has vanished."""
    shown = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
    return (
        f"{shown}: adapted once, and there no more. Something has rebuilt these modules since"
        " inject, and their adapters are gone; do that first, then inject."
    )


def warn_of(gone: list[str], *, stacklevel: int = 2) -> None:
    """Tell of what has vanished, if anything."""
    if gone:
        warnings.warn(story(gone), UserWarning, stacklevel=stacklevel + 1)


def warn_of_vanished(model: nn.Module, names: Iterable[str]) -> None:
    """The same, of what some adapters were injected into."""
    warn_of(vanished(model, names), stacklevel=3)
