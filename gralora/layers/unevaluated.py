"""A weight that acts without being computed: W + Σ weight * ΔW, as whoever reads the weight of an adapted map gets it.

Some code never calls a layer but reads its weight and applies it: heads under a fused loss, vision transformers that put a
bias together at run time, kernels that take all weights of a block. They get a tensor that stands for the sum. Applied as
a linear map it gives the base product plus the adapters' own; transposed it stays what it is; its attributes are W's;
anything else computes the sum, once, and goes on with it. What takes it past Python's overrides (a custom
`autograd.Function`, an operator in C++) finds the sum as well, and gradients find their way to A and B.

Who calls the layer never meets one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from gralora.layers.sums import Sum


class Form(NamedTuple):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def unevaluated(sum: Sum) -> Any:
    """A tensor that stands for `sum`, and looks like its W."""
    weight = sum.parameters[0]
    return _read(sum, Form(tuple(weight.shape), tuple(weight.stride()), weight.dtype, weight.device))


class UnevaluatedWeight(Tensor):
    """See the text of this file."""

    sum_: Sum
    form: Form
    attached: bool
    computed: dict[bool, Tensor]

    @staticmethod
    def __new__(cls, sum: Sum, form: Form, attached: bool) -> UnevaluatedWeight:
        return Tensor._make_wrapper_subclass(cls, form.shape, strides=form.stride, dtype=form.dtype, device=form.device)

    def __init__(self, sum: Sum, form: Form, attached: bool) -> None:
        self.sum_, self.form, self.attached, self.computed = sum, form, attached, {}

    def dense(self) -> Tensor:
        """The sum, with its gradients where they are on."""
        graph = torch.is_grad_enabled() and self.attached
        if graph not in self.computed:
            with torch.set_grad_enabled(graph):
                self.computed[graph] = self.sum_.evaluate(*self.sum_.parameters)
        return self.computed[graph]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UnevaluatedWeight({self.dense()!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _OF_NO_EFFECT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if "grouped_mm" in name:  # whoever's it is: PyTorch's, or the fallback of transformers
            result = _grouped(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        edits = name in _EDITS or (name.endswith("_") and not name.endswith("__"))
        if (edits and (_stands(args[:1]) or any(map(_stands, kwargs.values())))) or _stands(kwargs.get("out")):
            raise RuntimeError(_EDITED)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return _bare(args[0])
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        if any(a.is_write and _stands(given.get(a.name)) for a in func._schema.arguments):
            raise RuntimeError(_EDITED)
        with torch.no_grad():
            return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))


class _Read(torch.autograd.Function):
    """The parameters to a tensor that stands for their sum; backward is for those who take it past our overrides."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        sum, form, *parameters = args
        ctx.save_for_backward(*parameters)
        ctx.evaluate = sum.evaluate
        return UnevaluatedWeight(sum, form, True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needed, again = ctx.needs_input_grad[2:], torch.is_grad_enabled()
        pairs = list(zip(ctx.saved_tensors, needed, strict=True))
        parameters = [p if again or not need else p.detach().requires_grad_() for p, need in pairs]
        with torch.enable_grad():
            total = ctx.evaluate(*parameters)
        wanted = [p for p, need in zip(parameters, needed, strict=True) if need]
        found = iter(torch.autograd.grad(total, wanted, grads[0], create_graph=again, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needed))


_EDITED = (
    "the weight of an adapted layer is edited in place while a forward runs, where it stands for W + ΔW and not for itself. "
    "Edit it outside of any forward, or in the layer's own."
)
_EDITS = {"__set__", "__delete__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}


def _read(sum: Sum, form: Form) -> Tensor:
    return _Read.apply(sum, form, *sum.parameters)  # type: ignore[no-any-return, no-untyped-call]


def _stands(value: object) -> bool:
    return isinstance(value, UnevaluatedWeight) or (isinstance(value, (tuple, list)) and any(map(_stands, value)))


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, UnevaluatedWeight) else value


def _bare(weight: UnevaluatedWeight) -> Tensor:
    """The same without a graph."""
    return UnevaluatedWeight(weight.sum_, weight.form, False)


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
    form = form._replace(shape=tuple(form.shape[i] for i in order), stride=tuple(form.stride[i] for i in order))
    return _read(turned, form) if weight.attached else UnevaluatedWeight(turned, form, False)


def _transpose(weight: Any, *axes: int, **named: int) -> Any:
    if not isinstance(weight, UnevaluatedWeight):
        return NotImplemented
    count = len(weight.form.shape)
    last = {axis % count for axis in (*axes, *named.values())} == {count - 2, count - 1}
    return _turned(weight) if last else NotImplemented


def _t(weight: Any) -> Any:
    return _turned(weight) if len(weight.form.shape) == 2 else NotImplemented


def _chosen(weight: Any, index: Any) -> Any:
    """W[index]: one of many maps, or those of a tensor of indices; of one map, whole blocks of its rows or columns."""
    if not isinstance(weight, UnevaluatedWeight) or not weight.attached:
        return NotImplemented
    stack = weight.sum_.stack
    if stack is None:
        return _cut_out(weight, index)
    if isinstance(index, slice):
        index = torch.arange(*index.indices(weight.form.shape[0]), device=weight.form.device)
    if isinstance(index, Tensor) and (index.is_floating_point() or index.dtype is torch.bool or index.dim() > 1):
        return NotImplemented
    if isinstance(index, Tensor) and index.dim() == 1:
        sum = stack.some(index)
    elif isinstance(index, (int, Tensor)) and not isinstance(index, bool):
        sum = stack.one(range(weight.form.shape[0])[int(index)])
    else:
        return NotImplemented
    return _in_layout_of(weight, sum)


def _in_layout_of(weight: UnevaluatedWeight, sum: Sum) -> Any:
    found = unevaluated(sum)
    return found if sum.transposed == weight.sum_.transposed else _turned(found)


def _cut_out(weight: UnevaluatedWeight, index: Any) -> Any:
    for axis, each in enumerate(index if isinstance(index, tuple) else (index,)):
        if not isinstance(each, slice) or axis >= len(weight.form.shape) or each.step not in (None, 1):
            return NotImplemented
        first, last, _ = each.indices(weight.form.shape[axis])
        found = weight if (first, last) == (0, weight.form.shape[axis]) else _narrow(weight, axis, first, last - first)
        if found is NotImplemented:
            return NotImplemented
        weight = found
    return weight


def _narrow(weight: Any, dim: int, start: Any, length: int) -> Any:
    if not isinstance(weight, UnevaluatedWeight) or weight.sum_.part is None or not weight.attached or _stands(start):
        return NotImplemented
    first, axis = int(start), dim % len(weight.form.shape)
    sum = weight.sum_.part(first, first + length, (axis == 1) != weight.sum_.transposed)
    return NotImplemented if sum is None else _in_layout_of(weight, sum)


def _split(weight: Any, size: Any, dim: int = 0) -> Any:
    count = weight.form.shape[dim]
    sizes = [min(size, count - first) for first in range(0, count, size)] if isinstance(size, int) else list(size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = [_narrow(weight, dim, start, length) for start, length in zip(starts, sizes, strict=True)]
    return NotImplemented if NotImplemented in found or sum(sizes) != count else tuple(found)


def _chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    return _split(weight, -(-weight.form.shape[dim] // chunks), dim)


def _index_select(weight: Any, dim: int, index: Tensor) -> Any:
    return _chosen(weight, index) if dim == 0 else NotImplemented


def _unbound(weight: Any, dim: int = 0) -> Any:
    if not isinstance(weight, UnevaluatedWeight) or weight.sum_.stack is None or not weight.attached or dim != 0:
        return NotImplemented
    return tuple(_chosen(weight, index) for index in range(weight.form.shape[0]))


def _iterated(weight: Any) -> Any:
    found = _unbound(weight)
    return found if found is NotImplemented else iter(found)


def _bmm(x: Any, other: Any) -> Any:
    turned = _stands(x)
    weight, x = (x, other) if turned else (other, x)
    if not isinstance(weight, UnevaluatedWeight) or not isinstance(x, Tensor) or _stands(x) or x.dim() != 3:
        return NotImplemented
    sum = weight.sum_.as_(not turned)
    if sum is None or sum.stack is None or not weight.attached or not _types_fit(x, weight):
        return NotImplemented
    return sum.stack.each(x.mT).mT if turned else sum.stack.each(x)


def _baddbmm(bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    if beta != 1 or alpha != 1 or out is not None or not isinstance(bias, Tensor) or _stands(bias):
        return NotImplemented
    result = _bmm(x, weight)
    return result if result is NotImplemented else bias + result


def _einsum(equation: Any, *operands: Any) -> Any:
    """Where it is one product of an input and a map, or of many inputs each with a map of its own."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or len(operands) != 2 or equation.count("->") != 1:
        return NotImplemented
    ins, out = equation.replace(" ", "").split("->")
    terms = ins.split(",")
    (a, x), (b, weight) = zip(terms, operands, strict=True)
    if _stands(x):
        (a, x), (b, weight) = (b, weight), (a, x)
    if not isinstance(weight, UnevaluatedWeight) or _stands(x) or "." in b or len(set(b)) != len(weight.form.shape):
        return NotImplemented
    summed = [letter for letter in b if letter in a and letter not in out]
    made = [letter for letter in b if letter not in a and letter in out]
    own = [letter for letter in b if letter in a and letter in out]  # of the map, where there are many
    if (
        len(summed) != 1
        or len(made) != 1
        or b[: len(own)] != "".join(own)
        or len(set(a) - {"."}) != len(a.replace(".", ""))
    ):
        return NotImplemented
    rest = a.replace(summed[0], "")
    if len(own) == 0:
        y = _product(_permuted(x, a, rest + summed[0]), weight, None, transposed=b == summed[0] + made[0])
        return y if y is NotImplemented else _permuted(y, rest + made[0], out)
    if len(own) > 1 or "." in a:
        return NotImplemented
    rest = rest.replace(own[0], "")
    x = _permuted(x, a, own[0] + rest + summed[0])
    turned = weight if b[1:] == summed[0] + made[0] else _turned(weight)
    y = _bmm(x.flatten(1, -2) if rest else x[:, None], turned)
    if y is NotImplemented:
        return y
    return _permuted(y.reshape(*x.shape[:-1], y.shape[-1]), own[0] + rest + made[0], out)


def _permuted(x: Tensor, letters: str, wanted: str) -> Tensor:
    return x if letters == wanted else torch.einsum(f"{letters}->{wanted}", x)


def _embedding(
    x: Any, weight: Any, padding_idx: int | None = None, max_norm: Any = None, *more: Any, **named: Any
) -> Any:
    if not isinstance(weight, UnevaluatedWeight) or weight.sum_.look_up is None or max_norm is not None:
        return NotImplemented
    return weight.sum_.look_up(x, padding_idx) if weight.attached else NotImplemented


def _grouped(func: Any, x: Any, weight: Any, **kwargs: Any) -> Any:
    sum = weight.sum_.as_(True) if isinstance(weight, UnevaluatedWeight) else None
    if sum is None or sum.stack is None or not weight.attached or _stands(x) or x.dim() != 2:
        return NotImplemented
    if kwargs.get("offs") is None or x.dtype != weight.form.dtype:
        return NotImplemented
    return sum.stack.grouped(func, x, kwargs)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _product(x, weight, bias, transposed=False)


def _matmul(x: Any, other: Any) -> Any:
    weight = other if _stands(other) else x
    if isinstance(weight, UnevaluatedWeight) and len(weight.form.shape) == 3:
        return _bmm(x, other)
    if _stands(other):
        return _product(x, other, None, transposed=True)
    if isinstance(other, Tensor) and other.dim() == 2:  # W @ x is (xᵀ @ Wᵀ)ᵀ
        result = _product(other.mT, x, None, transposed=False)
        return result if result is NotImplemented else result.mT
    return NotImplemented


def _addmm(bias: Any, x: Any, weight: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    if beta != 1 or alpha != 1 or out is not None or not isinstance(bias, Tensor):
        return NotImplemented
    if bias.dim() == 1:
        return _product(x, weight, bias, transposed=True)
    result = _product(x, weight, None, transposed=True)
    return result if result is NotImplemented else bias + result


def _product(x: Any, weight: Any, bias: Any, *, transposed: bool) -> Any:
    """x (..., in) through the map, if `weight` is one and is asked for in the layout in which it stands."""
    if not isinstance(weight, UnevaluatedWeight) or _stands(x) or _stands(bias) or not isinstance(x, Tensor):
        return NotImplemented
    sum = weight.sum_.as_(transposed)
    if sum is None or sum.product is None or not weight.attached or x.dim() == 0:
        return NotImplemented
    return sum.product(x, bias) if _types_fit(x, weight) else NotImplemented


def _types_fit(x: Tensor, weight: UnevaluatedWeight) -> bool:
    """If not, PyTorch has the say."""
    return torch.is_autocast_enabled(x.device.type) or x.dtype == weight.form.dtype


def _to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    if any(map(_stands, args)):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        probe = torch.empty(0, dtype=weight.form.dtype, device=weight.form.device).to(
            *args, **{**kwargs, "copy": False}
        )
    same = (probe.dtype, probe.device) == (weight.form.dtype, weight.form.device) and not kwargs.get("copy")
    return weight if same else NotImplemented


_TENSOR: Any = Tensor
_HANDLERS: dict[Any, Callable[..., Any]] = {
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
    **dict.fromkeys((torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes), _transpose),
    **dict.fromkeys((torch.detach, Tensor.detach, _TENSOR.data.__get__), _bare),
    Tensor.to: _to,
}

_GETTERS = (
    *("shape", "dtype", "device", "layout", "ndim", "names", "requires_grad", "is_leaf", "grad_fn", "grad", "_version"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps"),
    *("itemsize", "output_nr", "retains_grad", "nbytes"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_signed", "__len__", "__hash__", "register_hook"),
)
_OF_NO_EFFECT = {
    *(getattr(Tensor, name).__get__ for name in _GETTERS if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
"""What may be asked of a weight without computing with it."""
