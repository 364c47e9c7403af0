"""Copies of a part of a module, which run the forward of that module with the part replaced."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from gralora.layers.class_change import InPlaceModule


class PartialCopy(nn.Module):
    """What an adapter trains of one module, whose own forward runs with it."""

    def call(self, owner: InPlaceModule, *args: Any, **kwargs: Any) -> Any:
        """The forward of `owner`, in which `read` replaces its parameters."""
        if torch.compiler.is_compiling():  # where the active copy is read anyway
            return owner.base_forward(*args, **kwargs)
        token = _running.set((owner, self))
        try:
            return owner.base_forward(*args, **kwargs)
        finally:
            _running.reset(token)

    def read(self, name: str, value: Tensor) -> Tensor:
        """What is read under the name of a parameter of the owner, which is `value`."""
        raise NotImplementedError


class SavedBiases(PartialCopy):
    """The biases of one module that is not adapted, as an adapter trains them."""

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        for name in names:
            own = module._parameters[name]
            if own is not None:
                self.register_parameter(name, nn.Parameter(own.detach().clone()))

    def read(self, name: str, value: Tensor) -> Tensor:
        own = self._parameters.get(name)
        return value if own is None else own


_running: ContextVar[tuple[nn.Module, PartialCopy] | None] = ContextVar(
    "gralora_partial_copy", default=None
)


def running_copy(owner: nn.Module) -> PartialCopy | None:
    """The partial copy with which the forward of `owner` runs now, if it does."""
    if torch.compiler.is_compiling():
        return None
    found = _running.get()
    return found[1] if found is not None and found[0] is owner else None
