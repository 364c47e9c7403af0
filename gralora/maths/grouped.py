"""Rows that lie grouped by the adapter that they go through: the experts of a mixture, each with a
pair of its own.

One `torch.autograd.Function` over all groups, in which each group runs the products of `autograd`
on its own rows. A, B and their gradients are touched once, however many groups there are; what is
kept for backward is x, and z of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor

from gralora.maths import functional
from gralora.maths.autograd import _blocks, _drop, _masked, _product, _regroup
from gralora.maths.functional import Tensors


def update_by_groups(
    x: Tensor, counts: Sequence[int], tensors: Tensors, scaling: float, dropout: float
) -> Tensor:
    """The updates of rows that lie grouped: the first counts[0] rows through the first adapter, and
    so on.

    Args:
        x: (rows, in). Rows behind the last group get zero.
        tensors: with a leading axis of groups.

    Returns:
        (rows, out), in the adapters' dtype.
    """
    return cast(Tensor, _Groups.apply(x, tuple(counts), scaling, dropout, *tensors))  # type: ignore[no-untyped-call]


def update_of_each(x: Tensor, tensors: Tensors, scaling: float, dropout: float) -> Tensor:
    """x (n, t, in), each of the n through an adapter of its own -> (n, t, out), in the adapters'
    dtype.
    """
    A, B, A_general, B_general = tensors
    x = x.to(A.dtype)
    blocks = rearrange(functional.dropped(x, dropout), "n t (i m) -> n t i m", i=A.shape[1])
    z = einsum(blocks, A, "n t i m, n i m r -> n t i r")
    z = rearrange(z, "n t i (j s) -> n t j (i s)", j=B.shape[1])
    y = rearrange(einsum(z, B, "n t j r, n j r o -> n t j o"), "n t j o -> n t (j o)")
    if A_general is not None and B_general is not None:
        y = y + functional.dropped(x, dropout) @ A_general.mT @ B_general.mT
    return y * scaling


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, counts, scaling, dropout, A, B, A_general, B_general = args
        keep = 1.0 - dropout
        own = x.to(A.dtype)
        dropped, mask = _drop(own, keep)
        dropped_general, mask_general = _drop(own, keep) if A_general is not None else (own, None)
        out: Tensor = own.new_zeros(len(x), B.shape[1] * B.shape[3])
        zs, zs_general = [], []
        for g, rows in _groups(counts):
            zs.append(_regroup(torch.bmm(_blocks(dropped[rows], A.shape[1]), A[g])))
            _blocks(out[rows], B.shape[1]).baddbmm_(zs[-1], B[g], beta=0, alpha=scaling / keep)
            if A_general is not None:
                zs_general.append(dropped_general[rows] @ A_general[g].t())
                out[rows].addmm_(zs_general[-1], B_general[g].t(), alpha=scaling / keep)
        need_z = ctx.needs_input_grad[5] or ctx.needs_input_grad[7]
        ctx.save_for_backward(
            x,
            A,
            B,
            A_general,
            B_general,
            mask,
            mask_general,
            *(zs if need_z else ()),
            *(zs_general if need_z else ()),
        )
        ctx.counts, ctx.scaling, ctx.dropout = counts, scaling, dropout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, A, B, A_general, B_general, mask, mask_general, *zs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _backward_of_plain(
                ctx, grads[0], x, (A, B, A_general, B_general), mask, mask_general
            )
        (grad,) = grads
        need_x, *_, need_A, need_B, need_A_general, need_B_general = ctx.needs_input_grad
        scaling, (k, m) = ctx.scaling / (1.0 - ctx.dropout), (A.shape[1], A.shape[2])
        grad, own = grad.to(A.dtype), x.to(A.dtype)
        dropped, dropped_general = _masked(own, mask), _masked(own, mask_general)
        grad_x = grad.new_zeros(len(x), k * m) if need_x else None
        grad_A, grad_B = (
            torch.zeros_like(t) if need else None for t, need in ((A, need_A), (B, need_B))
        )
        general = ((A_general, need_A_general), (B_general, need_B_general))
        grad_down, grad_up = (
            torch.zeros_like(t) if need and t is not None else None for t, need in general
        )
        for index, (g, rows) in enumerate(_groups(ctx.counts)):
            blocks = _blocks(grad[rows], k)
            if grad_B is not None:
                grad_B[g] = _product(zs[index].mT, blocks, scaling)
            if grad_A is not None or grad_x is not None:
                grad_z = _regroup(_product(blocks, B[g].mT, scaling))
                if grad_A is not None:
                    grad_A[g] = torch.bmm(_blocks(dropped[rows], k).mT, grad_z)
                if grad_x is not None:
                    _blocks(grad_x[rows], k).baddbmm_(grad_z, A[g].mT, beta=0)
                    if mask is not None:
                        grad_x[rows].mul_(mask[rows])
            if A_general is not None:
                if grad_up is not None:
                    grad_up[g] = _product(grad[rows].t(), zs[len(zs) // 2 + index], scaling)
                grad_z = _product(grad[rows], B_general[g], scaling)
                if grad_down is not None:
                    grad_down[g] = grad_z.t() @ dropped_general[rows]
                if grad_x is not None:
                    grad_x[rows].add_(
                        _masked(
                            grad_z @ A_general[g],
                            None if mask_general is None else mask_general[rows],
                        )
                    )
        return (
            None if grad_x is None else grad_x.to(x.dtype),
            None,
            None,
            None,
            grad_A,
            grad_B,
            grad_down,
            grad_up,
        )


def _groups(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """(group, its rows) of those that have any."""
    found, start = [], 0
    for g, count in enumerate(counts):
        if count:
            found.append((g, slice(start, start + count)))
        start += count
    return found


def _backward_of_plain(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    tensors: Tensors,
    mask: Tensor | None,
    mask_general: Tensor | None,
) -> Any:
    """The same gradients through the definition, for a caller who wants to differentiate them
    again.
    """
    scaling, own = ctx.scaling / (1.0 - ctx.dropout), x.to(tensors[0].dtype)
    parts = []
    for g, rows in _groups(ctx.counts):
        A, B, A_general, B_general = (None if t is None else t[g] for t in tensors)
        part = functional.gralora_update(
            _masked(own, mask)[rows], cast(Tensor, A), cast(Tensor, B), scaling=scaling
        )
        if A_general is not None and B_general is not None:
            part = part + _masked(own, mask_general)[rows] @ A_general.t() @ B_general.t() * scaling
        parts.append(part)
    y = torch.cat(parts)
    inputs = (x, None, None, None, *tensors)
    needed = {i: t for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i]}
    found = torch.autograd.grad(
        y, list(needed.values()), grad[: len(y)], create_graph=True, allow_unused=True
    )
    by_index = dict(zip(needed, found, strict=True))
    return tuple(by_index.get(i) for i in range(len(inputs)))
