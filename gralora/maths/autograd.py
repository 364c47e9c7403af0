"""The fast path: base product and adapter as one `torch.autograd.Function`, with as few kernels as
the shapes allow.

The same function as `functional.gralora_update` beside the base layer; that one is the definition,
and serves wherever `usable` says no. What is gained here: the update is accumulated straight into
the strided view of the output, and of the input's gradient; the scale is the `alpha` of a product;
for backward x is kept as it came, shared between the layers that read it, beside the regrouped z
and a bool mask per dropout draw.

Axes as in `functional`; views of blocks carry the token axis `t` in the middle: "t (k m) -> k t m".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gralora.maths import functional
from gralora.maths.functional import Tensors
from gralora.torch_internals import (
    any_autocast_enabled,
    functorch_active,
    get_tracing_state,
    in_forward_ad,
    storage_use_count,
)

_PLAIN = (Tensor, torch.nn.Parameter)


class Saved(NamedTuple):
    """What backward needs beside x and the parameters, all of it small."""

    z: Tensor | None  # (j, t, i s): regrouped
    z_general: Tensor | None  # (t, h)
    mask: Tensor | None  # (t, in), bool
    mask_general: Tensor | None


def eager() -> bool:
    """Whether a Function can serve: not under compilation, export and tracing, `torch.func` and
    forward-mode AD.
    """
    return (
        not torch.compiler.is_compiling()
        and not functorch_active()
        and not in_forward_ad()
        and get_tracing_state() is None
    )


def usable(x: Tensor, A: Tensor) -> bool:
    """Whether the fast path serves here: on plain tensors, where a Function can."""
    return (
        type(x) in _PLAIN
        and type(A) in _PLAIN
        and eager()
        and x.layout is torch.strided
        and not x.is_nested
        and x.numel() > 0
    )


def linear_with_adapter(
    x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Tensors, scaling: float, dropout: float
) -> Tensor:
    """x @ weightᵀ + bias + update, weight (out, in) of any strides; in the dtype of the base
    product.
    """
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
        tensors = _cast(tensors, dtype)
    if not (dropout or torch.is_grad_enabled()) and x.dtype is weight.dtype is tensors[0].dtype:
        y = F.linear(x, weight, bias)  # what is below comes to the same, and asks more on the way
        y = y if y.is_contiguous() else y.contiguous()
        _add_(y, x, *tensors, scaling)
        return y
    return _run(None, x, weight, bias, tensors, scaling, dropout)


def add_adapter_(y: Tensor, x: Tensor, tensors: Tensors, scaling: float, dropout: float) -> Tensor:
    """y + update, into y itself where nobody else holds its memory."""
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, tensors = x.to(dtype), _cast(tensors, dtype)
    alone = sys.getrefcount(y) <= _ALONE and storage_use_count(y) <= _STORAGE_ALONE
    if not alone or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    return _run(y, x, None, None, tensors, scaling, dropout)


def updates_of_groups(
    x: Tensor, counts: Sequence[int], groups: Sequence[tuple[Tensors, float]]
) -> Tensor:
    """The updates for rows of `x` (rows, ..., in) that lie grouped by adapter, without gradients:
    (rows, ..., out).

    Args:
        counts: how many rows each of `groups`, (tensors, scaling), has.
    """
    flat = _rows(x)
    each = len(flat) // len(x)
    B = groups[0][0][1]
    update = flat.new_empty(len(flat), B.shape[0] * B.shape[2], dtype=B.dtype)
    start = 0
    for count, ((A, B, A_general, B_general), scaling) in zip(counts, groups, strict=True):
        own = flat[start : start + count * each].to(A.dtype)
        out = update[start : start + count * each]
        z = _regroup(torch.bmm(_blocks(own, len(A)), A))
        _blocks(out, len(B)).baddbmm_(z, B, beta=0, alpha=scaling)
        if A_general is not None and B_general is not None:
            out.addmm_(own @ A_general.t(), B_general.t(), alpha=scaling)
        start += count * each
    return update.view(*x.shape[:-1], -1)


def _references(y: Tensor, *_: Any) -> int:
    return sys.getrefcount(y)


def _count_alone() -> tuple[int, int]:
    # counted in a call of the very form in which `GraloraLayer.forward` calls: the numbers differ
    # between Pythons
    y = torch.empty(1)
    return _references(y, *(None, None)), storage_use_count(y)


_ALONE, _STORAGE_ALONE = _count_alone()


def _run(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Tensors,
    scaling: float,
    dropout: float,
) -> Tensor:
    inputs = (y, x, weight, bias, *tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return cast(Tensor, _Function.apply(*inputs, scaling, dropout))  # type: ignore[no-untyped-call]
    return _forward(y, x, weight, bias, tensors, scaling, dropout)[0]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, x, weight, bias, *tensors, scaling, dropout = args
        out, saved = _forward(y, x, weight, bias, tuple(tensors), scaling, dropout)
        if y is not None:
            ctx.mark_dirty(y)
        elif (
            out._is_view()
        ):  # as of three axes; autograd forbids in-place edits of a view that a Function returns
            out = out.detach()
        _, _, need_weight, need_bias, need_A, need_B, need_A_general, need_B_general = (
            ctx.needs_input_grad[:8]
        )
        # a frozen adapter asks nothing of x, so x may be edited in place, as it may after a frozen
        # layer
        kept = x if need_A or need_B or need_weight or need_A_general or need_B_general else None
        z, z_general = saved.z if need_B else None, saved.z_general if need_B_general else None
        masks = saved.mask, saved.mask_general
        ctx.save_for_backward(
            kept, weight, bias if need_bias else None, *tensors, z, z_general, *masks
        )
        ctx.shape, ctx.dtype, ctx.scaling, ctx.dropout = x.shape, x.dtype, scaling, dropout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight, bias, A, B, A_general, B_general, *saved = ctx.saved_tensors
        tensors = (A, B, A_general, B_general)
        # with gradients on, the caller means to differentiate the result again
        backward = _backward_of_plain if torch.is_grad_enabled() else _backward
        found = backward(ctx, grad, x, weight, bias, tensors, Saved(*saved))
        return (grad if ctx.needs_input_grad[0] else None, *found, None, None)


def _forward(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Tensors,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Saved]:
    A, B, A_general, B_general = tensors
    if y is None:
        assert weight is not None
        y = F.linear(x, weight, bias).contiguous()
    keep = 1.0 - dropout
    scaling = scaling / keep
    k, dtype = A.shape[0], A.dtype
    direct = dtype == y.dtype
    own = _in(x, dtype)
    own = own if keep == 1.0 else _rows(own)  # as backward wants its masks
    dropped, mask = _drop(own, keep)
    if mask is None and direct:
        z, z_general = _add_(y, own, A, B, A_general, B_general, scaling)
        return y, Saved(z, z_general, None, None)
    z = _regroup(torch.bmm(_blocks(dropped, k), A))
    z_general = mask_general = None
    if A_general is not None:
        dropped, mask_general = _drop(own, keep)
        z_general = _rows(dropped) @ A_general.t()
    del own, dropped  # may be copies of x; what follows is as large
    # where the types differ, the update is built in the adapter's and added once, so rounded once
    update = y if direct else torch.empty_like(y, dtype=dtype)
    _blocks(update, k).baddbmm_(z, B, beta=1 if direct else 0, alpha=scaling)
    if z_general is not None and B_general is not None:
        update.view(-1, update.shape[-1]).addmm_(z_general, B_general.t(), alpha=scaling)
    if not direct:
        y.add_(update)
    return y, Saved(z, z_general, mask, mask_general)


def _add_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """y += update, of one type with everything; returns z and z_general."""
    k = A.shape[0]
    z, z_general = _regroup(torch.bmm(_blocks(x, k), A)), None
    _blocks(y, k).baddbmm_(z, B, alpha=scaling)
    if A_general is not None and B_general is not None:
        z_general = _rows(x) @ A_general.t()
        y.view(-1, y.shape[-1]).addmm_(z_general, B_general.t(), alpha=scaling)
    return z, z_general


class _Needs(NamedTuple):
    """Which gradients are asked for."""

    y: bool
    x: bool
    weight: bool
    bias: bool
    A: bool
    B: bool
    A_general: bool
    B_general: bool


def _backward(
    ctx: Any,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Tensors,
    saved: Saved,
) -> tuple[Tensor | None, ...]:
    needs = _Needs(*ctx.needs_input_grad[:8])
    scaling = ctx.scaling / (1.0 - ctx.dropout)
    g, x = _rows(grad), None if x is None else _rows(x)
    # first all that reads the output's gradient, then all that reads x: copies in the adapter's
    # type live briefly
    grad_B, grad_z, grad_B_general, grad_z_general = _output_side(g, tensors, saved, scaling, needs)
    grad_A = grad_A_general = grad_x = None
    if x is not None and (needs.A or needs.A_general):
        own = _in(x, tensors[0].dtype)
        if needs.A and grad_z is not None:
            blocks = _blocks(_masked(own, saved.mask), tensors[0].shape[0])
            grad_A = _tall_product(blocks, grad_z)
            del blocks
        if needs.A_general and grad_z_general is not None:
            grad_A_general = grad_z_general.t() @ _masked(own, saved.mask_general)
        del own
    if needs.x and grad_z is not None:
        grad_x = None if weight is None else g @ weight
        grad_x = _add_input_grad(grad_x, ctx.dtype, tensors, grad_z, grad_z_general, saved)
        grad_x = grad_x if len(ctx.shape) == 2 else grad_x.view(ctx.shape)
    grad_weight = g.t() @ x if needs.weight and x is not None else None
    grad_bias = g.sum(0) if needs.bias else None
    return grad_x, grad_weight, grad_bias, grad_A, grad_B, grad_A_general, grad_B_general


def _output_side(
    g: Tensor, tensors: Tensors, saved: Saved, scaling: float, needs: _Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of B, z, B_general and z_general."""
    _, B, _, B_general = tensors
    grad_B = grad_z = grad_B_general = grad_z_general = None
    own = _in(g, B.dtype)
    blocks = _blocks(own, B.shape[0])
    if needs.B and saved.z is not None:
        grad_B = _product(saved.z.mT, blocks, scaling)
    if needs.A or needs.x:
        grad_z = _regroup(_product(blocks, B.mT, scaling))
    if B_general is not None:
        if needs.B_general and saved.z_general is not None:
            grad_B_general = _product(own.t(), saved.z_general, scaling)
        if needs.A_general or needs.x:
            grad_z_general = _product(own, B_general, scaling)
    return grad_B, grad_z, grad_B_general, grad_z_general


