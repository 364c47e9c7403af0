"""Layers that are their own map: they keep their place in the model and change their class.

The other kind, maps that are parts of a module, is in `parts.py`.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gralora.config import GraloraConfig
from gralora.layers.adapter import check_adapter_name
from gralora.layers.base import CHILD, GraloraLayer
from gralora.layers.class_change import (
    InPlaceModule,
    change_class,
    freeze_own,
    is_restorable,
    one_line,
    restore_class,
    traced,
    traced_read,
)
from gralora.layers.loading import overwritten, refuse_adapter_keys
from gralora.layers.running import forward_runs


class _Running(threading.local):
    """The layer whose own forward this thread is in."""

    layer: nn.Module | None = None
    reading: nn.Module | None = None
    """The layer whose own forward is to read W + ΔW."""


_running = _Running()

Layer = TypeVar("Layer", bound="InPlaceLayer")


class InPlaceLayer(GraloraLayer, InPlaceModule):
    """A layer that is the map."""

    _prefix = "Gralora"
    batch_axis: ClassVar[int | None] = None  # of inputs; None where the layer takes any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in), and whatever else the base layer takes -> (..., out), in the base layer's
        dtype.
        """
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Proxy):
            return cast(Tensor, traced(self, args, kwargs))
        if self.is_plain() and "_base_instance_forward" not in self.__dict__:
            return self.run(x, self.plain_forward, (x,), {}, dim=self.batch_axis)
        return self.run(x, self.own_forward, args, kwargs, dim=self.batch_axis)

    def own_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's forward, to which the weight is the parameter, whoever in it reads it: the
        update comes on top.
        """
        outer, _running.layer = _running.layer, self
        try:
            return cast(Tensor, self.base_forward(*args, **kwargs))
        finally:
            _running.layer = outer

    def reading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base's forward with W + ΔW as its weight, where it returns more than a tensor, as a
        router does.
        """
        outer, _running.reading = _running.reading, self
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            _running.reading = outer

    def plain_forward(self, x: Tensor) -> Tensor:
        """What the base's forward computes where `is_plain`, without asking for `self.weight`."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name != "weight" or self.__dict__["_parameters"].get(name) is None:
            return value
        if isinstance(value, Proxy):
            return traced_read(self, name, value)
        return value if _running.layer is self else self.read(value)

    def is_read(self, weight: Tensor) -> bool:
        # a plain layer does not read its own weight, and the forward of another says that it runs
        if torch.compiler.is_compiling():
            return True
        return forward_runs(None if _running.reading is self else self)

    @classmethod
    def is_plain(cls) -> bool:
        """Whether the base class computes what its kind does, and nothing else."""
        raise NotImplementedError

    def probe(self, generator: torch.Generator) -> Tensor | None:
        """A small input that the layer takes; None where its forward can't differ from merging."""
        return torch.randn(4, self.sizes(self, "")[0], generator=generator)

    @classmethod
    def attach(cls, module: nn.Module, part: str) -> GraloraLayer:
        if not isinstance(module, GraloraLayer):
            change_class(module, cls)
            cast(GraloraLayer, module)._attach_container()
        return cast(GraloraLayer, module)

    def detach(self) -> None:
        if is_restorable(self):
            del self._modules[CHILD]
        else:
            self._attach_container()
        restore_class(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        refuse_adapter_keys(state_dict, prefix, args[-1])
        if self.gralora_adapters.merged and f"{prefix}weight" in state_dict:
            args[-1].append(overwritten(f"{prefix}weight"))
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        base = self._base_class.extra_repr(self)
        if CHILD not in self._modules:
            return base
        return ", ".join(part for part in (base, self.gralora_adapters.describe()) if part)

    def __repr__(self) -> str:
        return (
            one_line(self, self.extra_repr())
            if set(self._modules) <= {CHILD}
            else nn.Module.__repr__(self)
        )

    def _drop_in(self, config: GraloraConfig | None, adapter_name: str) -> None:
        """Finish a layer that was built, not injected: freeze the base, add a trainable adapter."""
        check_adapter_name(adapter_name)
        freeze_own(self)
        self._attach_container()
        self.gralora_adapters.add(adapter_name, self.spot.new_adapter(config or GraloraConfig()))
        self.gralora_adapters.active = {adapter_name: 1.0}

    @classmethod
    def _adapting(
        cls: type[Layer], module: nn.Module, config: GraloraConfig | None, adapter_name: str
    ) -> Layer:
        if not cls.accepts(type(module)):
            raise TypeError(f"{cls.__name__} cannot stand in for a {type(module).__name__}.")
        if isinstance(module, GraloraLayer):
            raise TypeError(
                f"this {type(module).__name__} is adapted already; use inject for a further"
                " adapter."
            )
        reason = cls.unfit(module, "")
        if reason is not None:
            raise ValueError(f"this {type(module).__name__} {reason}.")
        layer = module.__new__(type(module))
        layer.__dict__.update(module.__dict__)
        for name, value in module.__dict__.items():
            if isinstance(
                value, (dict, set)
            ):  # parameters, buffers, children, hooks: same entries, own registers
                layer.__dict__[name] = value.copy()
        change_class(layer, cls)
        adapted = cast(Layer, layer)
        adapted._drop_in(config, adapter_name)
        return adapted
