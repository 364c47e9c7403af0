"""Layers that are their own map: they keep their place in the model and change their class.

The other kind, maps that are parts of a module, is in `parts.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Container
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gralora.config import GraloraConfig
from gralora.layers.adapter import GraloraAdapters, check_adapter_name
from gralora.layers.base import GraloraLayer
from gralora.layers.class_change import (
    InPlaceModule,
    change_class,
    freeze_own,
    is_restorable,
    one_line,
    restore_class,
    traced,
)
from gralora.layers.linear_map import CHILD, LinearMap
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x (..., in), and whatever else the base layer takes -> (..., out), in the base layer's
        dtype.
        """
        x = args[0] if len(args) == 1 and not kwargs else self.input_of(args, kwargs)
        if isinstance(x, Proxy):
            return traced(self, args, kwargs)
        if self.is_plain() and "_base_instance_forward" not in self.__dict__:
            plain, base = self.plain(), partial(self.plain_forward, *args, **kwargs)
        else:
            plain, base = None, partial(self.own_forward, *args, **kwargs)
        return self.apply_adapters(x, base, plain=plain, dim=self.batch_axis)

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight (out, in), bias), if `plain_forward` is exactly x @ Wᵀ + b with these."""
        return None

    def plain_forward(self, input: Tensor) -> Tensor:
        """What the base's forward computes where `is_plain`, without reading `self.weight`."""
        raise NotImplementedError

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The input of the map: what the base's forward takes first."""
        return next(iter(self.bound_arguments(args, kwargs)), None)

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward, in which the weight is the parameter, whoever reads it there: the
        update is added to what it returns.
        """
        outer, _running.layer = _running.layer, self
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            _running.layer = outer

    def forward_with_effective_weight(self, *args: Any, **kwargs: Any) -> Any:
        outer, _running.reading = _running.reading, self
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            _running.reading = outer

    @property
    def effective_names(self) -> Container[str]:
        return ("weight", "bias")

    def effective_parameter(self, name: str, value: Tensor) -> Tensor:
        if name not in self.effective_names or _running.layer is self:
            return value
        return self.read(value) if name == "weight" else self.read_bias(value)

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
        return torch.randn(4, self.map.sizes[0], generator=generator)

    def detach(self) -> None:
        if is_restorable(self):
            del self._modules[CHILD]
        else:
            self._attach_container()
        restore_class(self)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        # `remove_parametrizations` makes a buffer of a weight computed from frozen tensors
        if name in ("weight", "bias") and tensor is not None:
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        else:
            super().register_buffer(name, tensor, persistent)

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
        self.gralora_adapters.add(adapter_name, self.map.new_adapter(config or GraloraConfig()))
        self.gralora_adapters.active = {adapter_name: 1.0}

    @classmethod
    def _adapting(
        cls: type[Layer], map: InPlaceMap, config: GraloraConfig | None, adapter_name: str
    ) -> Layer:
        """A layer over the very parameters of `map.module`, which keeps its class."""
        module, name = map.module, type(map.module).__name__
        if not map.accepts(type(module)):
            raise TypeError(f"{cls.__name__} cannot stand in for a {name}.")
        if isinstance(module, GraloraLayer):
            raise TypeError(f"this {name} is adapted already; use inject for a further adapter.")
        reason = map.reason_unfit()
        if reason is not None:
            raise ValueError(f"this {name} {reason}.")
        layer = module.__new__(type(module))
        layer.__dict__.update(module.__dict__)
        for attribute, value in module.__dict__.items():
            if isinstance(
                value, (dict, set)
            ):  # parameters, buffers, children, hooks: same entries, own registers
                layer.__dict__[attribute] = value.copy()
        adapted = change_class(layer, cls)
        adapted._drop_in(config, adapter_name)
        return adapted


class InPlaceMap(LinearMap):
    """The map of a layer that is the map."""

    layer_class: ClassVar[type[InPlaceLayer]]

    @property
    def adapters(self) -> GraloraAdapters | None:
        return self.module.gralora_adapters if isinstance(self.module, InPlaceLayer) else None

    def attach(self) -> GraloraAdapters:
        if isinstance(self.module, InPlaceLayer):
            return self.module.gralora_adapters
        layer = change_class(self.module, self.layer_class)
        layer._attach_container()
        return layer.gralora_adapters
