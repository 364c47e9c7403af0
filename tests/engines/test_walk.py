"""Whole models are walked as `nn.Module.named_modules` walks them."""

import pytest
import torch
from torch import nn

from gralora.engines.walk import modules, named_modules

from ..models import Block, Everything, llama


def tangled():
    """Shared modules, reached first by the deeper path; a hole; a circle."""
    shared, model = nn.Linear(2, 2), nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.ReLU())})
    model["a"][0].append(shared)
    model["b"], model["c"] = shared, Block()
    model.register_module("hole", None)
    model["c"].mlp.append(model["a"])
    return model


@pytest.mark.parametrize("make", [Block, Everything, llama, tangled, lambda: nn.Linear(2, 2)])
def test_the_order_and_the_names_are_those_of_pytorch(make):
    model = make()
    assert [(n, id(m)) for n, m in named_modules(model)] == [(n, id(m)) for n, m in model.named_modules()]
    assert list(map(id, modules(model))) == list(map(id, model.modules()))


def test_a_model_may_be_changed_while_it_is_walked():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
    for _, module in named_modules(model):
        if isinstance(module, nn.Linear):
            module.add_module("more", nn.Identity())
    assert len(modules(model)) == 7
    assert torch.is_tensor(model[0].weight)
