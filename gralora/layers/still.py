"""Modules that keep their statistics while an adapter trains: what is frozen is frozen whole.

A norm with running statistics moves them in every training forward, trained or not; so does
spectral norm its vectors. Under an adapter they would belong to nobody: the file does not hold
them, `unload` could not give the base's back. So a frozen one runs as in eval, with its statistics
as they are, which is also how it will run when the adapter is used. One that is to move is named in
`modules_to_save`, or has a parameter that is trained.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations

from gralora.layers.class_change import InPlaceModule

_SPECTRAL: type[nn.Module] = parametrizations._SpectralNorm


class StillModule(InPlaceModule):
    """Mixin of a module that runs as in eval while nothing in it is trained."""

    _prefix = "Still"

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether `module` has statistics that a training forward moves."""
        if isinstance(module, InPlaceModule):
            return False
        return isinstance(module, _SPECTRAL) or (
            isinstance(module, _NormBase) and module.running_mean is not None
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training or any(
            p is not None and p.requires_grad for p in self._parameters.values()
        ):
            return self.base_forward(*args, **kwargs)
        self.training = False
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            self.training = True
