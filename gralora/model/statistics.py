"""Buffers of the base: they stay the base's while adapters train.

Norms and spectral norm are kept still (`layers/still.py`). What else a forward writes, as a
codebook is, belongs to the
model: the base's values are remembered, and `disable_adapter` and `unload` put them back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gralora.engines.distributed import is_spread
from gralora.engines.walk import modules, named_modules
from gralora.layers.class_change import change_class, join, restore_class
from gralora.layers.still import StillModule
from gralora.model.saved import saved_modules

REMEMBERED = "_gralora_buffers"
"""On each module that owns some: the values of its buffers when the first adapter came, by name."""


def keep_still(model: nn.Module) -> None:
    """Keep the statistics of every frozen norm as they are, and remember what else could move."""
    owners = [module for module in modules(model) if module._buffers]
    copies = (
        {id(m) for _, saved in saved_modules(model) for m in modules(saved.gralora_saved)}
        if owners
        else set()
    )
    for module in owners:
        if id(module) in copies:
            continue
        if StillModule.accepts(module):
            change_class(module, StillModule)
        if not isinstance(module, StillModule) and REMEMBERED not in module.__dict__:
            kept = {
                k: b.detach().clone()
                for k, b in module._buffers.items()
                if b is not None and _is_kept(module, k, b)
            }
            if kept:
                module.__dict__[REMEMBERED] = kept


def let_move(model: nn.Module) -> None:
    """Undo `keep_still`: the base's values are back, bit for bit."""
    for module in modules(model):
        put_back(module)
        module.__dict__.pop(REMEMBERED, None)
        if isinstance(module, StillModule):
            restore_class(module)


def keep_moved(model: nn.Module) -> None:
    """Leave the buffers as they are now, for good."""
    for module in modules(model):
        module.__dict__.pop(REMEMBERED, None)


@torch.no_grad()
def put_back(module: nn.Module) -> dict[str, Tensor]:
    """Give the buffers of `module` the base's values; returns those that they had, where they
    differ.
    """
    moved = {}
    for key, value in module.__dict__.get(REMEMBERED, {}).items():
        now = module._buffers.get(key)
        if now is not None and _moved(now, value):
            moved[key] = now.clone()
            now.copy_(value)
    return moved


def moved_buffers(model: nn.Module) -> list[str]:
    """The names of buffers that are not as they were when the first adapter came."""
    return [
        join(name, key)
        for name, module in named_modules(model)
        for key, value in module.__dict__.get(REMEMBERED, {}).items()
        if module._buffers.get(key) is not None and _moved(module._buffers[key], value)  # type: ignore[arg-type]
    ]


def _is_kept(module: nn.Module, key: str, buffer: Tensor) -> bool:
    if is_lazy(buffer):
        return False
    plain = buffer.is_floating_point() and not buffer.is_meta and not is_spread(buffer)
    return plain and key not in module._non_persistent_buffers_set


def _moved(now: Tensor, value: Tensor) -> bool:
    return (
        now.shape == value.shape
        and not now.is_meta
        and not torch.equal(now, value.to(now.device, now.dtype))
    )
