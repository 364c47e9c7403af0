"""Frozen norms: they run in eval mode while an adapter is attached.

A norm with running statistics updates them in every training forward, and spectral norm its
vectors. Under an adapter these would belong to nobody: the file does not hold them, and `unload`
could not restore the base's. So a frozen norm runs as in eval, which is also how it runs when the
adapter is used. A norm that is to move is named in `modules_to_save`, or has a trained parameter of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gralora.layers.class_change import InPlaceModule
from gralora.torch_internals import NormBase, SpectralNorm


class StillModule(InPlaceModule):
    """Mixin of a norm that runs as in eval while nothing in it is trained."""

    _prefix = "Still"

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return not isinstance(module, InPlaceModule) and has_statistics(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with frozen_statistics(self):
            return self.base_forward(*args, **kwargs)


def has_statistics(module: nn.Module) -> bool:
    """Whether a training forward of `module` updates statistics."""
    norm = isinstance(module, NormBase) and module.running_mean is not None
    return norm or isinstance(module, SpectralNorm)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within it a norm without a trained parameter of its own runs in eval mode."""
    trained = any(p is not None and p.requires_grad for p in module._parameters.values())
    if not module.training or trained or not has_statistics(module):
        yield
        return
    module.training = False
    try:
        yield
    finally:
        module.training = True
