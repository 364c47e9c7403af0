"""Layers that are their own map: copies, pickles, state dicts."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig, GraloraConv1D, GraloraLinear

from ..models import Doubled, random_config, relative, same_bits


def test_a_checkpoint_with_half_an_adapter_does_not_load():
    layer = GraloraLinear(16, 8)
    state = layer.state_dict()
    del state["gralora_adapters.default.B"]
    with pytest.raises(RuntimeError, match=r"Missing key.*gralora_adapters\.default\.B"):
        layer.load_state_dict(state)


def test_full_state_dict_round_trip():
    one, two = (GraloraLinear(16, 8, config=random_config()) for _ in range(2))
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 16)
    assert same_bits(one(x), two(x))


def test_from_linear_shares_the_weights_and_leaves_the_linear_layer_alone():
    linear = nn.Linear(16, 8)
    hits = []
    linear.register_forward_hook(lambda *_: hits.append(1))
    layer = GraloraLinear.from_linear(linear, random_config())
    assert type(linear) is nn.Linear
    assert layer.weight is linear.weight
    assert "gralora_adapters" not in dict(linear.named_children())
    x = torch.randn(3, 16)
    expected = F.linear(x, linear.weight + gralora.delta_weight(layer), linear.bias)
    torch.testing.assert_close(layer(x), expected)
    assert relative(layer(x), linear(x)) > 0.05
    assert len(hits) == 3


def test_from_conv1d_takes_ours_and_that_of_transformers():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(8, 16)
    layer = GraloraConv1D.from_conv1d(conv, random_config())
    assert isinstance(layer, (GraloraConv1D, Conv1D)) and isinstance(layer, Conv1D)
    x = torch.randn(3, 16)
    torch.testing.assert_close(
        layer(x), x @ (conv.weight + gralora.delta_weight(layer)) + conv.bias
    )
    with pytest.raises(TypeError, match="GraloraConv1D cannot stand in for a Linear"):
        GraloraConv1D.from_conv1d(nn.Linear(2, 2), GraloraConfig(r=2))
    with pytest.raises(TypeError, match="adapted already"):
        GraloraConv1D.from_conv1d(layer, GraloraConfig(r=2))


@pytest.mark.parametrize("cls", [nn.Linear, Doubled])
def test_deepcopy_pickle_and_save_of_adapted_layers(cls):
    layer = gralora.inject(cls(16, 8), "", random_config())
    x = torch.randn(3, 16)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is type(layer)
        assert same_bits(twin(x), layer(x))
        assert twin.gralora_adapters["default"].A is not layer.gralora_adapters["default"].A
        twin.gralora_adapters["default"].B.data.zero_()
        assert not torch.equal(twin(x), layer(x))
        gralora.unload(twin)
        assert type(twin) is cls
