"""Maps that are parts of a module."""

import copy

import torch
from torch import nn

import gralora

from ..models import random_config, same_bits


def attention(batch_first=True, **kwargs):
    return nn.MultiheadAttention(16, 4, batch_first=batch_first, dtype=torch.float64, **kwargs)


def inputs(module, batched=True):
    shapes = [(3, 5, 16), (3, 7, module.kdim), (3, 7, module.vdim)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if not batched:
        return [x[0] for x in tensors]
    return tensors if module.batch_first else [x.transpose(0, 1) for x in tensors]


def test_biases_of_an_attention_are_trained_swapped_and_saved(tmp_path):
    base = nn.ModuleDict({"a": attention()})
    model = gralora.inject(copy.deepcopy(base), ["a"], random_config(bias="gralora_only"))
    assert set(gralora.adapter_state_dict(model)) >= {"a.in_proj_bias", "a.out_proj.bias"}
    with torch.no_grad():
        model["a"].in_proj_bias.add_(1)
        model["a"].out_proj.bias.add_(1)
    args = inputs(base["a"])
    y = model["a"](*args)[0]
    with gralora.disable_adapter(model):
        torch.testing.assert_close(model["a"](*args)[0], base["a"](*args)[0])
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert same_bits(loaded["a"](*args)[0], y)
    gralora.unload(model)
    assert torch.equal(model["a"].in_proj_bias, base["a"].in_proj_bias)
