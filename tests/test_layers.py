import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig, GraloraConv1D, GraloraLayer, GraloraLinear, adapted_class

from .models import mlp, random_config, relative, same_bits


class Doubled(nn.Linear):
    """A subclass with a forward of its own, at module level so that pickle finds it."""

    def forward(self, input):
        return 2 * super().forward(input)


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


@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.float64), (False, torch.bfloat16)])
def test_drop_in_arguments_are_those_of_linear(bias, dtype):
    layer = GraloraLinear(16, 8, bias, device="cpu", dtype=dtype, adapter_name="mine")
    assert (layer.bias is not None) is bias
    assert layer.weight.dtype == dtype
    adapter = layer.gralora_adapters["mine"]
    assert adapter.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer(torch.randn(2, 16, dtype=dtype)).dtype == dtype


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
    torch.testing.assert_close(layer(x), x @ (conv.weight + gralora.delta_weight(layer)) + conv.bias)
    with pytest.raises(TypeError, match="GraloraConv1D cannot stand in for a Linear"):
        GraloraConv1D.from_conv1d(nn.Linear(2, 2), GraloraConfig(r=2))
    with pytest.raises(TypeError, match="adapted already"):
        GraloraConv1D.from_conv1d(layer, GraloraConfig(r=2))


@pytest.mark.parametrize("kind", [lambda c: GraloraLinear(16, 8, config=c), lambda c: GraloraConv1D(8, 16, config=c)])
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


def test_adapted_class_ends_in_the_own_forward_of_the_class():
    made = adapted_class(Doubled)
    assert made is adapted_class(Doubled)
    assert made.__name__ == "GraloraDoubled"
    assert issubclass(made, GraloraLinear) and issubclass(made, Doubled)
    assert adapted_class(nn.Linear) is GraloraLinear
    assert adapted_class(made) is made
    assert made.__mro__.index(Doubled) > made.__mro__.index(GraloraLayer)
    with pytest.raises(TypeError, match="LayerNorm cannot be adapted as a layer"):
        adapted_class(nn.LayerNorm)

    layer = Doubled(16, 8)
    x = torch.randn(3, 16)
    base = layer(x)
    gralora.inject(layer, "", random_config())
    torch.testing.assert_close(layer(x), base + F.linear(x, gralora.delta_weight(layer)))


@pytest.mark.parametrize("cls", [nn.Linear, Doubled])
def test_deepcopy_pickle_and_save_of_adapted_layers(cls):
    layer = gralora.inject(cls(16, 8), "", random_config())
    x = torch.randn(3, 16)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(layer)
        assert same_bits(twin(x), layer(x))
        assert twin.gralora_adapters["default"].A is not layer.gralora_adapters["default"].A
        twin.gralora_adapters["default"].B.data.zero_()
        assert not torch.equal(twin(x), layer(x))
        gralora.unload(twin)
        assert type(twin) is cls


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


def test_a_model_on_meta_is_injected_there_and_reset_later():
    with torch.device("meta"):
        model = mlp(16, 8)
    gralora.inject(model, ["0"], GraloraConfig(r=4))
    assert model[0].gralora_adapters["default"].A.is_meta
    model.to_empty(device="cpu")
    model[0].gralora_adapters["default"].reset_parameters()
    assert model[0].gralora_adapters["default"].B.count_nonzero() == 0


@pytest.mark.parametrize("name", ["forward", "training", "items", "a b", "ä"])
def test_any_name_without_a_dot_names_an_adapter(name):
    model = gralora.inject(mlp(16, 8), ["0"], random_config(), adapter_name=name)
    assert gralora.adapter_names(model) == [name]
    assert model(torch.randn(2, 16)).shape == (2, 8)


@pytest.mark.parametrize(("name", "error"), [("a.b", ValueError), ("", ValueError), (3, TypeError), (None, TypeError)])
def test_other_names_are_refused(name, error):
    with pytest.raises(error, match="adapter_name"):
        gralora.inject(mlp(16, 8), ["0"], adapter_name=name)


def test_delta_weight_of_what_is_not_there_is_an_error():
    layer = GraloraLinear(16, 8)
    with pytest.raises(KeyError, match="default"):
        gralora.delta_weight(layer, "other")
    with pytest.raises(TypeError, match="LayerNorm"):
        gralora.delta_weight(nn.LayerNorm(3))
    gralora.set_adapter(layer, [])
    with pytest.raises(KeyError):
        gralora.delta_weight(layer)
