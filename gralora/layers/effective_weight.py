"""What the weight of an adapted map stands for while a forward reads it: W + ΔW, the sum over the
active adapters in ΔW.

An `EffectiveWeight` computes that sum (`evaluate`), and the operations that do not need it:
products, transposes, the selection of experts. An operation returns None where it needs the sum
after all. `lazy_weight` has the tensor that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gralora.layers.adapter import each
from gralora.maths import autograd, functional
from gralora.maths.functional import Tensors
from gralora.maths.grouped import update_by_groups, update_of_each

Share = tuple[Tensors, float, float]
"""(tensors, scaling, dropout) of one active adapter; the scaling includes its weight."""


class EffectiveWeight:
    """The sum alone: of a kernel, for instance, whose products are not factored.

    Args:
        weight: W as the model stores it.
        shares: the active adapters.
    """

    by_layer: ClassVar[bool] = False
    """Whether products go through the layer, which knows about rows with adapters of their own and
    about sharded weights.
    """

    def __init__(self, weight: Tensor, shares: Sequence[Share] = ()) -> None:
        self.weight, self.shares = weight, shares

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What the sum is computed from: W, then the adapters' tensors."""
        return self.weight, *(t for own, _, _ in self.shares for t in own if t is not None)

    def in_layout(self, delta: Tensor) -> Tensor:
        """ΔW (..., out, in) in the layout of W."""
        raise NotImplementedError

    def evaluate(self, weight: Tensor, *tensors: Tensor) -> Tensor:
        """The sum in the shape of W, differentiable in the arguments: those of `parameters`."""
        left, deltas = iter(tensors), []
        for own, scaling, _ in self.shares:
            mine = cast(Tensors, tuple(t if t is None else next(left) for t in own))
            deltas.append(functional.delta_weight(*mine, scaling=scaling))
        return (weight + self.in_layout(sum(deltas[1:], start=deltas[0]))).to(weight.dtype)

    def transpose(self) -> EffectiveWeight:
        """The same with its last two axes swapped."""
        return TransposedWeight(self)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """F.linear(x, self, bias), of a matrix."""
        return None

    def bmm(self, x: Tensor) -> Tensor | None:
        """torch.bmm(x, self), of a stack of matrices."""
        return None

    def grouped(
        self, multiply: Callable[[Tensor], Tensor], x: Tensor, ends: Tensor
    ) -> Tensor | None:
        """multiply(self), of a stack: rows x (t, in) times their matrices (n, in, out).

        Args:
            multiply: a grouped product of x with the matrices that it is given.
            ends: for each matrix the end of its rows in x, cumulative.
        """
        return None

    def index(self, index: int | slice | Tensor) -> EffectiveWeight | None:
        """self[index], of a stack."""
        return None

    def embedding(self, tokens: Tensor, padding_idx: int | None) -> Tensor | None:
        """F.embedding(tokens, self, padding_idx)."""
        return None


class TransposedWeight(EffectiveWeight):
    """Another one with its last two axes swapped; a product that swaps them again finds it."""

    def __init__(self, inner: EffectiveWeight) -> None:
        super().__init__(inner.weight.mT)
        self.inner = inner

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.inner.parameters

    def evaluate(self, weight: Tensor, *tensors: Tensor) -> Tensor:
        return self.inner.evaluate(weight, *tensors).mT

    def transpose(self) -> EffectiveWeight:
        return self.inner


