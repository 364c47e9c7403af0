"""What an adapter trains in addition to its pairs A, B: copies of modules.

A module in `modules_to_save` keeps its own weights and has one copy per adapter, to which its
forward is routed. Two copies hold only a part of the module and run its own forward with that part
replaced: single tokens of an embedding (`tokens.py`), and the biases of a module that is not
adapted (`bias="all"`). The bias of an adapted map is trained as a difference in its
`GraloraAdapter`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gralora.engines.distributed import is_spread, layout
from gralora.engines.offload import is_offloaded
from gralora.engines.walk import modules, named_modules
from gralora.layers.base import GraloraLayer
from gralora.layers.class_change import (
    InPlaceModule,
    change_class,
    join,
    own_class,
    set_own_class,
    traced,
)
from gralora.layers.running import forward_runs
from gralora.layers.scope import OFF, Rows, Switchable
from gralora.layers.still import frozen_statistics
from gralora.model.partial_copies import PartialCopy, SavedBiases, running_copy
from gralora.model.tokens import TiedRows, TokenRows

SAVED_CHILD = "gralora_saved"


class SavedCopies(Switchable):
    """The copies of one saved module by adapter name; `active` names the one that stands in for it,
    if any.
    """

    fresh: Mapping[str, list[tuple[Tensor, Tensor, Tensor | None]]] = MappingProxyType({})
    """While the base is loaded: copies that nobody has trained, (their tensors, the base's, which
    rows of it).
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.layouts: dict[str, object] = {}  # of the module's own parameters when it was changed

    def __getitem__(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def with_effect(self) -> list[str]:
        return [name for name in self if name not in self.fresh]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            for pairs in self.fresh.values():
                for own, base, rows in pairs:
                    own.copy_(base if rows is None else base[rows])
        self.__dict__.pop("fresh", None)

    def is_as_it_was(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is not kept elsewhere, by an engine that reads it outside of a
        forward.
        """
        return not parameter.is_meta and layout(parameter) == self.layouts.get(name)


class SavedModule(InPlaceModule):
    """Mixin of a module in `modules_to_save`: calls go to the active adapter's copy, else to the
    module itself.
    """

    _prefix = "Saved"
    gralora_saved: SavedCopies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        copies = self.gralora_saved
        if args and isinstance(args[0], Proxy):
            return traced(self, args, kwargs)
        mode = copies.mode
        if isinstance(mode, Rows):
            return self._by_row(mode, *args, **kwargs)
        return self._run(None if mode is OFF else copies.active, *args, **kwargs)

    def _run(self, name: str | None, *args: Any, **kwargs: Any) -> Any:
        """The forward with the copy of one adapter, or with none."""
        replica = None if name is None else self.gralora_saved[name]
        if replica is not None and not isinstance(replica, PartialCopy):
            return replica(*args, **kwargs)
        with frozen_statistics(self):
            if replica is None:
                return self.base_forward(*args, **kwargs)
            return replica.call(self, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        copies = self.gralora_saved
        if not any(key.startswith(f"{prefix}{SAVED_CHILD}.") for key in state_dict):
            # a checkpoint of the base: copies that nobody has trained follow it
            base = {n: t for n, t in self.state_dict().items() if not n.startswith(SAVED_CHILD)}
            pairs = {name: _pairs(copies[name], base) for name in copies}
            copies.__dict__["fresh"] = {
                name: own for name, own in pairs.items() if all(_alike(*pair) for pair in own)
            }
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _by_row(self, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise TypeError(
                f"mixed_batch cannot take apart the rows of what {self._base_class.__name__} gets:"
                " a saved module must be called with one tensor."
            )
        x, copies = args[0], self.gralora_saved
        dim = rows.axis(x)

        def run(name: str | None, own: Tensor) -> Tensor:
            x_own = x.index_select(dim, own)
            y = self._run(name, x_own)
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"mixed_batch cannot join the rows of what a {self._base_class.__name__} in"
                    f" modules_to_save returns, a {type(y).__name__}: one tensor is needed. Take it"
                    " out of modules_to_save, or run one adapter at a time."
                )
            return y

        return rows.run_by_adapter(x, dim, list(copies), run)

    def effective_parameter(self, name: str, value: Tensor) -> Tensor:
        """What code that reads a parameter or buffer gets: a parent that reads our weight, as a
        head tied to an embedding does, gets that of the active copy.
        """
        copies = self.gralora_saved
        running = running_copy(self)
        if running is not None:
            return running.read(name, value)
        mode = copies.mode
        if isinstance(mode, Rows) and name in self._parameters and forward_runs(self):
            raise ValueError(
                f"mixed_batch: {name!r} of a {self._base_class.__name__} that adapters train is"
                " read by another module, and cannot differ from row to row."
            )
        if mode is not None or copies.active is None or not copies.is_as_it_was(name, value):
            return value
        replica = copies[copies.active]
        if isinstance(replica, PartialCopy):
            return replica.read(name, value)
        own: Tensor | None = replica._parameters.get(name, replica._buffers.get(name))
        return value if own is None else getattr(replica, name)


def units(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The topmost modules at or below `module` that own parameters or buffers.

    Routing these, and not a container above them, works however the container is used: called,
    iterated, indexed.
    """
    if module._parameters or module._buffers or isinstance(module, SavedModule):
        yield name, module
    else:
        for child_name, child in module.named_children():
            yield from units(child, join(name, child_name))


def check_units(
    model: nn.Module, found: dict[str, nn.Module], targets: Iterable[nn.Module]
) -> None:
    """Raise ValueError if a unit is adapted itself, or is tied to a module that would keep the old
    weight.
    """
    if not found:
        return
    adapted = {id(module) for module in targets}
    inside = {id(m): name for name, unit in found.items() for m in modules(unit)}
    for name, unit in found.items():
        if any(is_offloaded(m, parameter) for m in modules(unit) for parameter in m._parameters):
            raise ValueError(
                f"modules_to_save names {name!r}, whose weights are offloaded: nothing to copy."
                " First inject."
            )
        if any(isinstance(m, GraloraLayer) or id(m) in adapted for m in modules(unit)):
            raise ValueError(
                f"modules_to_save names {name!r}, which is adapted: a layer is adapted or saved,"
                " not both."
            )
    owned = {id(p): name for name, unit in found.items() for p in unit.parameters()}
    for name, module in named_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in owned and id(module) not in inside:
                raise ValueError(
                    f"modules_to_save names {owned[id(parameter)]!r}, whose weight is tied to"
                    f" {name!r}: training one copy would break the tie. Name both, or neither."
                )


def copies_of(found: Iterable[nn.Module], *, tied: bool = True) -> list[nn.Module]:
    """A trainable copy of each unit's base; weights tied among them stay tied among the copies, if
    `tied`.
    """
    memo: dict[int, Any] = {}
    return [_base_copy(unit, memo if tied else {}) for unit in found]


def add_copy(unit: nn.Module, name: str, replica: nn.Module) -> SavedModule:
    """Make `unit` a saved module, in place, and add an inactive copy."""
    if not isinstance(unit, SavedModule):
        change_class(unit, SavedModule)
        unit.add_module(SAVED_CHILD, SavedCopies().train(unit.training))
        cast(SavedModule, unit).gralora_saved.layouts = {
            name: layout(p) for name, p in unit._parameters.items() if is_spread(p)
        }
    saved = cast(SavedModule, unit)
    saved.gralora_saved._modules[name] = replica
    return saved


def is_bias(parameter: str) -> bool:
    """Whether a parameter of this name is a bias: `bias`, `in_proj_bias`, `bias_k`."""
    return "bias" in parameter.split("_")


def _pairs(
    replica: nn.Module, base: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Each tensor of a copy with the base's own, and which rows of that it is."""
    if isinstance(replica, TokenRows):
        return (
            []
            if isinstance(replica, TiedRows)
            else [(replica.rows, base["weight"], replica.indices)]
        )
    return [
        (tensor, base[name], None) for name, tensor in replica.state_dict().items() if name in base
    ]


def _alike(one: Tensor, other: Tensor, rows: Tensor | None = None) -> bool:
    if rows is not None and not other.is_meta and not is_spread(other):
        other = other[rows]
    return (
        not one.is_meta and not is_spread(one) and not is_spread(other) and torch.equal(one, other)
    )


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    for name, module in named_modules(model):
        if isinstance(module, SavedModule):
            yield name, module


def token_modules(
    model: nn.Module, adapter_name: str
) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """The embeddings of which an adapter trains some rows, with the tokens; what is tied to them
    left out.
    """
    return {
        path: (saved, tuple(replica.indices.tolist()))
        for path, saved in saved_modules(model)
        if adapter_name in saved.gralora_saved
        and isinstance(replica := saved.gralora_saved[adapter_name], TokenRows)
        and not isinstance(replica, TiedRows)
    }


def saved_biases(model: nn.Module, adapter_name: str) -> dict[str, tuple[nn.Module, list[str]]]:
    """The modules of which an adapter trains the biases alone, with the names of these."""
    return {
        path: (saved, list(replica._parameters))
        for path, saved in saved_modules(model)
        if adapter_name in saved.gralora_saved
        and isinstance(replica := saved.gralora_saved[adapter_name], SavedBiases)
    }


def _base_copy(unit: nn.Module, memo: dict[int, Any]) -> nn.Module:
    cls: type[nn.Module] = unit.__class__
    child = unit._modules.pop(SAVED_CHILD, None)
    try:
        own = own_class(unit)
        set_own_class(unit, getattr(own, "_base_class", own))
        replica = copy.deepcopy(unit, memo)
    finally:
        unit.__class__ = cls
        if child is not None:
            unit._modules[SAVED_CHILD] = child
    for register in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        getattr(
            replica, register
        ).clear()  # the module's own hooks fire; the copy's would be a second time
    for parameter in replica.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return replica
