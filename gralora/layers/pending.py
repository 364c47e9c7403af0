"""Gradients that arrive after `set_adapter` has switched to another adapter.

They belong to the adapters of the forward. Autograd drops the gradient of a parameter that does not
require one when it arrives, so a parameter that is no longer trained accumulates late gradients in
a hook. Activation checkpointing runs the forward again in the backward, with the adapters that are
active then: call backward before `set_adapter` there.
"""

from __future__ import annotations

import weakref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook
from torch.utils.weak import WeakTensorKeyDictionary

_handles = WeakTensorKeyDictionary()


def set_trained(parameter: nn.Parameter, trained: bool) -> None:
    """requires_grad_(trained). If it was trained so far, gradients of earlier forwards still
    arrive.
    """
    handle: RemovableHandle | None = _handles.pop(parameter, None)  # type: ignore[no-untyped-call]
    if handle is not None:
        handle.remove()
    if parameter.requires_grad and not trained and parameter.is_leaf:
        reference = weakref.ref(parameter)

        @unserializable_hook  # type: ignore[untyped-decorator]
        def arrive(grad: Tensor) -> None:
            late = reference()
            if late is not None and not late.requires_grad:
                late.grad = grad.detach().clone() if late.grad is None else late.grad + grad

        _handles[parameter] = parameter.register_hook(arrive)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(trained)