def _add_input_grad(
    grad_x: Tensor | None,
    dtype: torch.dtype,
    tensors: Tensors,
    grad_z: Tensor,
    grad_z_general: Tensor | None,
    saved: Saved,
) -> Tensor:
    """The adapter's part of the input's gradient, into the base's part where the types agree and
    nothing was dropped.
    """
    A, _, A_general, _ = tensors
    direct = grad_x is not None and grad_x.dtype == A.dtype and saved.mask is None
    k, m, _ = A.shape
    update = grad_x if direct and grad_x is not None else grad_z.new_empty(grad_z.shape[1], k * m)
    _blocks(update, k).baddbmm_(grad_z, A.mT, beta=1 if direct else 0)
    if saved.mask is not None:
        update.mul_(saved.mask)
    if A_general is not None and grad_z_general is not None:
        if saved.mask_general is None:
            update.addmm_(grad_z_general, A_general)
        else:
            update.add_((grad_z_general @ A_general).mul_(saved.mask_general))
    if direct:
        return update
    return update.to(dtype) if grad_x is None else grad_x.add_(update)


def _backward_of_plain(
    ctx: Any,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tensors: Tensors,
    saved: Saved,
) -> tuple[Tensor | None, ...]:
    """The same gradients through the definition, for a caller who wants to differentiate them
    again.
    """
    keep = 1.0 - ctx.dropout
    if x is None:  # not kept, as the gradient asked for does not depend on it
        x = grad.new_zeros(ctx.shape, dtype=ctx.dtype).requires_grad_()
    own = x.to(tensors[0].dtype)
    dropped = own if saved.mask is None else own * saved.mask.view(x.shape)
    update = functional.gralora_update(dropped, *tensors[:2], scaling=ctx.scaling / keep)
    if tensors[2] is not None and tensors[3] is not None:
        dropped = own if saved.mask_general is None else own * saved.mask_general.view(x.shape)
        update = update + F.linear(F.linear(dropped, tensors[2]), tensors[3]) * (ctx.scaling / keep)
    y = update.to(grad.dtype)
    if weight is not None:
        y = y + F.linear(x, weight, bias)
    inputs = (x, weight, bias, *tensors)
    needed = {i: t for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[i + 1]}
    found = dict(
        zip(
            needed,
            torch.autograd.grad(y, list(needed.values()), grad, create_graph=True),
            strict=True,
        )
    )
    return tuple(found.get(i) for i in range(len(inputs)))


