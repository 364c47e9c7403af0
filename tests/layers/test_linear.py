"""The drop-in layers."""

import pytest
import torch
from torch import nn

from gralora import GraloraConfig, GraloraConv1D, GraloraLinear

from ..models import same_bits


def test_drop_in_linear_has_a_frozen_base_and_a_trainable_adapter():
    layer = GraloraLinear(16, 8, config=GraloraConfig(r=4))
    assert isinstance(layer, nn.Linear)
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
        "weight": False,
        "bias": False,
        "gralora_adapters.default.A": True,
        "gralora_adapters.default.B": True,
    }


def test_drop_in_layers_initialise_and_load_as_the_layers_they_stand_in_for():
    from transformers.pytorch_utils import Conv1D

    for make, plain in [
        (lambda: GraloraLinear(16, 8), lambda: nn.Linear(16, 8)),
        (lambda: GraloraConv1D(8, 16), lambda: Conv1D(8, 16)),
    ]:
        torch.manual_seed(1)
        layer = make()
        torch.manual_seed(1)
        other = plain()
        assert same_bits(layer.weight, other.weight)
        assert same_bits(layer.bias, other.bias)
        nn.init.normal_(other.bias)
        layer.load_state_dict(other.state_dict())  # strictly: it holds no adapter, and none is missed
        x = torch.randn(3, 16)
        torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.float64), (False, torch.bfloat16)])
def test_drop_in_arguments_are_those_of_linear(bias, dtype):
    layer = GraloraLinear(16, 8, bias, device="cpu", dtype=dtype, adapter_name="mine")
    assert (layer.bias is not None) is bias
    assert layer.weight.dtype == dtype
    adapter = layer.gralora_adapters["mine"]
    assert adapter.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer(torch.randn(2, 16, dtype=dtype)).dtype == dtype
