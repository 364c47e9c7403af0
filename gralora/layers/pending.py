"""Graphs that wait for their backward while the model is switched to another adapter.

Gradients belong to what acted in the forward. Autograd drops those of a parameter that does not
require any when they arrive, so a parameter that is no longer trained takes the late ones itself.
Activation checkpointing runs the forward again, with whatever acts by then: where that is something
else, it is an error.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook
from torch.utils.weak import WeakTensorKeyDictionary

_handles = WeakTensorKeyDictionary()


def set_trained(parameter: nn.Parameter, trained: bool) -> None:
    """requires_grad_(trained); where it was trained till now, gradients of forwards that have been
    still arrive.
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


def moment() -> int:
    """Now, in autograd's count of what this thread has recorded."""
    with torch.enable_grad():
        recorded = torch.empty(0, requires_grad=True).view(0).grad_fn
    return 0 if recorded is None else recorded._sequence_nr()


def check_unchanged(changed: int) -> None:
    """Raise RuntimeError if a checkpointed forward runs again that was first run before the moment
    `changed`.
    """
    node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
    if node is not None and node._sequence_nr() < changed:
        raise RuntimeError(
            "activation checkpointing runs a forward again, but set_adapter has been called since"
            " it was first run: another adapter would act, and its gradients be wrong. Call"
            " backward before set_adapter."
        )
