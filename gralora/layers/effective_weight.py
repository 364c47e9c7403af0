"""W + Σ weight * ΔW, and what can be done with it while nobody has computed it.

A `Sum` is made where a weight is read (`base.py`, `experts.py`); the tensor that stands for it is
in `unevaluated.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from gralora.layers.adapter import each
from gralora.maths import autograd, functional
from gralora.maths.functional import Tensors
from gralora.maths.grouped import update_by_groups, update_of_each

Share = tuple[Tensors, float, float]
"""(tensors, scaling, dropout) of an adapter that acts, the scaling times its weight."""


class Sum(NamedTuple):
    """What an unevaluated weight stands for.

    Args:
        parameters: W as it is held, and the adapters' tensors.
        evaluate: the sum, in the shape of W, out of `parameters`, differentiably.
        product: x (..., in), bias -> x @ (W + ΔW)ᵀ + bias; None where W is no matrix.
        transposed: W is (in, out).
        stack: of W (n, out, in), many maps in one.
        other: the same, where W is taken for the transposed map, as in a decoder that uses its
            encoder's weight.
        part: (first, last, of the inputs?) -> the sum for these outputs, or inputs, alone; None
            where they are no whole blocks.
        look_up: indices (...), padding_idx -> their rows of the sum, as of an embedding.
    """

    parameters: tuple[Tensor, ...]
    evaluate: Callable[..., Tensor]
    product: Callable[[Tensor, Tensor | None], Tensor] | None
    transposed: bool
    stack: Stack | None = None
    other: Callable[[], Sum] | None = None
    part: Callable[[int, int, bool], Sum | None] | None = None
    look_up: Callable[[Tensor, int | None], Tensor] | None = None

    def as_(self, transposed: bool) -> Sum | None:
        """The same in the layout that is asked for: W (in, out) or (out, in)."""
        if self.transposed == transposed:
            return self
        return None if self.other is None else self.other()


class Stack(NamedTuple):
    """What can be done with many maps in one weight.

    Args:
        one: the map of an index.
        some: those of a tensor of indices, a stack again.
        each: x (n, t, in) -> (n, t, out), each of the n through its own.
        grouped: rows that lie grouped by map, with the function that multiplies them by weights (n,
            in, out), and its other arguments.
    """

    one: Callable[[int], Sum]
    some: Callable[[Tensor], Sum]
    each: Callable[[Tensor], Tensor]
    grouped: Callable[[Callable[..., Tensor], Tensor, dict[str, Any]], Tensor]


def evaluation(
    weight: Tensor, shares: list[Share], in_layout: Callable[[Tensor], Tensor]
) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """What a sum is computed from, and how; `in_layout` brings ΔW (..., out, in) into the layout of
    the weight.
    """

    def evaluate(weight: Tensor, *tensors: Tensor) -> Tensor:
        left, total = (
            iter(tensors),
            torch.zeros((), dtype=shares[0][0][0].dtype, device=weight.device),
        )
        for own, scaling, _ in shares:
            mine = cast(Tensors, tuple(t if t is None else next(left) for t in own))
            total = total + functional.delta_weight(*mine, scaling=scaling)
        return (weight + in_layout(total)).to(weight.dtype)

    return (weight, *(t for own, _, _ in shares for t in own if t is not None)), evaluate


def sum_of_one(weight: Tensor, shares: list[Share], transposed: bool) -> Sum:
    """Of one map (out, in), or (in, out) if `transposed`, which is no layer: an expert, a part of a
    layer.
    """
    matrix = weight.mT if transposed else weight

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        first, *more = shares
        square = all(len(A) == len(B) for (A, B, _, _), _, _ in shares)
        if not square or not autograd.usable(x, first[0][0]):
            y = F.linear(x, matrix, bias)
            for tensors, scaling, dropout in shares:
                own = x.to(tensors[0].dtype)
                y = (
                    y + functional.gralora_update(own, *tensors, scaling=scaling, dropout=dropout)
                ).to(y.dtype)
            return y
        y = autograd.linear_with_adapter(x, matrix, bias, *first)
        for rest in more:
            y = autograd.add_adapter_(y, x, *rest)
        return y

    parameters, evaluate = evaluation(weight, shares, _turn if transposed else _keep)
    return Sum(
        parameters,
        evaluate,
        product,
        transposed,
        other=lambda: sum_of_one(weight, swapped(shares), not transposed),
        part=lambda *which: part_of(weight, shares, transposed, *which),
    )


def part_of(
    weight: Tensor, shares: list[Share], transposed: bool, first: int, last: int, of_inputs: bool
) -> Sum | None:
    """Of the outputs, or inputs, from `first` to `last` alone; None where these are no whole blocks
    of every adapter.
    """
    parts = []
    for tensors, scaling, dropout in shares:
        blocks = tensors[0] if of_inputs else tensors[1]
        size = blocks.shape[1] if of_inputs else blocks.shape[2]
        if first % size or last % size or first == last:
            return None
        parts.append(
            (
                _blocks_of(tensors, slice(first // size, last // size), of_inputs, size),
                scaling,
                dropout,
            )
        )
    return sum_of_one(
        weight.narrow(int(of_inputs != transposed), first, last - first), parts, transposed
    )


def sum_of_many(weight: Tensor, shares: list[Share], transposed: bool) -> Sum:
    """Of maps (n, out, in), or (n, in, out) if `transposed`, with the adapters of each."""
    parameters, evaluate = evaluation(weight, shares, _turn if transposed else _keep)
    stack = _stack_of(weight, shares, transposed)
    return Sum(
        parameters,
        evaluate,
        None,
        transposed,
        stack,
        lambda: sum_of_many(weight, swapped(shares), not transposed),
    )


def swapped(shares: list[Share]) -> list[Share]:
    """The adapters of the transposed maps: A and B change roles."""
    return [
        (tuple(None if t is None else t.mT for t in (B, A, B_general, A_general)), scaling, dropout)  # type: ignore[misc]
        for (A, B, A_general, B_general), scaling, dropout in shares
    ]


def _stack_of(weight: Tensor, shares: list[Share], transposed: bool) -> Stack:
    apart: list[
        list[Tensors]
    ] = []  # taken apart once: each time would cost a gradient of all of A and B

    def one(index: int) -> Sum:
        if not apart:
            apart.extend(each(tensors) for tensors, _, _ in shares)
        own = [
            (tensors[index], share[1], share[2])
            for tensors, share in zip(apart, shares, strict=True)
        ]
        return sum_of_one(weight[index], own, transposed)

    def some(index: Tensor) -> Sum:
        picked = [
            cast(Tensors, tuple(None if t is None else t[index] for t in tensors))
            for tensors, _, _ in shares
        ]
        own = [(tensors, share[1], share[2]) for tensors, share in zip(picked, shares, strict=True)]
        return sum_of_many(weight[index], own, transposed)

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


def _blocks_of(tensors: Tensors, blocks: slice, of_inputs: bool, size: int) -> Tensors:
    """The tensors for some input blocks (rows of A), or some output blocks (rows of B)."""
    A, B, A_general, B_general = tensors
    own = slice(blocks.start * size, blocks.stop * size)
    if of_inputs:
        B = rearrange(
            rearrange(B, "j (i s) o -> j i s o", i=len(A))[:, blocks], "j i s o -> j (i s) o"
        )
        return A[blocks], B, None if A_general is None else A_general[:, own], B_general
    A = rearrange(
        rearrange(A, "i m (j s) -> i m j s", j=len(B))[:, :, blocks], "i m j s -> i m (j s)"
    )
    return A, B[blocks], A_general, None if B_general is None else B_general[own]


def _turn(delta: Tensor) -> Tensor:
    return delta.mT


def _keep(delta: Tensor) -> Tensor:
    return delta
