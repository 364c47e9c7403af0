"""Fused experts: one 3-D parameter that holds the weights of many, (experts, out, in) or (experts, in, out).

Each expert has an adapter of its own. Which tokens an expert gets is known to its module alone, so the adapters are added
to the weights: while one acts, whoever reads the parameter by its name reads W + ΔW. `torch.nn.utils.parametrize` would do
this too, but it renames the parameter, so that base checkpoints no longer load, and forbids pickling.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from gralora.engines.distributed import is_spread
from gralora.layers.base import PREFIX, GraloraLayer
from gralora.layers.class_change import change_class
from gralora.layers.parts import PartHost, PartLayer

_computed: ContextVar[dict[tuple[int, bool], Tensor] | None] = ContextVar("gralora_experts", default=None)


class ExpertWeights(PartLayer):
    """The weights of many experts in one parameter, with an adapter for each: a child of the module that owns it."""

    what = "experts"
    in_all_linear = False
    by_row = False
    takes_dropout = False

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return not original.__module__.startswith("torch.nn.")

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        parameters = module._parameters.items()
        return tuple(name for name, p in parameters if p is not None and p.dim() == 3 and len(p) > 1)

    @classmethod
    def weight_at(cls, module: nn.Module, part: str) -> tuple[nn.Module, str]:
        return module, part

    @classmethod
    def bias_at(cls, module: nn.Module, part: str) -> tuple[nn.Module, str]:
        return module, f"{part}_bias"

    @classmethod
    def transposed(cls, module: nn.Module, part: str) -> bool:
        return bool(getattr(module, "is_transposed", False))  # as transformers says it

    @classmethod
    def matrix(cls, module: nn.Module, part: str, weight: Tensor) -> Tensor:
        return rearrange(weight, "e i o -> e o i") if cls.transposed(module, part) else weight

    @classmethod
    def in_layout(cls, module: nn.Module, part: str, delta: Tensor) -> Tensor:
        return rearrange(delta, "e o i -> e i o") if cls.transposed(module, part) else delta

    @classmethod
    def sizes(cls, module: nn.Module, part: str) -> tuple[int, int]:
        _, *sizes = cast(Tensor, module._parameters[part]).shape
        return (sizes[0], sizes[1]) if cls.transposed(module, part) else (sizes[1], sizes[0])

    @classmethod
    def copies(cls, module: nn.Module, part: str) -> int | None:
        return len(cast(Tensor, module._parameters[part]))

    @classmethod
    def attach(cls, module: nn.Module, part: str) -> GraloraLayer:
        if not isinstance(module, GraloraExperts):
            change_class(module, GraloraExperts)
        return cast(GraloraLayer, module._modules.setdefault(PREFIX + part, ExpertWeights(module, part)))

    def adapted_weight(self, weight: Tensor) -> Tensor:
        """W + Σ weight * ΔW over the adapters that act now, in the dtype of W."""
        applied = self.gralora_adapters.applied()
        if not applied:
            return weight
        computed = None if torch.compiler.is_compiling() else _computed.get()
        key = (id(self), torch.is_grad_enabled())
        if computed is not None and key in computed:
            return computed[key]
        result = (weight + self.weighted_delta(applied)).to(weight.dtype)
        if computed is not None:
            computed[key] = result
        return result


class GraloraExperts(PartHost):
    """Mixin of a module that owns fused expert weights: they are read with their adapters in them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.base_forward(*args, **kwargs)
        token = _computed.set({})  # a forward may read a parameter once for every expert
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            _computed.reset(token)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # engines that keep it elsewhere read it outside of a forward
        if (
            name not in self.__dict__["_parameters"]
            or not isinstance(value, Tensor)
            or value.is_meta
            or is_spread(value)
        ):
            return value
        layer = self.__dict__["_modules"].get(PREFIX + name)
        return layer.adapted_weight(value) if isinstance(layer, ExpertWeights) else value
