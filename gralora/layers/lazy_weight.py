"""A weight that acts without being computed: W + Σ weight * ΔW, as whoever reads the weight of an
adapted map gets it.

Some code never calls a layer but reads its weight and applies it: heads under a fused loss, vision
transformers that put a bias together at run time, kernels that take all weights of a block. They
get a tensor that stands for the sum. Applied as a linear map it gives the base product plus the
adapters' own; transposed it stays what it is; its attributes are W's; anything else computes the
sum, once, and goes on with it. What takes it past Python's overrides (a custom `autograd.Function`,
an operator in C++) finds the sum as well, and gradients find their way to A and B.

Who calls the layer never meets one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gralora.layers.stand_in import HANDLERS, Form, UnevaluatedWeight, bare, read, stands
from gralora.layers.sums import Sum


def unevaluated(sum: Sum) -> Any:
    """A tensor that stands for `sum`, and looks like its W."""
    weight = sum.parameters[0]
    return read(sum, Form(tuple(weight.shape), tuple(weight.stride()), weight.dtype, weight.device))


def _turned(weight: UnevaluatedWeight) -> Any:
    """The transposed matrix, or matrices."""
    sum, form = weight.sum_, weight.form
    other = sum.other
    turned = sum._replace(
        evaluate=lambda *parameters: sum.evaluate(*parameters).mT,
        transposed=not sum.transposed,
        # what is turned once more is taken the other way round as well
        other=None if other is None else lambda: other()._replace(transposed=sum.transposed),
        look_up=None,
    )
    *axes, first, second = range(len(form.shape))
    order = (*axes, second, first)
    form = form._replace(
        shape=tuple(form.shape[i] for i in order), stride=tuple(form.stride[i] for i in order)
    )
    return read(turned, form) if weight.attached else UnevaluatedWeight(turned, form, False)


def _transpose(weight: Any, *axes: int, **named: int) -> Any:
    if not isinstance(weight, UnevaluatedWeight):
        return NotImplemented
    count = len(weight.form.shape)
    last = {axis % count for axis in (*axes, *named.values())} == {count - 2, count - 1}
    return _turned(weight) if last else NotImplemented


def _t(weight: Any) -> Any:
    return _turned(weight) if len(weight.form.shape) == 2 else NotImplemented


def _chosen(weight: Any, index: Any) -> Any:
    """W[index]: one of many maps, or those of a tensor of indices; of one map, whole blocks of its
    rows or columns.
    """
    stack = _asked(weight, "stack")
    if stack is None:
        return _cut_out(weight, index)
    if isinstance(index, slice):
        index = torch.arange(*index.indices(weight.form.shape[0]), device=weight.form.device)
    if isinstance(index, Tensor) and (
        index.is_floating_point() or index.dtype is torch.bool or index.dim() > 1
    ):
        return NotImplemented
    if isinstance(index, Tensor) and index.dim() == 1:
        sum = stack.some(index)
    elif isinstance(index, (int, Tensor)) and not isinstance(index, bool):
        sum = stack.one(range(weight.form.shape[0])[int(index)])
    else:
        return NotImplemented
    return _in_layout_of(weight, sum)


def _asked(weight: Any, what: str) -> Any:
    """What the sum can do; None if it can't, or is without its graph."""
    return (
        getattr(weight.sum_, what)
        if isinstance(weight, UnevaluatedWeight) and weight.attached
        else None
    )


def _in_layout_of(weight: UnevaluatedWeight, sum: Sum) -> Any:
    found = unevaluated(sum)
    return found if sum.transposed == weight.sum_.transposed else _turned(found)


def _cut_out(weight: Any, index: Any) -> Any:
    if _asked(weight, "part") is None:
        return NotImplemented
    for axis, each in enumerate(index if isinstance(index, tuple) else (index,)):
        if (
            not isinstance(each, slice)
            or axis >= len(weight.form.shape)
            or each.step not in (None, 1)
        ):
            return NotImplemented
        first, last, _ = each.indices(weight.form.shape[axis])
        found = (
            weight
            if (first, last) == (0, weight.form.shape[axis])
            else _narrow(weight, axis, first, last - first)
        )
        if found is NotImplemented:
            return NotImplemented
        weight = found
    return weight


