"""The index of a model: everything in it that concerns adapters, found in one walk.

`inject` also writes down on the module that it was given what it has adapted there (the record), so
that adapted layers which a framework has replaced since are noticed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from gralora.engines.distributed import engine_of
from gralora.engines.walk import named_modules
from gralora.layers.adapter import GraloraAdapters
from gralora.layers.base import GraloraLayer, name_of
from gralora.layers.class_change import join
from gralora.model.saved import SavedCopies, SavedModule

RECORD = "_gralora_record"
"""On the module that was injected into: adapter name -> names of all that it has there."""

LEFT_OUT = "_gralora_left_out"
"""On the same module: linear layers that "all-linear" could not adapt."""

Containers = GraloraAdapters | SavedCopies


@dataclass
class Index:
    """What is adapted in a model, by name.

    Attributes:
        layers, saved: adapted maps, and modules of which adapters have copies.
        containers: those of `layers` and `saved`, which hold adapters and copies by name.
        orphans: containers of adapters whose module has been replaced, so they have no effect.
        records: what `inject` has written down, by the name of the module that it was given.
        has_engine: whether an engine of PyTorch's has wrapped the model or a part of it.
    """

    layers: list[tuple[str, GraloraLayer]] = field(default_factory=list)
    saved: list[tuple[str, SavedModule]] = field(default_factory=list)
    orphans: list[Containers] = field(default_factory=list)
    containers: list[Containers] = field(default_factory=list)
    records: list[tuple[str, dict[str, tuple[str, ...]]]] = field(default_factory=list)
    has_engine: bool = False

    def adapter_names(self) -> list[str]:
        names = [name for container in (*self.containers, *self.orphans) for name in container]
        return list(dict.fromkeys(names))

    def missing(self, adapter_name: str) -> list[str]:
        """What is on record for an adapter and no longer in the model."""
        present = {path for path, layer in self.layers if adapter_name in layer.gralora_adapters}
        present |= {path for path, saved in self.saved if adapter_name in saved.gralora_saved}
        recorded = ((path, record.get(adapter_name, ())) for path, record in self.records)
        full = (join(path, part) if part else path for path, parts in recorded for part in parts)
        return [part for part in full if part not in present]


def index(model: nn.Module) -> Index:
    """The index of `model`, as it is now."""
    found = Index()
    classes: dict[type, nn.Module] = {}
    owned: set[int] = set()  # containers whose module has not been replaced; it comes first
    for name, module in named_modules(model, stop_at=(GraloraAdapters, SavedCopies)):
        classes[type(module)] = module
        if RECORD in module.__dict__:
            found.records.append((name, module.__dict__[RECORD]))
        if isinstance(module, GraloraLayer):
            found.layers.append((name_of(name, module), module))
            owned.add(id(module.gralora_adapters))
        elif isinstance(module, SavedModule):
            found.saved.append((name, module))
            owned.add(id(module.gralora_saved))
        elif isinstance(module, (GraloraAdapters, SavedCopies)):
            own = found.containers if id(module) in owned else found.orphans
            own.append(module)
    found.has_engine = any(engine_of(module) is not None for module in classes.values())
    return found


def known_adapters(model: nn.Module) -> list[str]:
    """The names of all adapters of `model`."""
    return index(model).adapter_names()


def record(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """Write down what the adapter has in `model`: layers and saved modules by name."""
    model.__dict__[RECORD] = {**model.__dict__.get(RECORD, {}), adapter_name: tuple(names)}


def forget(model: nn.Module, adapter_name: str | None = None) -> None:
    """Delete the record of an adapter, or of all."""
    for _, module in named_modules(model):
        recorded = module.__dict__.pop(RECORD, {})
        left = {name: parts for name, parts in recorded.items() if name != adapter_name}
        if left and adapter_name is not None:
            module.__dict__[RECORD] = left


def missing(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What these adapters were injected into and is no longer in the model."""
    found = index(model)
    return [part for name in names for part in found.missing(name)]


def replaced_since_inject(names: list[str]) -> str:
    """The message about layers that are missing."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"{shown}: adapted by inject and no longer in the model. These modules have been replaced"
        " since, and their adapters are lost. Replace modules first, then inject."
    )


def warn_of(names: list[str], *, stacklevel: int = 2) -> None:
    """Warn about layers that are missing, if any."""
    if names:
        warnings.warn(replaced_since_inject(names), UserWarning, stacklevel=stacklevel + 1)


def warn_of_missing(model: nn.Module, names: Iterable[str]) -> None:
    """The same, of what some adapters were injected into."""
    warn_of(missing(model, names), stacklevel=3)
