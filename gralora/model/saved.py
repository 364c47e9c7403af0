"""What is trained with an adapter but is no adapter: whole modules (`modules_to_save`) and biases.

A saved module keeps its own weights and has one copy per adapter, to which its forward is routed. A
trained bias has one parameter per adapter, which takes the place of the base's while that adapter
is active.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gralora.engines.distributed import is_spread, layout
from gralora.engines.offload import is_offloaded
from gralora.engines.walk import child_of, modules, named_modules
from gralora.layers.base import GraloraLayer
from gralora.layers.class_change import (
    InPlaceModule,
    change_class,
    join,
    own_class,
    set_own_class,
    traced,
)
from gralora.layers.linear_map import PREFIX
from gralora.layers.loading import Appendage
from gralora.layers.running import forward_runs
from gralora.layers.scope import OFF, Rows, Switchable
from gralora.model.tokens import TiedRows, TokenRows, running

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

    def is_as_it_was(self, name: str, parameter: nn.Parameter | None) -> bool:
        """Whether a parameter is not kept elsewhere, by an engine that reads it outside of a
        forward.
        """
        return parameter is None or (
            not parameter.is_meta and layout(parameter) == self.layouts.get(name)
        )


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
        if copies.active is None or mode is OFF:
            return self.base_forward(*args, **kwargs)
        return self._run_copy(copies.active, *args, **kwargs)

    def _run_copy(self, name: str, *args: Any, **kwargs: Any) -> Any:
        replica = self.gralora_saved[name]
        return (
            replica.call(self, *args, **kwargs)
            if isinstance(replica, TokenRows)
            else replica(*args, **kwargs)
        )

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
        order, back, names, counts = rows.sort(x.shape[dim], list(copies), x.device)
        parts = torch.split(x.index_select(dim, order), counts, dim)
        runs = [
            self.base_forward if name is None else partial(self._run_copy, name) for name in names
        ]
        done = [run(part) for run, part in zip(runs, parts, strict=True) if part.shape[dim]]
        if not all(isinstance(each, Tensor) for each in done):
            raise TypeError(
                f"mixed_batch cannot put together the rows of what a {self._base_class.__name__} in"
                f" modules_to_save returns, a {type(done[0]).__name__}: one tensor is needed. Leave"
                " it out of modules_to_save, or run one adapter at a time."
            )
        return torch.cat(done, dim).index_select(dim, back)

    def __getattr__(self, name: str) -> Any:
        # a parent that reads our weight, as a head tied to an embedding does, must get the copy's
        # that acts
        children = self.__dict__.get("_modules", {})
        copies = children.get(SAVED_CHILD)
        own = self.__dict__.get("_parameters", {}).get(name)
        tokens = running(self) if name == "weight" else None
        if tokens is not None and own is not None:
            return tokens.read(own)
        if (
            copies is not None
            and isinstance(copies.mode, Rows)
            and own is not None
            and forward_runs(self)
        ):
            raise ValueError(
                f"mixed_batch: {name!r} of a {self._base_class.__name__} that adapters train is"
                " read by another module, and can't be another one for every row."
            )
        ours = own is not None or name in self.__dict__.get(
            "_buffers", {}
        )  # not while somebody exchanges it
        if (
            ours
            and copies is not None
            and copies.active is not None
            and copies.mode is None
            and copies.is_as_it_was(name, own)
        ):
            replica = copies[copies.active]
            if isinstance(replica, TokenRows):
                return (
                    replica.read(own)
                    if name == "weight" and own is not None
                    else super().__getattr__(name)
                )
            if name in replica._parameters or name in replica._buffers:
                return getattr(replica, name)
        return super().__getattr__(name)


BASE_SLOT = "base bias"
"""The name of the base's bias among the parameters of a `BiasSwap`."""


def slot(name: str) -> str:
    """The name of an adapter's bias there: its own, but never the base's; what would be it gets a
    blank more.
    """
    if name == BiasSwap.BASE:
        return BASE_SLOT
    return f"{name} " if name.rstrip(" ") == BASE_SLOT else name


