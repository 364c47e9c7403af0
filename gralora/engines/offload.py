"""Models whose weights `accelerate` keeps elsewhere and brings only for a forward, known by the
hook that it leaves.

Adapters are small and are trained, so they stay where they are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOOK = "_hf_hook"


def is_offloaded(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter of `module` is elsewhere now."""
    own = module._parameters.get(parameter)
    return HOOK in module.__dict__ and own is not None and own.is_meta


def device_of(module: nn.Module, parameter: nn.Parameter | torch.Tensor) -> torch.device:
    """Where a parameter of `module` is when `module` runs."""
    wanted = getattr(module.__dict__.get(HOOK), "execution_device", None)
    if not parameter.is_meta or wanted is None:
        return parameter.device
    return torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)


def bring_back(module: nn.Module) -> None:
    """Undo what a hook that was just put on `module` has done: its parameters are again there, for
    good.
    """
    hook: Any = module.__dict__.pop(HOOK)
    module.__dict__.pop("_old_forward", None)
    hook.detach_hook(module)
    wanted = getattr(hook, "execution_device", None)
    if wanted is not None:
        module.to(wanted)
