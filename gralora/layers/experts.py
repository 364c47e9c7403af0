"""Fused experts: one 3-D parameter that holds the weights of many, (experts, out, in) or (experts, in, out).

Each expert has an adapter of its own. Which tokens an expert gets is known to its module alone, so within a forward whoever
reads the parameter by its name reads W + ΔW, unevaluated (`unevaluated.py`): choosing an expert chooses its adapter with it,
and a product with the chosen weights, one by one, batched or grouped, is the base's and the adapters' own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from gralora.engines.distributed import is_spread
from gralora.layers.adapter import GraloraAdapter, each
from gralora.layers.base import PREFIX, GraloraLayer
from gralora.layers.class_change import change_class
from gralora.layers.parts import PartHost, PartLayer
from gralora.layers.unevaluated import Stack, Sum, forward_runs
from gralora.maths import autograd, functional
from gralora.maths.functional import Tensors
from gralora.maths.grouped import update_by_groups, update_of_each

_read: ContextVar[dict[tuple[int, bool, int], Tensor] | None] = ContextVar("gralora_experts", default=None)
_read_again: WeakKeyDictionary[Any, dict[tuple[int, bool, int], Tensor]] = WeakKeyDictionary()
"""By checkpointed region, where part of a forward runs again for itself."""


class ExpertWeights(PartLayer):
    """The weights of many experts in one parameter, with an adapter for each: a child of the module that owns it."""

    what = "experts"
    in_all_linear = False
    by_row = False

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

    def is_read(self, weight: Tensor) -> bool:
        return torch.compiler.is_compiling() or forward_runs(None)

    def as_read(self, sum: Sum, applied: list[tuple[GraloraAdapter, float]]) -> Sum:
        shares = [adapter.arguments(share) for adapter, share in applied]
        return _sum_of_many(sum.parameters[0], shares, sum.transposed)


Shares = list[tuple[Tensors, float, float]]
"""(tensors, scaling, dropout) of every adapter that acts."""


def _stack_of(weight: Tensor, shares: Shares, transposed: bool) -> Stack:
    """What can be done with maps (n, out, in), or (n, in, out) if `transposed`, and adapters for each of them."""
    apart: list[list[Tensors]] = []  # taken apart once: each time would cost a gradient of all of A and B

    def one(index: int) -> Sum:
        if not apart:
            apart.extend(each(tensors) for tensors, _, _ in shares)
        own = [(tensors[index], share[1], share[2]) for tensors, share in zip(apart, shares, strict=True)]
        return _sum_of_one(weight[index], own, transposed)

    def some(index: Tensor) -> Sum:
        picked = [cast(Tensors, tuple(None if t is None else t[index] for t in tensors)) for tensors, _, _ in shares]
        own = [(tensors, share[1], share[2]) for tensors, share in zip(picked, shares, strict=True)]
        return _sum_of_many(weight[index], own, transposed)

    def of_each(x: Tensor) -> Tensor:
        y = torch.bmm(x, weight if transposed else weight.mT)
        for tensors, scaling, dropout in shares:
            y = y + update_of_each(x, tensors, scaling, dropout).to(y.dtype)
        return y

    def grouped(function: Callable[..., Tensor], x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        y = function(x, weight if transposed else weight.mT, **kwargs)
        ends = kwargs["offs"].tolist()
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for tensors, scaling, dropout in shares:
            y = y + update_by_groups(x, counts, tensors, scaling, dropout).to(y.dtype)
        return y

    return Stack(one, some, of_each, grouped)


def _sum_of_many(weight: Tensor, shares: Shares, transposed: bool) -> Sum:
    """A stack of maps, with the adapters of each."""
    parameters, evaluate = _evaluation(weight, shares, transposed)
    stack = _stack_of(weight, shares, transposed)
    return Sum(
        parameters, evaluate, None, transposed, stack, lambda: _sum_of_many(weight, swapped(shares), not transposed)
    )


def swapped(shares: Shares) -> Shares:
    """The adapters of the transposed maps: A and B change roles."""
    return [
        (tuple(None if t is None else t.mT for t in (B, A, B_general, A_general)), scaling, dropout)  # type: ignore[misc]
        for (A, B, A_general, B_general), scaling, dropout in shares
    ]


def _sum_of_one(weight: Tensor, shares: Shares, transposed: bool) -> Sum:
    """One map of a stack, with its own adapters."""
    matrix = weight.mT if transposed else weight

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        first, *more = shares
        if not autograd.usable(x, first[0][0]):
            y = F.linear(x, matrix, bias)
            for tensors, scaling, dropout in shares:
                own = x.to(tensors[0].dtype)
                y = (y + functional.gralora_update(own, *tensors, scaling=scaling, dropout=dropout)).to(y.dtype)
            return y
        y = autograd.linear_with_adapter(x, matrix, bias, *first)
        for rest in more:
            y = autograd.add_adapter_(y, x, *rest)
        return y

    parameters, evaluate = _evaluation(weight, shares, transposed)
    return Sum(
        parameters, evaluate, product, transposed, other=lambda: _sum_of_one(weight, swapped(shares), not transposed)
    )


def _evaluation(weight: Tensor, shares: Shares, transposed: bool) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """What a sum is computed from, and how."""

    def evaluate(weight: Tensor, *tensors: Tensor) -> Tensor:
        left, total = iter(tensors), weight
        for own, scaling, _ in shares:
            mine = cast(Tensors, tuple(t if t is None else next(left) for t in own))
            delta = functional.delta_weight(*mine, scaling=scaling)
            total = total + (delta.mT if transposed else delta)
        return total.to(weight.dtype)

    return (weight, *(t for own, _, _ in shares for t in own if t is not None)), evaluate


class GraloraExperts(PartHost):
    """Mixin of a module that owns fused expert weights: they are read with their adapters in them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.base_forward(*args, **kwargs)
        token = _read.set({})  # a forward may read a parameter once for every expert
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            _read.reset(token)

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
        if not isinstance(layer, ExpertWeights):
            return value
        if torch.compiler.is_compiling():
            return layer.read(value)
        # what a checkpoint runs again must save the same tensors in the same order: it shares no reading with what is around
        region, read = _checkpoint(), _read.get()
        if read is None and region is not None and torch._C._current_graph_task_id() != -1:
            read = _read_again.setdefault(region, {})
        key = (id(layer), torch.is_grad_enabled(), id(region))
        if read is None:
            return layer.read(value)
        if key not in read:
            read[key] = layer.read(value)
        return read[key]


def _checkpoint() -> Any:
    """What tells one checkpointed region from another, within one: the hook by which it packs what is saved."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]
