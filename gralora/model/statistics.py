"""Frozen norms of a whole model; every other buffer belongs to the model (`layers/still.py`)."""

from __future__ import annotations

from torch import nn

from gralora.engines.walk import modules
from gralora.layers.class_change import change_class, restore_class
from gralora.layers.still import StillModule
from gralora.model.saved import saved_modules


def freeze_norms(model: nn.Module) -> None:
    """Make every frozen norm keep its statistics."""
    norms = [module for module in modules(model) if module._buffers and StillModule.accepts(module)]
    saved = (
        [m for _, own in saved_modules(model) for m in modules(own.gralora_saved)] if norms else []
    )
    copies = {id(module) for module in saved}
    for norm in norms:
        if id(norm) not in copies:
            change_class(norm, StillModule)


def restore_norms(model: nn.Module) -> None:
    """Undo `freeze_norms`."""
    for module in modules(model):
        if isinstance(module, StillModule):
            restore_class(module)
