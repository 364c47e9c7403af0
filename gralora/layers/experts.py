"""Fused experts: one 3-D parameter that holds the weights of many, (experts, out, in) or (experts,
in, out).

Each expert has an adapter of its own. Which tokens an expert gets is known to its module alone. So
code that reads the parameter within a forward gets W + ΔW, not computed (`lazy_weight`): selecting
an expert selects its adapter, and a product with the selected weights, one by one, batched or
grouped, is the base's plus the adapters' own.
"""

from __future__ import annotations

from collections.abc import Container
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gralora.layers.adapter import GraloraAdapters
from gralora.layers.class_change import change_class, traced
from gralora.layers.effective_weight import EffectiveWeight, ExpertsWeight, Share
from gralora.layers.linear_map import PREFIX
from gralora.layers.parts import PartHost, PartLayer, PartMap
from gralora.layers.running import forward_runs
from gralora.layers.scope import OFF, Only, Rows, switched
from gralora.torch_internals import in_backward, saved_tensor_hooks

_read: ContextVar[dict[tuple[int, bool, int], Tensor] | None] = ContextVar(
    "gralora_experts", default=None
)
_read_again: WeakKeyDictionary[Any, dict[tuple[int, bool, int], Tensor]] = WeakKeyDictionary()
"""By checkpointed region, where part of a forward runs again for itself."""


class ExpertWeights(PartLayer):
    """The weights of many experts in one parameter, with an adapter for each: a child of the module
    that owns it.
    """

    @property
    def map(self) -> ExpertsMap:
        return ExpertsMap(self.host, self.part)

    def is_read(self, weight: Tensor) -> bool:
        return torch.compiler.is_compiling() or forward_runs(None)

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        return ExpertsWeight(weight, shares, self.map.transposed)


class ExpertsMap(PartMap):
    """The maps of fused experts, in one parameter.

    Any 3-D parameter may be one, a table of position biases too. So it is adapted only where a
    target names the parameter itself.
    """

    kind = "experts"
    in_all_linear = False
    by_own_name = True

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        scripted = issubclass(original, torch.jit.ScriptModule)
        return not scripted and not original.__module__.startswith("torch.nn.")

    @classmethod
    def parts_of(cls, module: nn.Module) -> tuple[str, ...]:
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        return tuple(name for name, p in own if is_lazy(p) or (p.dim() == 3 and len(p) > 1))

    @property
    def place(self) -> tuple[nn.Module, str]:
        return self.module, self.part

    @property
    def bias_place(self) -> tuple[nn.Module, str]:
        return self.module, f"{self.part}_bias"

    @property
    def sizes(self) -> tuple[int, int]:
        _, first, second = self.weight.shape
        return (first, second) if self.transposed else (second, first)

    @property
    def copies(self) -> int:
        return len(self.weight)

    @property
    def transposed(self) -> bool:
        return bool(getattr(self.module, "is_transposed", False))  # as transformers says it

    def matrix(self, weight: Tensor) -> Tensor:
        return rearrange(weight, "e i o -> e o i") if self.transposed else weight

    def in_layout(self, delta: Tensor) -> Tensor:
        return rearrange(delta, "e o i -> e i o") if self.transposed else delta

    def reason_unfit(self) -> str | None:
        reason = super().reason_unfit()
        if reason is None and not self.weight.is_floating_point():
            return (
                f"holds experts of {self.weight.dtype}, quantised in a format that its module alone"
                " can read"
            )
        return reason

    def attach(self) -> GraloraAdapters:
        if self.adapters is not None:
            return self.adapters
        if not isinstance(self.module, GraloraExperts):
            change_class(self.module, GraloraExperts)
        layer = ExpertWeights(self.module, self.part)
        self.module.add_module(PREFIX + self.part, layer)
        return layer.gralora_adapters


class GraloraExperts(PartHost):
    """Mixin of a module that owns fused expert weights: they are read with their adapters in
    them.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        node = traced(self, args, kwargs)
        if node is not None:
            return node
        modes = (layer.gralora_adapters.mode for layer in self.part_layers())
        rows = next((mode for mode in modes if isinstance(mode, Rows)), None)
        return (
            self._reading(*args, **kwargs) if rows is None else self._by_row(rows, *args, **kwargs)
        )

    def _by_row(self, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        """Each token through its row's adapters: one run for every adapter, which sees its own
        tokens and their routing.
        """
        x, routed = [*self.bound_arguments(args, kwargs), None, None][:2]
        if (
            not isinstance(x, Tensor)
            or not isinstance(routed, Tensor)
            or routed.is_floating_point()
        ):
            routed = None
        if routed is None or x.dim() != 2 or routed.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"mixed_batch can't tell the rows apart in {self._base_class.__name__}, which holds"
                " fused experts: it is not given tokens (t, in) and the experts of each (t, n), as"
                " transformers' own are."
            )
        containers = [layer.gralora_adapters for layer in self.part_layers()]
        known = dict.fromkeys(name for container in containers for name in container)
        rows.axis(x)

        def own(value: Any, tokens: Tensor) -> Any:
            per_token = isinstance(value, Tensor) and value.shape[:1] == x.shape[:1]
            return value.index_select(0, tokens) if per_token else value

        def run(name: str | None, tokens: Tensor) -> Tensor:
            with switched(containers, OFF if name is None else Only(name)):
                mine = [own(value, tokens) for value in args]
                named = {key: own(value, tokens) for key, value in kwargs.items()}
                y: Tensor = self._reading(*mine, **named)
                return y

        return rows.run_by_adapter(x, 0, known, run)

    def _reading(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.base_forward(*args, **kwargs)
        token = _read.set({})  # a forward may read a parameter once for every expert
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            _read.reset(token)

    @property
    def effective_names(self) -> Container[str]:
        parts = [layer.part for layer in self.part_layers()]
        return {*parts, *(f"{part}_bias" for part in parts)}

    def effective_parameter(self, name: str, value: Tensor) -> Tensor:
        layers = self.__dict__["_modules"]
        biased = layers.get(PREFIX + name.removesuffix("_bias"))
        if name.endswith("_bias") and isinstance(biased, ExpertWeights):
            return biased.read_bias(value)
        layer = layers.get(PREFIX + name)
        if not isinstance(layer, ExpertWeights):
            return value
        if torch.compiler.is_compiling():
            return layer.read(value)
        if not layer.is_read(value):  # an engine fetches or frees the parameter in the forward
            return value
        # what a checkpoint runs again must save the same tensors in the same order: it shares no
        # reading with what is around
        region, read = _checkpoint(), _read.get()
        if read is None and region is not None and in_backward():
            read = _read_again.setdefault(region, {})
        key = (id(layer), torch.is_grad_enabled(), id(region))
        if read is None:
            return layer.read(value)
        if key not in read:
            read[key] = layer.read(value)
        return read[key]


def _checkpoint() -> Any:
    """What tells one checkpointed region from another, within one: the hook by which it packs what
    is saved.
    """
    hooks = saved_tensor_hooks()
    return None if hooks is None else hooks[0]
