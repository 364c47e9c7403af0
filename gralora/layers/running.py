"""Whether a forward runs, and whose: what a weight is to whoever reads it depends on that."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection
from types import FrameType
from typing import cast

from torch import nn

from gralora.torch_internals import MODULE_CALL, in_backward

FORWARDS = {"forward", "training_step", "validation_step", "test_step", "predict_step"}
"""Methods of a module that compute, by name; the last four are Lightning's."""

ENGINES = ("torch.distributed", "torch.nn.parallel", "accelerate", "deepspeed", "diffusers.hooks")
"""Packages that keep parameters elsewhere, and fetch them when a forward begins."""

_WITHIN = tuple(f"{package}." for package in ENGINES)  # not "accelerated_models"


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
        if code is MODULE_CALL or code.co_name in FORWARDS:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                return owner is not module
        frame = frame.f_back  # type: ignore[assignment]
    return in_backward()  # a checkpointed forward runs again, called by any function


def calling_generator() -> FrameType | None:
    """The frame of the generator that has called into this library, if the caller is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    return frame if frame is not None and frame.f_code.co_flags & _GENERATOR else None


def innermost_running(frames: Collection[int]) -> list[int]:
    """Those of `frames`, by id, that this call is within, the innermost first."""
    found, frame = [], cast("FrameType | None", sys._getframe(1))
    while frame is not None:
        if id(frame) in frames:
            found.append(id(frame))
        frame = frame.f_back
    return found


def _is_ours(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return name == "contextlib" or name.partition(".")[0] == "gralora"


_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
