"""Several models over one set of base weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from gralora.layers.base import gralora_layers
from gralora.layers.linear_map import PREFIX

Model = TypeVar("Model", bound=nn.Module)


def shared_copy(model: Model) -> Model:
    """A second model over the same base weights and buffers: their memory is shared, nothing of it
    is copied.

    Adapters, saved modules and trained biases are copied, and from then on each model's are its
    own, as are active sets, merges, modes, hooks and `requires_grad`. A merge is written into
    memory of its own, so the other model never sees it. The two may run in two threads at once.
    What is written into a base weight in place (an optimizer that trains the base,
    `load_state_dict`) is seen by both.
    """
    memo: dict[int, Any] = {id(tensor): _alias(tensor) for tensor in _base_tensors(model)}
    return copy.deepcopy(model, memo)


def _base_tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer that belongs to the base."""
    found: list[Tensor] = []
    own = set()  # within the base's modules, but an adapter's
    for _, layer in gralora_layers(model):
        for aside, (owner, name) in layer.map.places.items():
            base = getattr(layer.gralora_adapters, aside)
            if base is not None:
                found.append(base)
                own.add(id(owner._parameters[name]))
    named = [*model.named_parameters(), *model.named_buffers()]
    found += [tensor for name, tensor in named if PREFIX not in name and id(tensor) not in own]
    return list({id(tensor): tensor for tensor in found}.values())


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor over the same memory; the very tensor where only its own class knows what its
    memory means.
    """
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach() if type(tensor) is Tensor else tensor
