"""Whether a forward runs, and whose: what a weight is to whoever reads it depends on that."""

from __future__ import annotations

import sys

import torch
from torch import nn

FORWARDS = {"forward", "training_step", "validation_step", "test_step", "predict_step"}
"""Methods of a module that compute, by name; the last four are Lightning's."""

ENGINES = ("torch.distributed", "torch.nn.parallel", "accelerate", "deepspeed", "diffusers.hooks")
"""Packages that keep parameters elsewhere, and fetch them when a forward begins."""

_WITHIN = tuple(f"{package}." for package in ENGINES)  # not "accelerated_models"
_CALL = nn.Module._call_impl.__code__


def forward_runs(module: nn.Module | None) -> bool:
    """Whether this thread is within the forward of some module, the innermost of which is not
    `module` itself.

    Outside of any, a weight that is read is the parameter, for those who tie, initialise, prune,
    shard or compare it. So it is to `module`'s own forward, to whose output the update is added
    (None: to that of none), and to engines, which move it within a forward.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if f"{frame.f_globals.get('__name__')}.".startswith(_WITHIN):
            return False
        if code is _CALL or code.co_name in FORWARDS:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                return owner is not module
        frame = frame.f_back  # type: ignore[assignment]
    return (
        torch._C._current_graph_task_id() != -1
    )  # a checkpointed forward runs again, by whatever function
