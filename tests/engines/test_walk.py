"""Whole models are walked as `nn.Module.named_modules` walks them."""

import copy

import pytest
import torch
from torch import nn

import gralora
from gralora.engines.walk import modules, named_modules

from ..models import Block, Everything, llama, random_config


def tangled():
    """Shared modules, reached first by the deeper path; a hole; a circle."""
    shared, model = (
        nn.Linear(2, 2),
        nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.ReLU())}),
    )
    model["a"][0].append(shared)
    model["b"], model["c"] = shared, Block()
    model.register_module("hole", None)
    model["c"].mlp.append(model["a"])
    return model


@pytest.mark.parametrize("make", [Block, Everything, llama, tangled, lambda: nn.Linear(2, 2)])
def test_the_order_and_the_names_are_those_of_pytorch(make):
    model = make()
    assert [(n, id(m)) for n, m in named_modules(model)] == [
        (n, id(m)) for n, m in model.named_modules()
    ]
    assert list(map(id, modules(model))) == list(map(id, model.modules()))


def test_a_model_may_be_changed_while_it_is_walked():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(3)))
    for _, module in named_modules(model):
        if isinstance(module, nn.Linear):
            module.add_module("more", nn.Identity())
    assert len(modules(model)) == 7
    assert torch.is_tensor(model[0].weight)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "checkpoint_wrapper": lambda model: apply_wrapper(model),
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(apply_wrapper(model), backend="eager"),
}


def apply_wrapper(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_under_wrappers_are_those_of_the_plain_model(wrapper, when, tmp_path):
    base = Block()
    plain = gralora.inject(
        copy.deepcopy(base), [r"mlp.0", "q", "head"], random_config(bias="gralora_only")
    )
    x = torch.randn(2, 5, 16)
    model = copy.deepcopy(base)
    if when == "before":
        model = WRAPPERS[wrapper](model)
        gralora.inject(model, [r"mlp.0", "q", "head"], random_config(bias="gralora_only"))
    else:
        gralora.inject(model, [r"mlp.0", "q", "head"], random_config(bias="gralora_only"))
        model = WRAPPERS[wrapper](model)
    assert [row.layer for row in gralora.summary(model)] == [
        row.layer for row in gralora.summary(plain)
    ]
    assert set(gralora.adapter_state_dict(model)) == set(gralora.adapter_state_dict(plain))
    y = model(x)
    for format in ("gralora", "peft", "lora"):
        gralora.save_adapter(model, tmp_path / format, format=format)
        loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / format)
        torch.testing.assert_close(loaded(x), y)
    fresh = WRAPPERS[wrapper](copy.deepcopy(base))
    torch.testing.assert_close(gralora.load_adapter(fresh, tmp_path / "gralora")(x), y)
    with pytest.raises(ValueError, match=r"Nearest names: .*'mlp\.0'") as error:
        gralora.inject(model, ["mlp.9"], random_config(), adapter_name="b")
    assert "_orig_mod" not in str(error.value) and "wrapped" not in str(error.value)
