"""Fused experts: one 3-D parameter that holds the weights of many, (experts, out, in) or (experts,
in, out).

Each expert has an adapter of its own. Which tokens an expert gets is known to its module alone. So
code that reads the parameter within a forward gets W + ΔW, not computed (`lazy_weight`): selecting
an expert selects its adapter, and a product with the selected weights, one by one, batched or
grouped, is the base's plus the adapters' own.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.fx import Proxy

from gralora.layers.base import PREFIX, GraloraLayer
from gralora.layers.class_change import change_class, traced, traced_read
from gralora.layers.effective_weight import EffectiveWeight, ExpertsWeight, Share
from gralora.layers.parts import PartHost, PartLayer
from gralora.layers.running import forward_runs
from gralora.layers.scope import OFF, Only, Rows, switched

_read: ContextVar[dict[tuple[int, bool, int], Tensor] | None] = ContextVar(
    "gralora_experts", default=None
)
_read_again: WeakKeyDictionary[Any, dict[tuple[int, bool, int], Tensor]] = WeakKeyDictionary()
"""By checkpointed region, where part of a forward runs again for itself."""


class ExpertWeights(PartLayer):
    """The weights of many experts in one parameter, with an adapter for each: a child of the module
    that owns it.
    """

    what = "experts"
    in_all_linear = False

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return not original.__module__.startswith("torch.nn.")

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        parameters = module._parameters.items()
        return tuple(
            name for name, p in parameters if p is not None and p.dim() == 3 and len(p) > 1
        )

    @classmethod
    def unfit(cls, module: nn.Module, part: str) -> str | None:
        weight = cast(Tensor, module._parameters[part])
        packed = (
            f"holds experts of {weight.dtype}, quantised in a format that its module alone can read"
        )
        return None if weight.is_floating_point() else packed

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
        return cast(
            GraloraLayer, module._modules.setdefault(PREFIX + part, ExpertWeights(module, part))
        )

    def is_read(self, weight: Tensor) -> bool:
        return torch.compiler.is_compiling() or forward_runs(None)

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        return ExpertsWeight(weight, shares, self.transposed(self.host, self.part))


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
        x, routed = (*args, *kwargs.values(), None, None)[:2]
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
        order, back, names, counts = rows.sort(len(x), known, x.device)

        def own(value: Any, tokens: Tensor) -> Any:
            per_token = isinstance(value, Tensor) and value.shape[:1] == x.shape[:1]
            return value.index_select(0, tokens) if per_token else value

        done = []
        for name, tokens in zip(names, torch.split(order, counts), strict=True):
            if len(tokens):
                with switched(containers, OFF if name is None else Only(name)):
                    mine = [own(value, tokens) for value in args]
                    done.append(
                        self._reading(
                            *mine, **{key: own(value, tokens) for key, value in kwargs.items()}
                        )
                    )
        return torch.cat(done).index_select(0, back)

    def _reading(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.base_forward(*args, **kwargs)
        token = _read.set({})  # a forward may read a parameter once for every expert
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            _read.reset(token)

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        layer = self.__dict__["_modules"].get(PREFIX + name)
        if not isinstance(layer, ExpertWeights) or name not in self.__dict__["_parameters"]:
            return value
        if isinstance(value, Proxy):
            return traced_read(self, name, value)
        if torch.compiler.is_compiling():
            return layer.read(value)
        if not layer.is_read(
            value
        ):  # an engine brings the parameter or takes it away, within the forward
            return value
        # what a checkpoint runs again must save the same tensors in the same order: it shares no
        # reading with what is around
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
    """What tells one checkpointed region from another, within one: the hook by which it packs what
    is saved.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]