class MatrixWeight(EffectiveWeight):
    """Of one map: (out, in), or (in, out) if `transposed`."""

    def __init__(self, weight: Tensor, shares: Sequence[Share], transposed: bool = False) -> None:
        super().__init__(weight, shares)
        self.transposed = transposed

    def in_layout(self, delta: Tensor) -> Tensor:
        return delta.mT if self.transposed else delta

    def transpose(self) -> EffectiveWeight:
        turned = copy(self)
        turned.weight, turned.transposed = self.weight.mT, not self.transposed
        return turned

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        shares = swapped(self.shares) if self.transposed else self.shares
        if not autograd.usable(x, shares[0][0][0]):
            y = F.linear(x, self.weight, bias)
            for tensors, scaling, dropout in shares:
                own = x.to(tensors[0].dtype)
                update = functional.gralora_update(own, *tensors, scaling=scaling, dropout=dropout)
                y = (y + update).to(y.dtype)
            return y
        first, *more = shares
        y = autograd.linear_with_adapter(x, self.weight, bias, *first)
        for share in more:
            y = autograd.add_adapter_(y, x, *share)
        return y


class ExpertsWeight(MatrixWeight):
    """Of n maps, each with adapters of its own: (n, out, in), or (n, in, out) if `transposed`."""

    def __init__(self, weight: Tensor, shares: Sequence[Share], transposed: bool = False) -> None:
        super().__init__(weight, shares, transposed)
        self.apart: list[list[Tensors]] = []  # a transposed copy has the same list

    def linear(self, x: Tensor, bias: Tensor | None) -> None:
        return None

    def bmm(self, x: Tensor) -> Tensor:
        y = torch.bmm(x, self.weight)
        for tensors, scaling, dropout in self._from_rows():
            y = y + update_of_each(x, tensors, scaling, dropout).to(y.dtype)
        return y

    def grouped(self, multiply: Callable[[Tensor], Tensor], x: Tensor, ends: Tensor) -> Tensor:
        y, last = multiply(self.weight), ends.tolist()
        counts = [end - start for start, end in zip([0, *last], last, strict=False)]
        for tensors, scaling, dropout in self._from_rows():
            y = y + update_by_groups(x, counts, tensors, scaling, dropout).to(y.dtype)
        return y

    def index(self, index: int | slice | Tensor) -> EffectiveWeight:
        if not isinstance(index, int):
            picked = [tuple(t if t is None else t[index] for t in own) for own, _, _ in self.shares]
            return ExpertsWeight(self.weight[index], self._with(picked), self.transposed)
        if not self.apart:  # once: each time would cost a gradient of all of A and B
            self.apart.extend(each(tensors) for tensors, _, _ in self.shares)
        own = [tensors[index] for tensors in self.apart]
        return MatrixWeight(self.weight[index], self._with(own), self.transposed)

    def _with(self, tensors: Sequence[tuple[Tensor | None, ...]]) -> list[Share]:
        return [
            (cast(Tensors, own), scaling, dropout)
            for own, (_, scaling, dropout) in zip(tensors, self.shares, strict=True)
        ]

    def _from_rows(self) -> Sequence[Share]:
        """The adapters for x @ self[n]."""
        return self.shares if self.transposed else swapped(self.shares)


class UnreadableWeight(EffectiveWeight):
    """A weight that has no one value in this process, or for this batch.

    Products that go through the layer are possible; all that needs the sum raises `reason`.
    """

    def __init__(self, inner: EffectiveWeight, reason: str) -> None:
        super().__init__(inner.weight, inner.shares)
        self.inner, self.reason = inner, reason

    def evaluate(self, weight: Tensor, *tensors: Tensor) -> Tensor:
        raise ValueError(self.reason)

    def transpose(self) -> EffectiveWeight:
        return UnreadableWeight(self.inner.transpose(), self.reason)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        return self.inner.linear(x, bias) if self.inner.by_layer else None

    def embedding(self, tokens: Tensor, padding_idx: int | None) -> Tensor | None:
        return self.inner.embedding(tokens, padding_idx) if self.inner.by_layer else None


def swapped(shares: Sequence[Share]) -> list[Share]:
    """The adapters of the transposed maps: A and B change roles."""
    found = []
    for (A, B, A_general, B_general), scaling, dropout in shares:
        turned = tuple(None if t is None else t.mT for t in (B, A, B_general, A_general))
        found.append((cast(Tensors, turned), scaling, dropout))
    return found
