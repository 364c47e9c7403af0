"""A weight that acts without being computed: W + Σ weight * ΔW, as whoever reads the weight of an adapted map gets it.

Some code never calls a layer but reads its weight and applies it: heads under a fused loss, vision transformers that put a
bias together at run time, kernels that take all weights of a block. They get a tensor that stands for the sum. Applied as
a linear map it gives the base product plus the adapters' own; transposed it stays what it is; its attributes are W's;
anything else computes the sum, once, and goes on with it. What takes it past Python's overrides (a custom
`autograd.Function`, an operator in C++) finds the sum as well, and gradients find their way to A and B.

Who calls the layer never meets one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

FORWARDS = {"forward", "training_step", "validation_step", "test_step", "predict_step"}
"""Methods of a module that compute, by name; the last four are Lightning's."""

ENGINES = ("torch.distributed", "torch.nn.parallel", "accelerate", "deepspeed", "diffusers.hooks")
"""Packages that keep parameters elsewhere, and fetch them when a forward begins."""

_CALL = nn.Module._call_impl.__code__


def forward_runs(module: nn.Module | None) -> bool:
    """Whether this thread is within the forward of some module, the innermost of which is not `module` itself.

    Outside of any, a weight that is read is the parameter, for those who tie, initialise, prune, shard or compare it. So it
    is to `module`'s own forward, to whose output the update is added, and to engines, which move it within a forward.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if str(frame.f_globals.get("__name__")).startswith(ENGINES):
            return False
        if code is _CALL or code.co_name in FORWARDS:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                return owner is not module
        frame = frame.f_back  # type: ignore[assignment]
    return torch._C._current_graph_task_id() != -1  # a checkpointed forward runs again, by whatever function


class Sum(NamedTuple):
    """What an unevaluated weight stands for.

    Args:
        parameters: W as it is held, and the adapters' tensors.
        evaluate: the sum, in the shape of W, out of `parameters`, differentiably.
        product: x (..., in), bias -> x @ (W + ΔW)ᵀ + bias; None where W is no matrix.
        transposed: W is (in, out).
        stack: of W (n, out, in), many maps in one.
        other: the same, where W is taken for the transposed map, as in a decoder that uses its encoder's weight.
    """

    parameters: tuple[Tensor, ...]
    evaluate: Callable[..., Tensor]
    product: Callable[[Tensor, Tensor | None], Tensor] | None
    transposed: bool
    stack: Stack | None = None
    other: Callable[[], Sum] | None = None

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
        grouped: rows that lie grouped by map, with the function that multiplies them by weights (n, in, out), and its other
            arguments.
    """

    one: Callable[[int], Sum]
    some: Callable[[Tensor], Sum]
    each: Callable[[Tensor], Tensor]
    grouped: Callable[[Callable[..., Tensor], Tensor, dict[str, Any]], Tensor]


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
    """W[index]: one of many maps, or those of a tensor of indices."""
    stack = weight.sum_.stack if isinstance(weight, UnevaluatedWeight) else None
    if stack is None or not weight.attached:
        return NotImplemented
    if isinstance(index, Tensor) and (index.is_floating_point() or index.dtype is torch.bool or index.dim() > 1):
        return NotImplemented
    if isinstance(index, Tensor) and index.dim() == 1:
        sum = stack.some(index)
    elif isinstance(index, (int, Tensor)) and not isinstance(index, bool):
        sum = stack.one(range(weight.form.shape[0])[int(index)])
    else:
        return NotImplemented
    found = unevaluated(sum)
    return found if sum.transposed == weight.sum_.transposed else _turned(found)


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
    **dict.fromkeys((torch.t, Tensor.t, _TENSOR.T.__get__), _t),
    _TENSOR.mT.__get__: _turned,
    Tensor.__getitem__: _chosen,
    **dict.fromkeys((torch.index_select, Tensor.index_select), _index_select),
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