def _narrow(weight: Any, dim: int, start: Any, length: int) -> Any:
    part, first = _asked(weight, "part"), int(start)
    if part is None:
        return NotImplemented
    sum = part(first, first + length, (dim % len(weight.form.shape) == 1) != weight.sum_.transposed)
    return NotImplemented if sum is None else _in_layout_of(weight, sum)


def _split(weight: Any, size: Any, dim: int = 0) -> Any:
    count = weight.form.shape[dim]
    sizes = (
        [min(size, count - first) for first in range(0, count, size)]
        if isinstance(size, int)
        else list(size)
    )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = [
        _narrow(weight, dim, start, length) for start, length in zip(starts, sizes, strict=True)
    ]
    return (
        NotImplemented
        if any(part is NotImplemented for part in found) or sum(sizes) != count
        else tuple(found)
    )


def _chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    return _split(weight, -(-weight.form.shape[dim] // chunks), dim)


def _index_select(weight: Any, dim: int, index: Tensor) -> Any:
    return _chosen(weight, index) if dim == 0 else NotImplemented


def _unbound(weight: Any, dim: int = 0) -> Any:
    if _asked(weight, "stack") is None or dim != 0:
        return NotImplemented
    return tuple(_chosen(weight, index) for index in range(weight.form.shape[0]))


def _iterated(weight: Any) -> Any:
    found = _unbound(weight)
    return found if found is NotImplemented else iter(found)


def _bmm(x: Any, other: Any) -> Any:
    turned = stands(x)
    weight, x = (x, other) if turned else (other, x)
    if (
        not isinstance(weight, UnevaluatedWeight)
        or not isinstance(x, Tensor)
        or stands(x)
        or x.dim() != 3
    ):
        return NotImplemented
    sum = weight.sum_.as_(not turned)
    if sum is None or sum.stack is None or not weight.attached or not _types_fit(x, weight):
        return NotImplemented
    return sum.stack.each(x.mT).mT if turned else sum.stack.each(x)


def _baddbmm(
    bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Any:
    if beta != 1 or alpha != 1 or out is not None or not isinstance(bias, Tensor) or stands(bias):
        return NotImplemented
    result = _bmm(x, weight)
    return result if result is NotImplemented else bias + result


def _einsum(equation: Any, *operands: Any) -> Any:
    """Where it is one product of an input and a map, or of many inputs each with a map of its
    own.
    """
    if (
        not isinstance(equation, str)
        or equation.count("->") != 1
        or equation.count(",") != 1
        or len(operands) != 2
    ):
        return NotImplemented
    terms, out = equation.replace(" ", "").split("->")
    (a, x), (b, weight) = sorted(
        zip(terms.split(","), operands, strict=True), key=lambda each: stands(each[1])
    )
    kinds = [
        "".join(c for c in b if (c in a, c in out) == kind)
        for kind in ((True, True), (True, False), (False, True))
    ]
    own, summed, made = (
        kinds  # the letters of the maps, where there are many, of their inputs and of their outputs
    )
    known = isinstance(weight, UnevaluatedWeight) and len(b) == len(weight.form.shape) == len(
        "".join(kinds)
    )
    if (
        not known
        or len(summed) != 1
        or len(made) != 1
        or not b.startswith(own)
        or len(set(a)) != len(a.replace("..", ""))
    ):
        return NotImplemented
    rest = a.replace(summed, "")
    if not own:
        y = _product(_permuted(x, a, rest + summed), weight, None, transposed=b == summed + made)
    elif "." in rest:
        return NotImplemented
    else:
        rest = own + rest.replace(own, "")
        x = _permuted(x, a, rest + summed)
        y = _bmm(
            x.reshape(len(x), -1, x.shape[-1]),
            weight if b[1:] == summed + made else _turned(weight),
        )
        y = y if y is NotImplemented else y.reshape(*x.shape[:-1], y.shape[-1])
    return y if y is NotImplemented else _permuted(y, rest + made, out)


def _permuted(x: Tensor, letters: str, wanted: str) -> Tensor:
    return x if letters == wanted else torch.einsum(f"{letters}->{wanted}", x)


def _embedding(
    x: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: Any = None,
    *more: Any,
    **named: Any,
) -> Any:
    look_up = None if max_norm is not None else _asked(weight, "look_up")
    return NotImplemented if look_up is None else look_up(x, padding_idx)


def _grouped(func: Any, x: Any, weight: Any, **kwargs: Any) -> Any:
    sum = weight.sum_.as_(True) if isinstance(weight, UnevaluatedWeight) else None
    if sum is None or sum.stack is None or not weight.attached or stands(x) or x.dim() != 2:
        return NotImplemented
    if kwargs.get("offs") is None or x.dtype != weight.form.dtype:
        return NotImplemented
    return sum.stack.grouped(func, x, kwargs)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _product(x, weight, bias, transposed=False)


def _matmul(x: Any, other: Any) -> Any:
    weight = other if stands(other) else x
    if isinstance(weight, UnevaluatedWeight) and len(weight.form.shape) == 3:
        return _bmm(x, other)
    if stands(other):
        return _product(x, other, None, transposed=True)
    if isinstance(other, Tensor) and other.dim() == 2:  # W @ x is (xᵀ @ Wᵀ)ᵀ
        result = _product(other.mT, x, None, transposed=False)
        return result if result is NotImplemented else result.mT
    return NotImplemented


def _addmm(
    bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Any:
    if beta != 1 or alpha != 1 or out is not None or not isinstance(bias, Tensor):
        return NotImplemented
    if bias.dim() == 1:
        return _product(x, weight, bias, transposed=True)
    result = _product(x, weight, None, transposed=True)
    return result if result is NotImplemented else bias + result


def _product(x: Any, weight: Any, bias: Any, *, transposed: bool) -> Any:
    """x (..., in) through the map, if `weight` is one and is asked for in the layout in which it
    stands.
    """
    if (
        not isinstance(weight, UnevaluatedWeight)
        or stands(x)
        or stands(bias)
        or not isinstance(x, Tensor)
    ):
        return NotImplemented
    sum = weight.sum_.as_(transposed)
    if sum is None or sum.product is None or not weight.attached or x.dim() == 0:
        return NotImplemented
    return sum.product(x, bias) if _types_fit(x, weight) else NotImplemented


def _types_fit(x: Tensor, weight: UnevaluatedWeight) -> bool:
    """If not, PyTorch has the say."""
    return torch.is_autocast_enabled(x.device.type) or x.dtype == weight.form.dtype


def _to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    if any(map(stands, args)):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        probe = torch.empty(0, dtype=weight.form.dtype, device=weight.form.device).to(
            *args, **{**kwargs, "copy": False}
        )
    same = (probe.dtype, probe.device) == (
        weight.form.dtype,
        weight.form.device,
    ) and not kwargs.get("copy")
    return weight if same else NotImplemented


_TENSOR: Any = Tensor
_TABLE: dict[Any, Callable[..., Any]] = {
    "grouped_mm": _grouped,
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _baddbmm),
    torch.einsum: _einsum,
    F.embedding: _embedding,
    **dict.fromkeys((torch.t, Tensor.t, _TENSOR.T.__get__), _t),
    _TENSOR.mT.__get__: _turned,
    Tensor.__getitem__: _chosen,
    **dict.fromkeys((torch.index_select, Tensor.index_select), _index_select),
    **dict.fromkeys((torch.narrow, Tensor.narrow), _narrow),
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbound),
    Tensor.__iter__: _iterated,
    **dict.fromkeys(
        (torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes), _transpose
    ),
    **dict.fromkeys((torch.detach, Tensor.detach, _TENSOR.data.__get__), bare),
    Tensor.to: _to,
}
HANDLERS.update(_TABLE)
