"""The tensor that stands for a sum that nobody has computed; what it answers to, and by what, is in
`unevaluated.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gralora.layers.sums import Sum

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""What is done without computing the sum, by PyTorch's function; NotImplemented where it has to be
computed after all.
"""


class Form(NamedTuple):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class UnevaluatedWeight(Tensor):
    """See the text of this file."""

    sum_: Sum
    form: Form
    attached: bool
    computed: dict[bool, Tensor]

    @staticmethod
    def __new__(cls, sum: Sum, form: Form, attached: bool) -> UnevaluatedWeight:
        return Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride, dtype=form.dtype, device=form.device
        )

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
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in OF_NO_EFFECT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[
            0
        ]  # of "mul_.Tensor", one overload, "mul_"
        if "grouped_mm" in name:  # whoever's it is: PyTorch's, or the fallback of transformers
            result = HANDLERS["grouped_mm"](func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        edits = name in _EDITS or (name.endswith("_") and not name.endswith("__"))
        if (edits and (stands(args[:1]) or any(map(stands, kwargs.values())))) or stands(
            kwargs.get("out")
        ):
            raise RuntimeError(_EDITED)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return bare(args[0])
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (
            kwargs or {}
        )
        if any(a.is_write and stands(given.get(a.name)) for a in func._schema.arguments):
            raise RuntimeError(_EDITED)
        with torch.no_grad():
            return func(*tree_map(_dense, args), **tree_map(_dense, kwargs or {}))


class _Read(torch.autograd.Function):
    """The parameters to a tensor that stands for their sum; backward is for those who take it past
    our overrides.
    """

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
        found = iter(
            torch.autograd.grad(total, wanted, grads[0], create_graph=again, allow_unused=True)
        )
        return (None, None, *(next(found) if need else None for need in needed))


_EDITED = (
    "the weight of an adapted layer is edited in place while a forward runs, where it stands for W"
    " + ΔW and not for itself. Edit it outside of any forward, or in the layer's own."
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


def read(sum: Sum, form: Form) -> Tensor:
    return _Read.apply(sum, form, *sum.parameters)  # type: ignore[no-any-return, no-untyped-call]


def stands(value: object) -> bool:
    return isinstance(value, UnevaluatedWeight) or (
        isinstance(value, (tuple, list)) and any(map(stands, value))
    )


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, UnevaluatedWeight) else value


def bare(weight: UnevaluatedWeight) -> Tensor:
    """The same without a graph."""
    return UnevaluatedWeight(weight.sum_, weight.form, False)


_GETTERS = (
    *(
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "names",
        "requires_grad",
        "is_leaf",
        "grad_fn",
        "grad",
        "_version",
    ),
    *(
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
        "is_xpu",
        "is_mps",
    ),
    *("itemsize", "output_nr", "retains_grad", "nbytes"),
)
_METHODS = (
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "storage_offset",
        "get_device",
    ),
    *(
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_signed",
        "__len__",
        "__hash__",
        "register_hook",
    ),
)
OF_NO_EFFECT = {
    *(getattr(Tensor, name).__get__ for name in _GETTERS if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
"""What may be asked of a weight without computing with it."""
