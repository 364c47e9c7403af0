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
from gralora.layers.adapter import GraloraAdapter, GraloraAdapters, is_hooked
from gralora.layers.class_change import join
from gralora.layers.linear_map import CHILD, PREFIX, LinearMap
from gralora.layers.running import forward_runs
from gralora.layers.scope import Rows
from gralora.layers.sums import Share, Sum, evaluation, part_of
from gralora.layers.unevaluated import unevaluated
from gralora.maths import autograd, functional


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

    def run(
        self,
        x: Tensor,
        base: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dim: int | None = None,
        plain: tuple[Tensor, Tensor | None] | None = None,
        update: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """base(*args, **kwargs) plus what the adapters add to it for the input `x`, in the dtype of
        the base.

        Args:
            dim: the axis of the batch in `x`, where the map knows it.
            plain: as `plain()` gives it, where the caller knows it.
            update: as `self.update`, where that depends on more than x.
        """
        adapters = cast(GraloraAdapters, self._modules[CHILD])
        mode = adapters.mode if adapters.scopes else None
        if isinstance(mode, Rows):
            y = base(*args, **kwargs)
            if not isinstance(y, Tensor):
                return self.reading(args, kwargs)
            return self._run_rows(x, y, mode, dim, update or self.update)
        applied = adapters.applied()
        if not applied:
            return base(*args, **kwargs)
        if not self.fast(x, applied[0][0].tensors[0]) or any(
            is_hooked(adapter) for adapter, _ in applied
        ):
            update = update or self.update
            y = base(*args, **kwargs)
            if not isinstance(y, Tensor):
                return self.reading(args, kwargs)
            for adapter, share in applied:
                y = (y + functional.within(x, partial(update, adapter=adapter, share=share))).to(
                    y.dtype
                )
            return y
        plain = plain or self.plain()
        if plain is not None:
            adapter, share = applied.pop(0)
            y = autograd.linear_with_adapter(x, plain[0], plain[1], *adapter.arguments(share))
        else:
            y = base(*args, **kwargs)
            if not isinstance(y, Tensor):
                return self.reading(args, kwargs)
        for adapter, share in applied:
            y = autograd.add_adapter_(y, x, *adapter.arguments(share))
        return y

    def reading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base's forward where it returns more than one tensor, to which nothing can be
        added.
        """
        name = getattr(type(self), "_base_class", type(self)).__name__
        raise TypeError(
            f"the forward of {name} returns no tensor, so no update can be added to it. Leave the"
            " layer out, with exclude_modules."
        )

    def fast(self, x: Tensor, A: Tensor) -> bool:
        """Whether `gralora.maths.autograd` serves here."""
        return autograd.usable(x, A)

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight (out, in), bias), if the base is exactly x @ Wᵀ + b with these; None if it must
        be called to know.
        """
        return None

    def update(self, x: Tensor, adapter: GraloraAdapter, share: float) -> Tensor:
        """What `adapter` adds for the input `x`, times `share`."""
        return cast(Tensor, adapter(x, share))

    def _run_rows(
        self, x: Tensor, y: Tensor, rows: Rows, dim: int | None, update_of: Callable[..., Tensor]
    ) -> Tensor:
        if is_spread(x):
            raise ValueError(
                "mixed_batch does not reach layers whose weights are spread over processes."
            )
        adapters = self.gralora_adapters
        dim = rows.axis(x, dim)
        order, _, names, counts = rows.sort(x.shape[dim], list(adapters), x.device)
        adapted = order[: len(order) - counts[-1]]
        if not len(adapted):
            return y
        sorted_x, chosen = (
            x.index_select(dim, adapted),
            [adapters[cast(str, name)] for name in names[:-1]],
        )
        groups = [adapter.arguments() for adapter in chosen]
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or dim != 0
        plain = (
            plain
            or any(dropout for *_, dropout in groups)
            or len({adapter.A.dtype for adapter in chosen}) > 1
        )
        plain = plain or any(map(is_hooked, chosen))
        if plain or not self.fast(x, chosen[0].A):
            parts = torch.split(sorted_x, counts[:-1], dim)
            update = torch.cat(
                [update_of(part, a, 1.0) for a, part in zip(chosen, parts, strict=True)], dim
            )
        else:
            update = autograd.updates_of_groups(
                sorted_x, counts[:-1], [group[:2] for group in groups]
            )
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
            or not (adapters.active or adapters.scopes)
            or type(weight) not in (Tensor, nn.Parameter)
        ):
            return weight
        if not self.is_read(weight):
            return weight
        mode = adapters.mode
        if isinstance(mode, Rows):
            applied = [
                (adapters[name], 1.0)
                for name in dict.fromkeys(mode.names)
                if name is not None and name in adapters
            ]
        else:
            applied = adapters.applied()
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
