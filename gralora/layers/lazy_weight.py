"""`LazyWeight`: the tensor that code gets which reads the weight of an adapted map in a forward.

Some code never calls a layer but reads its weight and applies it: heads under a fused loss, vision
transformers that build a bias at run time, fused experts. It gets W + ΔW, not computed. Products,
transposes and the selection of experts keep it so; its shape, dtype and device are W's; anything
else computes the sum, once, and goes on with it. Code that Python's overrides do not reach (a
custom `autograd.Function`, an operator in C++) finds the sum as well, and gradients reach A and B.

Code that calls the layer never meets one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from gralora.engines.distributed import is_spread
from gralora.layers.effective_weight import EffectiveWeight
from gralora.maths import autograd
from gralora.torch_internals import DENSE_SUBCLASSES, disable_torch_function, wrapper_subclass


def read_as(effective: EffectiveWeight) -> Tensor:
    """The effective weight as a tensor: lazy where a tensor subclass can serve, else computed."""
    weight = effective.weight
    serves = type(weight) in (Tensor, nn.Parameter) or is_spread(weight)
    if serves and autograd.eager():
        return _lazy(effective)
    return effective.evaluate(*effective.parameters)


def is_dense(weight: object) -> bool:
    """Whether operators see the values of `weight`: a plain tensor, or what an engine of PyTorch
    puts in its place while it traces. Other subclasses are formats that their layer alone can read.
    """
    return type(weight) in (Tensor, nn.Parameter) or isinstance(weight, DENSE_SUBCLASSES)


class LazyWeight(Tensor):
    """A tensor in the form of W that is W + ΔW."""

    effective: EffectiveWeight
    attached: bool  # to the graph
    computed: dict[bool, Tensor]

    @staticmethod
    def __new__(cls, effective: EffectiveWeight, attached: bool) -> LazyWeight:
        weight = effective.weight
        options = {"strides": weight.stride(), "dtype": weight.dtype, "device": weight.device}
        lazy: LazyWeight = wrapper_subclass(cls, weight.shape, **options)
        return lazy

    def __init__(self, effective: EffectiveWeight, attached: bool) -> None:
        self.effective, self.attached, self.computed = effective, attached, {}

    def dense(self) -> Tensor:
        """The sum, with its graph where gradients are on."""
        graph = torch.is_grad_enabled() and self.attached
        if graph not in self.computed:
            with torch.set_grad_enabled(graph):
                self.computed[graph] = self.effective.evaluate(*self.effective.parameters)
        return self.computed[graph]

    def __getattr__(self, name: str) -> Any:
        # of the class of W alone, as a DTensor's `full_tensor`: it needs the sum
        effective = self.__dict__.get("effective")
        if effective is None or not hasattr(type(effective.weight), name):
            raise AttributeError(f"'LazyWeight' object has no attribute {name!r}")
        return getattr(self.dense(), name)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({self.dense()!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OF_NO_EFFECT:
            with disable_torch_function():
                return func(*args, **kwargs)
        result = _unevaluated(func, args, kwargs)
        if result is not None:
            return result
        # "mul_.Tensor", an overload, has the name "mul_"
        name = getattr(func, "__name__", "").partition(".")[0]
        edits = name in _EDITS or (name.endswith("_") and not name.endswith("__"))
        edited = edits and (_is_lazy(args[:1]) or any(map(_is_lazy, kwargs.values())))
        if edited or _is_lazy(kwargs.get("out")):
            raise RuntimeError(_EDITED)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return _detach(args[0])
        arguments, kwargs = func._schema.arguments, kwargs or {}
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        if any(a.is_write and _is_lazy(given.get(a.name)) for a in arguments):
            raise RuntimeError(_EDITED)
        with torch.no_grad():
            return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


class _Read(torch.autograd.Function):
    """The parameters of an effective weight -> its lazy tensor.

    Backward serves code that Python's overrides do not reach; all other gradients go through the
    operations themselves.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        effective, *parameters = args
        ctx.save_for_backward(*parameters)
        ctx.evaluate = effective.evaluate
        return LazyWeight(effective, True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needed, again = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        pairs = list(zip(ctx.saved_tensors, needed, strict=True))
        parameters = [p if again or not need else p.detach().requires_grad_() for p, need in pairs]
        with torch.enable_grad():
            total = ctx.evaluate(*parameters)
        wanted = [p for p, need in zip(parameters, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(total, wanted, grads[0], create_graph=again, allow_unused=True)
        )
        return (None, *(next(found) if need else None for need in needed))


def _lazy(effective: EffectiveWeight, attached: bool = True) -> Tensor:
    if not attached:
        return LazyWeight(effective, False)
    return cast(Tensor, _Read.apply(effective, *effective.parameters))  # type: ignore[no-untyped-call]


def _is_lazy(value: object) -> bool:
    return isinstance(value, LazyWeight) or (
        isinstance(value, (tuple, list)) and any(map(_is_lazy, value))
    )


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, LazyWeight) else value


# The operations that need no sum. A handler has the parameters of PyTorch's function, by name. It
# returns None where the sum is needed, and so does a call that does not bind to it.


def _unevaluated(func: Any, args: Any, kwargs: Any) -> Any:
    handler = HANDLERS.get(func)
    if handler is not None:
        try:
            bound = handler[1].bind(*args, **kwargs)
        except TypeError:
            return None  # an `out`, for instance, or a mistake that PyTorch reports
        return handler[0](*bound.args, **bound.kwargs)
    if func in CASTS:
        return _cast(func, *args, **kwargs)
    if "grouped_mm" in getattr(func, "__name__", ""):  # PyTorch's, or the fallback of transformers
        return _grouped_mm(func, args, kwargs)
    return None


def _multiplies(x: Any, weight: Any) -> bool:
    """Whether `x` is a plain factor of a lazy `weight`, and PyTorch takes the two types."""
    if not isinstance(weight, LazyWeight) or not isinstance(x, Tensor) or _is_lazy(x):
        return False
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    return weight.attached and same


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not _multiplies(input, weight) or _is_lazy(bias) or weight.dim() != 2 or input.dim() == 0:
        return None
    return weight.effective.linear(input, bias)


def _matmul(input: Any, other: Any) -> Any:
    if not isinstance(input, LazyWeight):
        return _from_right(input, other)
    if not isinstance(other, Tensor) or other.dim() < 2:
        return None
    result = _from_right(other.mT, _mT(input))  # W @ x is (xᵀ @ Wᵀ)ᵀ
    return None if result is None else result.mT


def _from_right(x: Any, weight: Any) -> Any:
    """x @ weight; where that is a stack (n, in, out), of x (n, t, in) alone."""
    if not _multiplies(x, weight):
        return None
    if weight.dim() == 2:
        return _linear(x, _mT(weight))
    return weight.effective.bmm(x) if x.dim() == 3 and len(x) == len(weight) else None


def _mm(input: Any, mat2: Any) -> Any:
    return _matmul(input, mat2) if _axes(input, mat2) == {2} else None


def _bmm(input: Any, mat2: Any) -> Any:
    return _matmul(input, mat2) if _axes(input, mat2) == {3} else None


def _axes(*factors: Any) -> set[int]:
    return {factor.dim() if isinstance(factor, Tensor) else -1 for factor in factors}


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    """Rows (t, in) that lie grouped by their matrix, of a stack (n, in, out)."""
    given: tuple[Any, ...] = (*args, *kwargs.values(), None, None)
    x, weight = given[:2]
    ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if not _multiplies(x, weight) or x.dim() != 2 or ends is None or x.dtype != weight.dtype:
        return None

    def multiply(matrices: Tensor) -> Tensor:
        plain = [matrices if value is weight else value for value in args]
        named = {k: matrices if value is weight else value for k, value in kwargs.items()}
        return cast(Tensor, func(*plain, **named))

    return weight.effective.grouped(multiply, x, ends)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or not isinstance(weight, LazyWeight) or not weight.attached:
        return None
    return weight.effective.embedding(input, padding_idx)


def _mT(input: Any) -> Any:
    return _lazy(input.effective.transpose(), input.attached)


def _t(input: Any) -> Any:
    return _mT(input) if input.dim() == 2 else None


def _permute(input: Any, *order: Any, dims: Any = ()) -> Any:
    axes, count = list(dims or order), input.dim()
    if len(axes) == 1 and isinstance(axes[0], (tuple, list)):
        axes = list(axes[0])
    axes = [axis + count if axis < 0 else axis for axis in axes]
    return _mT(input) if axes == [*range(count - 2), count - 1, count - 2] else None


def _transpose(input: Any, dim0: int, dim1: int) -> Any:
    count = input.dim()
    axes = {axis + count if axis < 0 else axis for axis in (dim0, dim1)}
    return _mT(input) if axes == {count - 2, count - 1} else None


def _swapaxes(input: Any, axis0: int, axis1: int) -> Any:
    return _transpose(input, axis0, axis1)


def _getitem(input: Any, index: Any) -> Any:
    if not isinstance(input, LazyWeight) or not input.attached:
        return None  # an index
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.dtype is torch.bool or index.dim() > 1:
            return None
        if index.dim() == 0:
            index = int(index)
    if isinstance(index, bool) or not isinstance(index, (int, slice, Tensor)):
        return None
    if isinstance(index, int):
        if not -len(input) <= index < len(input):
            return None  # PyTorch raises
        index %= len(input)
    found = input.effective.index(index)
    return None if found is None else _lazy(found)


def _index_select(input: Any, dim: int, index: Tensor) -> Any:
    return _getitem(input, index) if dim == 0 and index.dim() == 1 else None


def _unbind(input: Any, dim: int = 0) -> Any:
    if dim != 0 or _getitem(input, 0) is None:
        return None
    return tuple(_getitem(input, index) for index in range(len(input)))


def _iter(input: Any) -> Any:
    found = _unbind(input)
    return None if found is None else iter(found)


def _detach(input: Any) -> Any:
    return _lazy(input.effective, attached=False)


def _cast(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """The weight itself, where the cast changes nothing."""
    if not isinstance(weight, LazyWeight) or _is_lazy(args):
        return None
    probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return weight if func(probe, *args, **kwargs) is probe else None


_TENSOR: Any = Tensor
_TABLE: dict[Callable[..., Any], tuple[Any, ...]] = {
    _linear: (F.linear,),
    _matmul: (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul),
    _mm: (torch.mm, Tensor.mm),
    _bmm: (torch.bmm, Tensor.bmm),
    _embedding: (F.embedding,),  # subclasses of nn.Embedding that scale: Gemma's
    _t: (torch.t, Tensor.t, _TENSOR.T.__get__),
    _mT: (_TENSOR.mT.__get__,),
    _transpose: (torch.transpose, Tensor.transpose, torch.swapdims, Tensor.swapdims),
    _swapaxes: (torch.swapaxes, Tensor.swapaxes),
    _permute: (torch.permute, Tensor.permute),
    _getitem: (Tensor.__getitem__,),
    _index_select: (torch.index_select, Tensor.index_select),
    _unbind: (torch.unbind, Tensor.unbind),
    _iter: (Tensor.__iter__,),
    _detach: (torch.detach, Tensor.detach, _TENSOR.data.__get__),
}
HANDLERS = {
    function: (handler, inspect.signature(handler))
    for handler, functions in _TABLE.items()
    for function in functions
}
"""By PyTorch's function, what is done without computing the sum. All other functions get the sum;
among them are einsum, addmm, split and views, which no widely used model applies to a weight that
it reads in each layer.
"""

CASTS = {Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
"""Functions that return their argument itself where nothing changes, as torchtitan's experts do
before their products.
"""

_EDITED = (
    "the weight of an adapted layer is edited in place while a forward runs, where its value is W +"
    " ΔW. Edit it outside of any forward, or in the layer's own."
)
_EDITS = {
    "__set__",
    "__delete__",
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ipow__",
}


def _of_tensor(names: str) -> list[Any]:
    return [getattr(Tensor, name) for name in names.split() if hasattr(Tensor, name)]


_GETTERS = _of_tensor(
    "shape dtype device layout ndim names requires_grad is_leaf grad_fn grad _version itemsize"
    " nbytes output_nr retains_grad is_cuda is_cpu is_meta is_sparse is_quantized is_nested"
    " is_mkldnn is_xpu is_mps"
)
_METHODS = _of_tensor(
    "size dim ndimension numel nelement stride element_size storage_offset get_device is_complex"
    " is_floating_point is_contiguous is_signed __len__ __hash__ register_hook"
)
OF_NO_EFFECT = {
    *(getter.__get__ for getter in _GETTERS),
    *_METHODS,
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
"""What can be asked of a weight without computing with it."""
