"""`GraloraLayer`: one linear map of a model, and the adapters that hang on it.

An adapted layer *is* the layer it was: a `GraloraLinear` is an `nn.Linear` with one child more,
`gralora_adapters`, which holds everything about adaptation. Maps that are no layers of their own
(the projections within an `nn.MultiheadAttention`, fused expert weights) are children of their
module, named after the map.

A new kind is a subclass of `LinearMap` and one of `GraloraLayer`, in a file of their own, and one
row of the table in `kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gralora.engines.distributed import is_spread
from gralora.engines.walk import named_modules
from gralora.layers.adapter import GraloraAdapter, GraloraAdapters, Shares
from gralora.layers.class_change import join
from gralora.layers.effective_weight import EffectiveWeight, Share, UnreadableWeight
from gralora.layers.lazy_weight import is_dense, read_as
from gralora.layers.linear_map import CHILD, PREFIX, LinearMap
from gralora.layers.running import forward_runs
from gralora.layers.scope import Mode, Rows
from gralora.maths import autograd, functional
from gralora.torch_internals import has_hooks


class GraloraLayer(nn.Module):
    """Base of every adapted map: y = base(x) + Σ over active adapters of weight * scaling * x @
    ΔWᵀ.
    """

    gralora_adapters: GraloraAdapters
    part: str = ""

    @property
    def map(self) -> LinearMap:
        """The map that is adapted."""
        raise NotImplementedError

    def rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """An input (..., in) and an output of the map as the rows (t, in), (t, out) that its matrix
        takes and gives.
        """
        return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])

    def detach(self) -> None:
        """Undo `LinearMap.attach`."""
        raise NotImplementedError

    def apply_adapters(
        self,
        x: Tensor,
        base: partial[Any],
        *,
        plain: tuple[Tensor, Tensor | None] | None = None,
        dim: int | None = None,
        update: Callable[..., Tensor] | None = None,
        with_biases: bool = True,
    ) -> Any:
        """base() plus the updates of the adapters in use, in the dtype of base().

        Args:
            x: the input of the map.
            base: the base layer's forward with its arguments.
            plain: (weight (out, in), bias), if base() is exactly x @ Wᵀ + b with these.
            dim: the axis of the batch in `x`; None where the map takes any.
            update: computes one adapter's update, in place of `self.update`.
            with_biases: whether the biases of the adapters are added too.
        """
        adapters: GraloraAdapters = self.__dict__["_modules"][CHILD]
        mode = adapters.mode
        applied = adapters.to_apply if mode is None else adapters.applied_in(mode)
        if not applied:
            return base()
        if isinstance(mode, Rows) or not self.can_fuse(x, applied):
            return self._apply_definition(x, base, applied, mode, dim, update, with_biases)
        if plain is None:
            y = base()
            if not isinstance(y, Tensor):
                return self.forward_with_effective_weight(*base.args, **base.keywords)
        else:
            (adapter, weight), applied = applied[0], applied[1:]
            matrix, bias = plain
            difference = adapter.bias_times(weight) if with_biases else None
            if bias is not None and difference is not None:
                bias = self.add_to_output(bias, difference)
            y = autograd.linear_with_adapter(x, matrix, bias, *adapter.arguments(weight))
        for adapter, weight in applied:
            y = autograd.add_adapter_(y, x, *adapter.arguments(weight))
            y = self.add_to_output(y, adapter.bias_times(weight) if with_biases else None)
        return y

    def _apply_definition(
        self,
        x: Tensor,
        base: partial[Any],
        applied: Shares,
        mode: Mode | None,
        dim: int | None,
        update: Callable[..., Tensor] | None,
        with_biases: bool,
    ) -> Any:
        """The same where the fused function cannot serve, and where rows differ."""
        y = base()
        if not isinstance(y, Tensor):
            return self.forward_with_effective_weight(*base.args, **base.keywords)

        def whole_update(x: Tensor, adapter: GraloraAdapter, share: float) -> Tensor:
            own = (update or self.update)(x, adapter=adapter, share=share)
            return self.add_to_output(own, adapter.bias_times(share) if with_biases else None)

        if isinstance(mode, Rows):
            fused = self.can_fuse(x, applied)
            return self._add_by_row(y, x, mode, dim, whole_update, fused)
        for adapter, weight in applied:
            own = partial(whole_update, adapter=adapter, share=weight)
            y = (y + functional.within(x, own)).to(y.dtype)
        return y

    def add_to_output(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """y plus a difference of the bias, in the dtype of y."""
        return y if bias is None else (y + bias).to(y.dtype)

    def can_fuse(self, x: Tensor, applied: Shares) -> bool:
        """Whether `maths.autograd` can compute these updates; else the definition does."""
        for adapter, _ in applied:
            if has_hooks(adapter):
                return False
        return autograd.usable(x, applied[0][0].tensors[0])

    def forward_with_effective_weight(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with W + ΔW as its weight: of a layer that returns more than one
        tensor, to which no update can be added.
        """
        name = getattr(type(self), "_base_class", type(self)).__name__
        raise TypeError(
            f"the forward of {name} does not return a tensor, so no update can be added to it."
            " Exclude the layer with exclude_modules."
        )

    def update(self, x: Tensor, adapter: GraloraAdapter, share: float) -> Tensor:
        """What `adapter` adds for the input `x`, times `share`."""
        return cast(Tensor, adapter(x, share))

    def _add_by_row(
        self,
        y: Tensor,
        x: Tensor,
        rows: Rows,
        dim: int | None,
        update_of: Callable[..., Tensor],
        fused: bool,
    ) -> Tensor:
        if is_spread(x):
            raise ValueError("mixed_batch does not support layers whose weights are sharded.")
        adapters = self.gralora_adapters
        dim = rows.axis(x, dim)
        order, _, names, counts = rows.sort(x.shape[dim], list(adapters), x.device)
        adapted = order[: len(order) - counts.pop()]
        if not len(adapted):
            return y
        chosen = [adapters[name] for name in names if name is not None]
        groups, x = [adapter.arguments() for adapter in chosen], x.index_select(dim, adapted)
        one_type = len({adapter.A.dtype for adapter in chosen}) == 1
        no_dropout = not any(dropout for *_, dropout in groups)
        no_graph = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        no_bias = all(adapter.bias is None for adapter in chosen)
        if fused and one_type and no_dropout and no_graph and no_bias and dim == 0:
            update = autograd.updates_of_groups(x, counts, [group[:2] for group in groups])
        else:
            parts = zip(chosen, torch.split(x, counts, dim), strict=True)
            update = torch.cat([update_of(part, adapter, 1.0) for adapter, part in parts], dim)
        return y.index_add(dim, adapted, update.to(y.dtype))

    def read(self, weight: Tensor) -> Tensor:
        """The weight as code outside the map sees it: W + ΔW of the active adapters while a forward
        runs, else the parameter; always the parameter if its layer alone can read it.

        Args:
            weight: the parameter that holds the map.
        """
        adapters = cast("GraloraAdapters | None", self._modules.get(CHILD))
        if adapters is None or not (adapters.active or adapters.blocks or adapters.replica_mode):
            return weight
        sharded = is_spread(weight)
        if not (sharded or is_dense(weight)) or not self.is_read(weight):
            return weight
        mode = adapters.mode
        applied = adapters.to_apply if mode is None else adapters.applied_in(mode)
        if not applied:
            return weight
        effective = self.effective_weight(
            weight, [adapter.arguments(share) for adapter, share in applied]
        )
        if isinstance(mode, Rows):
            effective = UnreadableWeight(
                effective,
                f"the weight of {self} is read whole, and can't be another one for every row of the"
                " batch.",
            )
        elif sharded:
            effective = UnreadableWeight(
                effective,
                f"the weight of {self} is sharded over processes, and another module needs the"
                " values of W + ΔW, which no process holds. Call the layer instead.",
            )
        return read_as(effective)

    def read_bias(self, bias: Tensor) -> Tensor:
        """The bias as code outside the map sees it: with what the adapters in use add to it while a
        forward runs.
        """
        if CHILD not in self._modules or not self.is_read(bias):
            return bias
        adapters = self.gralora_adapters
        mode = adapters.mode
        for adapter, weight in adapters.applied_in(mode):
            difference = adapter.bias_times(weight)
            if difference is not None and isinstance(mode, Rows):
                raise ValueError(
                    f"mixed_batch: the bias of {self} is read by another module, and cannot differ"
                    " from row to row."
                )
            bias = bias if difference is None else (bias + difference).to(bias.dtype)
        return bias

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        """W + ΔW with these adapters, for code that reads the weight."""
        return LayerWeight(self, weight, shares)

    def is_read(self, weight: Tensor) -> bool:
        """Whether the code that reads the weight now computes with it, outside the map itself."""
        return torch.compiler.is_compiling() or forward_runs(self.map.module)

    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """ΔW in the layout of the weight: of one adapter, or the weighted sum of the active
        ones.
        """
        adapters = self.gralora_adapters
        weights = adapters.active if adapter_name is None else {adapter_name: 1.0}
        if not weights or not all(name in adapters for name in weights):
            raise KeyError(
                f"no adapter {adapter_name!r} to read ΔW from; this layer has:"
                f" {', '.join(adapters) or 'none'}"
            )
        return self.weighted_delta([(adapters[name], weight) for name, weight in weights.items()])

    def weighted_delta(self, shares: Iterable[tuple[GraloraAdapter, float]]) -> Tensor:
        """Σ weight * ΔW of some of the adapters, at least one, in the layout of the weight."""
        first, *rest = (adapter.delta_weight() * weight for adapter, weight in shares)
        return self.map.in_layout(sum(rest, start=first))

    def _attach_container(self) -> None:
        self.gralora_adapters = GraloraAdapters()
        self.gralora_adapters.training = self.training