class BiasSwap(Appendage):
    """The values of one bias of a module that are not in place now: the adapters' by name, and the
    base's under `BASE`.
    """

    BASE = "base.bias"  # with a dot, which no adapter's name has
    parameter: str
    in_place: str
    names: list[str]
    layout: object  # of the bias when the first of these came
    given: tuple[nn.Parameter, Tensor] | None = None
    """While the base is loaded: the base's bias, and its new value."""

    def __init__(self, parameter: str) -> None:
        super().__init__()
        # past nn.Module's __setattr__: an adapter may have any name, that of a field of ours too
        self.__dict__.update(parameter=parameter, in_place=self.BASE, names=[], layout=None)

    def with_effect(self) -> list[str]:
        base = self._parameters.get(BASE_SLOT)
        kept = [(name, self._parameters.get(slot(name))) for name in self.names]
        return [
            n for n, own in kept if own is not None and not (base is not None and _alike(own, base))
        ]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.given is not None:
            base, value = self.given
            self.__dict__["given"] = None
            if base.shape == value.shape:
                with torch.no_grad():
                    base.copy_(value)
            else:
                args[-1].append(
                    f"{prefix}{BASE_SLOT}: the shape is {tuple(value.shape)} there and"
                    f" {tuple(base.shape)} here."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def put(self, owner: nn.Module, name: str) -> None:
        """Make `name`'s bias the bias of `owner`; the base's where this adapter trains none."""
        name = name if name in self.names else self.BASE
        if name != self.in_place:
            if layout(owner._parameters[self.parameter]) != self.layout or is_offloaded(
                owner, self.parameter
            ):
                raise ValueError(
                    "a trained bias can't be exchanged for another under fully_shard, or where"
                    " weights are offloaded: both keep each parameter where they found it. Adapters"
                    ' that are to be switched there must have bias="none".'
                )
            # assignments alone, so that no failure comes between
            new = self._parameters[slot(name)]
            self._parameters[slot(self.in_place)] = owner._parameters[self.parameter]
            owner._parameters[self.parameter] = new
            del self._parameters[slot(name)]
            self.__dict__["in_place"] = name

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.in_place == BASE_SLOT and BASE_SLOT not in self.names:  # as it was pickled before
            self.__dict__["in_place"] = self.BASE

    def get(self, owner: nn.Module, name: str) -> nn.Parameter:
        source = (
            owner._parameters[self.parameter]
            if name == self.in_place
            else self._parameters[slot(name)]
        )
        return cast(nn.Parameter, source)


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


def add_bias(owner: nn.Module, parameter: str, name: str, bias: nn.Parameter) -> None:
    """Give `owner` an inactive value of its bias `parameter` for the adapter `name`."""
    if PREFIX + parameter not in owner._modules:
        owner._modules[PREFIX + parameter] = BiasSwap(parameter).train(owner.training)
        if not _load_hooks(owner):
            owner.register_load_state_dict_pre_hook(_load_base_biases)  # type: ignore[no-untyped-call]
        owner._modules[PREFIX + parameter].__dict__["layout"] = layout(owner._parameters[parameter])
    swap = cast(BiasSwap, owner._modules[PREFIX + parameter])
    swap._parameters[slot(name)] = bias
    swap.names.append(name)


def base_bias(owner: nn.Module, parameter: str) -> nn.Parameter:
    """The base's own bias `parameter` of `owner`, whichever adapter's is in place."""
    swap = child_of(owner, PREFIX + parameter)
    base = (
        swap.get(owner, BiasSwap.BASE)
        if isinstance(swap, BiasSwap)
        else owner._parameters[parameter]
    )
    return cast(nn.Parameter, base)


def remove_swap(owner: nn.Module, swap: BiasSwap) -> None:
    """Leave the bias that is in place for good."""
    del owner._modules[PREFIX + swap.parameter]
    if not any(isinstance(child, BiasSwap) for child in owner._modules.values()):
        for key in _load_hooks(owner):
            del owner._load_state_dict_pre_hooks[key]


def _load_base_biases(
    owner: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """What a checkpoint of the base holds for a bias is the base's, whichever adapter's is in
    place.
    """
    for swap in owner._modules.values():
        key = prefix + swap.parameter if isinstance(swap, BiasSwap) else ""
        if isinstance(swap, BiasSwap) and swap.in_place != swap.BASE and key in state_dict:
            if not any(
                other.startswith(f"{prefix}{PREFIX}{swap.parameter}.") for other in state_dict
            ):
                acting, base = owner._parameters[swap.parameter], swap.get(owner, swap.BASE)
                fresh = _alike(cast(Tensor, acting), base)  # nobody has trained it: it follows
                swap.__dict__["given"] = base, state_dict[key]
                state_dict[key] = (
                    state_dict[key] if fresh else cast(Tensor, acting).detach().clone()
                )


def _load_hooks(owner: nn.Module) -> list[int]:
    hooks = owner._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _load_base_biases]


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


def bias_swaps(model: nn.Module) -> Iterator[tuple[str, nn.Module, BiasSwap]]:
    """(name of the bias, the module that owns it, its store) of every bias that some adapter
    trains.
    """
    for name, module in named_modules(model):
        for swap in module._modules.values():
            if isinstance(swap, BiasSwap):
                yield join(name, swap.parameter), module, swap


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
