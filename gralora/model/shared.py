"""Several models over one set of base weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from gralora.layers.base import gralora_layers
from gralora.layers.linear_map import PREFIX
from gralora.model.saved import BiasSwap, bias_swaps
from gralora.model.state import SHARED

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
        aside = layer.gralora_adapters.base_weight
        if aside is not None:
            found.append(aside)
            owner, name = layer.map.place
            own.add(id(owner._parameters[name]))
    for _, owner, swap in bias_swaps(model):
        found.append(swap.get(owner, BiasSwap.BASE))
        own |= {id(swap.get(owner, name)) for name in swap.names}
    named = [*model.named_parameters(), *model.named_buffers()]
    found += [tensor for name, tensor in named if PREFIX not in name and id(tensor) not in own]
    return list({id(tensor): tensor for tensor in found}.values())


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor over the same memory; the very tensor where only its own class knows what its
    memory means.
    """
    setattr(tensor, SHARED, True)
    if type(tensor) is nn.Parameter:
        other: Tensor = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    elif type(tensor) is Tensor:
        other = tensor.detach()
    else:
        return tensor
    setattr(other, SHARED, True)
    return other