class LayerWeight(EffectiveWeight):
    """The effective weight of a layer, in the layout that the layer says."""

    def __init__(self, layer: GraloraLayer, weight: Tensor, shares: list[Share]) -> None:
        super().__init__(weight, shares)
        self.layer = layer

    def in_layout(self, delta: Tensor) -> Tensor:
        return self.layer.map.in_layout(delta)


def name_of(path: str, layer: GraloraLayer) -> str:
    """The name of a map by where its layer lies: a part's own is not that of the child that it
    is.
    """
    if not layer.part:
        return path
    above, _, own = path.rpartition(".")
    return join(above, own.removeprefix(PREFIX))


def gralora_layers(model: nn.Module) -> Iterator[tuple[str, GraloraLayer]]:
    """Every adapted map of `model` with its name, once each."""
    for name, module in named_modules(model):
        if isinstance(module, GraloraLayer):
            yield name_of(name, module), module


def delta_weight(layer: nn.Module, adapter_name: str | None = None) -> Tensor:
    """ΔW of an adapted layer, in the layout of `layer.weight`: of one adapter, or the weighted sum
    of the active ones.

    Raises:
        TypeError: `layer` is not adapted. KeyError: it has no such adapter.
    """
    if not isinstance(layer, GraloraLayer):
        raise TypeError(f"delta_weight takes an adapted layer, not a {type(layer).__name__}.")
    return layer.delta_weight(adapter_name)
