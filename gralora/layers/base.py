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
from gralora.layers.linear_map import CHILD, PREFIX, LinearMap
from gralora.layers.running import forward_runs
from gralora.layers.scope import Rows
from gralora.layers.sums import Share, Sum, evaluation, part_of
from gralora.layers.unevaluated import unevaluated
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
    ) -> Any:
        """base() plus the updates of the adapters in use, in the dtype of base().

        Args:
            x: the input of the map.
            base: the base layer's forward with its arguments.
            plain: (weight (out, in), bias), if base() is exactly x @ Wᵀ + b with these.
            dim: the axis of the batch in `x`; None where the map takes any.
            update: computes one adapter's update, in place of `self.update`.
        """
        adapters = cast(GraloraAdapters, self.__dict__["_modules"][CHILD])
        mode = adapters.mode
        applied = adapters.to_apply if mode is None else adapters.applied_in(mode)
        if not applied:
            return base()
        fused = self.can_fuse(x, applied)
        if fused and plain is not None and not isinstance(mode, Rows):
            (adapter, weight), applied = applied[0], applied[1:]
            bias = add_bias(plain[1], adapter.bias_times(weight))
            y = autograd.linear_with_adapter(x, plain[0], bias, *adapter.arguments(weight))
        else:
            y = base()
            if not isinstance(y, Tensor):
                return self.forward_with_effective_weight(*base.args, **base.keywords)
        if isinstance(mode, Rows):
            return self._add_by_row(y, x, mode, dim, update or self.update, fused)
        for adapter, weight in applied:
            if fused:
                y = autograd.add_adapter_(y, x, *adapter.arguments(weight))
            else:
                own = partial(update or self.update, adapter=adapter, share=weight)
                y = (y + functional.within(x, own)).to(y.dtype)
            y = self.add_to_output(y, adapter.bias_times(weight))
        return y

    def add_to_output(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """y plus a difference of the bias, in the dtype of y."""
        return y if bias is None else (y + bias).to(y.dtype)

    def can_fuse(self, x: Tensor, applied: Shares) -> bool:
        """Whether `maths.autograd` can compute these updates; else the definition does."""
        if not autograd.usable(x, applied[0][0].tensors[0]):
            return False
        return not any(has_hooks(adapter) for adapter, _ in applied)

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
            updates = (self.add_to_output(update_of(part, a, 1.0), a.bias) for a, part in parts)
            update = torch.cat(list(updates), dim)
        return y.index_add(dim, adapted, update.to(y.dtype))

    def read(self, weight: Tensor) -> Tensor:
        """What whoever reads the weight of the map gets: itself, but while a forward runs what
        acts, W + Σ weight * ΔW.

        Args:
            weight: the parameter that holds the map.
        """
        adapters = cast("GraloraAdapters | None", self._modules.get(CHILD))
        if (
            adapters is None
            or not (adapters.active or adapters.blocks or adapters.replica_mode)
            or type(weight) not in (Tensor, nn.Parameter)
        ):
            return weight
        if not self.is_read(weight):
            return weight
        mode = adapters.mode
        applied = adapters.to_apply if mode is None else adapters.applied_in(mode)
        if not applied:
            return weight
        sum = self.sum(weight, [adapter.arguments(share) for adapter, share in applied])
        if isinstance(mode, Rows):
            sum = sum._replace(evaluate=self._refuse_rows, stack=None, part=None)
        if not autograd.eager():
            return sum.evaluate(*sum.parameters)
        return cast(Tensor, unevaluated(sum))

    def sum(self, weight: Tensor, shares: list[Share]) -> Sum:
        """What `weight` stands for with these adapters: W + Σ ΔW."""
        parameters, evaluate = evaluation(weight, shares, self.map.in_layout)
        product, turned = self.product(weight), self.map.transposed
        part = None if product is None else partial(part_of, weight, shares, turned)
        return Sum(parameters, evaluate, product, turned, part=part)

    def _refuse_rows(self, *tensors: Tensor) -> Tensor:
        raise ValueError(
            f"the weight of {self} is read whole, and can't be another one for every row of the"
            " batch."
        )

    def is_read(self, weight: Tensor) -> bool:
        """Whether whoever reads the weight now means to compute with it, and is not the map
        itself.
        """
        return forward_runs(self.map.module)

    def product(self, weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """x (..., in), bias -> what the map makes of them with its adapters; None if it is no
        matrix.
        """
        return None

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


def add_bias(bias: Tensor | None, difference: Tensor | None) -> Tensor | None:
    """A bias plus what an adapter adds to it, in the dtype of the bias."""
    if bias is None or difference is None:
        return bias
    return (bias + difference).to(bias.dtype)


def name_of(path: str, layer: GraloraLayer) -> str:
    """The name of a map by where its layer lies: a part's own is not that of the child that it
    is.
    """
    above, _, own = path.rpartition(".")
    return join(above, own.removeprefix(PREFIX)) if layer.part else path


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