def _rows(x: Tensor) -> Tensor:
    """(..., n) -> (t, n)"""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def _blocks(x: Tensor, k: int) -> Tensor:
    """ "... (k m) -> k t m", a view of what is contiguous, in one call: a layer of few tokens is
    made of its calls.
    """
    n = x.shape[-1]
    if not x.is_contiguous():
        return x.reshape(-1, k, n // k).transpose(0, 1)
    return x.as_strided((k, x.numel() // n, n // k), (n // k, n, 1))


def _regroup(z: Tensor) -> Tensor:
    """ "i t (j s) -> j t (i s)", one copy; its own inverse."""
    k, t, r = z.shape
    s = r // k
    return z.as_strided((k, t, k, s), (s, r, t * r, 1)).reshape(k, t, r)


def _product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a @ b in one kernel."""
    if a.dim() == 2:
        return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


def _tall_product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ @ b over many tokens. A CPU is up to twice as fast at bᵀ @ a where b is narrow; the copy
    back is small.
    """
    if a.shape[1] < 256 or a.device.type != "cpu":
        return torch.bmm(a.mT, b)
    return torch.bmm(b.mT, a).mT.contiguous()


def _drop(x: Tensor, keep: float) -> tuple[Tensor, Tensor | None]:
    """(x with entries dropped, mask), not yet divided by `keep`. The draws are those of
    `F.dropout`.
    """
    if keep == 1.0:
        return x, None
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(keep)
    return x * mask, mask


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    if (
        not any_autocast_enabled()
    ):  # asked for on every call, and five times as fast as what follows
        return None
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    A, B, A_general, B_general = tensors
    if A_general is None or B_general is None:
        return A.to(dtype), B.to(dtype), None, None
    return A.to(dtype), B.to(dtype), A_general.to(dtype), B_general.to(dtype)
