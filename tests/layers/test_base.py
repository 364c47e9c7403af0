"""What holds of every adapted map."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig, GraloraConv1D, GraloraLinear

from ..models import mlp, random_config


@pytest.mark.parametrize(
    "kind", [lambda c: GraloraLinear(16, 8, config=c), lambda c: GraloraConv1D(8, 16, config=c)]
)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)])
def test_any_number_of_leading_dimensions(kind, leading):
    layer = kind(random_config(hybrid_r=2))
    x = torch.randn(*leading, 16)
    y = layer(x)
    assert y.shape == (*leading, 8)
    weight = layer.weight + gralora.delta_weight(layer)
    expected = F.linear(x, weight if isinstance(layer, nn.Linear) else weight.T, layer.bias)
    torch.testing.assert_close(y, expected)


def test_inputs_by_keyword_and_of_any_strides():
    layer = GraloraLinear(16, 8, config=random_config())
    x = torch.randn(16, 6).T
    torch.testing.assert_close(layer(input=x), layer(x.contiguous()))
    expanded = torch.randn(1, 16).expand(5, 16)
    torch.testing.assert_close(layer(expanded), layer(expanded.contiguous()))


def test_extra_repr_tells_the_adapter():
    layer = GraloraLinear(64, 64, config=GraloraConfig(r=32, gralora_k=4))
    assert layer.extra_repr().endswith("r=32, gralora_k=4, alpha=64, active=default")
    assert "nf=64, nx=64" in repr(GraloraConv1D(64, 64))


def test_output_is_unchanged_bit_for_bit_while_B_is_zero():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        linear = nn.Linear(16, 8, dtype=dtype)
        x = torch.randn(4, 16, dtype=dtype)
        y = linear(x)
        assert torch.equal(gralora.inject(linear, "")(x), y)


def test_half_precision_base_has_float32_adapters_and_autocast_is_respected():
    layer = gralora.inject(nn.Linear(16, 8, dtype=torch.float16), "", random_config())
    assert layer.gralora_adapters["default"].A.dtype == torch.float32
    assert layer(torch.randn(2, 16, dtype=torch.float16)).dtype == torch.float16
    layer = gralora.inject(nn.Linear(16, 8), "", random_config(), dtype=torch.bfloat16)
    assert layer.gralora_adapters["default"].A.dtype == torch.bfloat16
    assert layer(torch.randn(2, 16)).dtype == torch.float32
    layer = GraloraLinear(16, 8, config=random_config())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.gralora_adapters["default"].A.grad.dtype == torch.float32


def test_to_moves_the_adapter_with_the_layer():
    model = gralora.inject(mlp(16, 8), ["0"], random_config()).double()
    assert model(torch.randn(2, 16).double()).dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert all(p.is_meta for p in model.to("meta").parameters())


def test_delta_weight_of_what_is_not_there_is_an_error():
    layer = GraloraLinear(16, 8)
    with pytest.raises(KeyError, match="default"):
        gralora.delta_weight(layer, "other")
    with pytest.raises(TypeError, match="LayerNorm"):
        gralora.delta_weight(nn.LayerNorm(3))
    gralora.set_adapter(layer, [])
    with pytest.raises(KeyError):
        gralora.delta_weight(layer)
