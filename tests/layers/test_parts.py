"""Maps that are parts of a module."""

import copy

import pytest
import torch
from torch import nn

import gralora

from ..models import random_config
from .test_attention import attention, inputs


def test_biases_of_an_attention_are_trained_swapped_and_saved(tmp_path):
    base = nn.ModuleDict({"a": attention()})
    model = gralora.inject(copy.deepcopy(base), ["a"], random_config(bias="gralora_only"))
    assert set(gralora.adapter_state_dict(model)) >= {"a.in_proj_bias", "a.out_proj.bias"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("default.bias"):
                parameter.add_(1)
    args = inputs(base["a"])
    y = model["a"](*args)[0]
    with gralora.disable_adapter(model):
        torch.testing.assert_close(model["a"](*args)[0], base["a"](*args)[0])
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded["a"](*args)[0], y, rtol=1e-12, atol=1e-12)
    gralora.unload(model)
    assert torch.equal(model["a"].in_proj_bias, base["a"].in_proj_bias)


def test_the_module_changes_class_with_its_first_part_and_back_with_its_last():
    attention = nn.MultiheadAttention(16, 4)
    gralora.inject(attention, ["q_proj"], random_config(), adapter_name="a")
    made = type(attention)
    gralora.inject(attention, ["v_proj"], random_config(), adapter_name="b")
    assert type(attention) is made and issubclass(made, nn.MultiheadAttention)
    assert gralora.adapter_names(attention) == ["a", "b"]
    gralora.unload(attention)
    assert type(attention) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_a_base_is_not_loaded_into_a_part_that_is_merged():
    attention = gralora.inject(
        nn.MultiheadAttention(16, 4), ["q_proj", "out_proj"], random_config()
    )
    state = nn.MultiheadAttention(16, 4).state_dict()
    gralora.merge(attention)
    with pytest.raises(RuntimeError) as error:
        attention.load_state_dict(state, strict=False)
    assert "in_proj_weight holds a merged adapter" in str(error.value)
    assert "out_proj.weight holds a merged adapter" in str(error.value)
    gralora.unmerge(attention)
    attention.load_state_dict(state)
