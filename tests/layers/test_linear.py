"""The drop-in layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import gralora
from gralora import GraloraConfig, GraloraConv1D, GraloraLinear

from ..models import random_config, relative, same_bits


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
        layer.load_state_dict(
            other.state_dict()
        )  # strictly: it holds no adapter, and none is missed
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


def _wrap_forward(layer):
    real = layer.forward  # as accelerate does it
    layer.forward = lambda x: real(x) + 1


def _hook(adapter):
    adapter.register_forward_hook(lambda module, args, out: out * 2)


class Plus(nn.Module):
    """A parametrisation that shows."""

    def forward(self, x):
        return x + 1


CHANGES = {
    "nothing": lambda model: None,
    "merged": gralora.merge,
    "none active": lambda model: gralora.set_adapter(model, []),
    "two active": lambda model: gralora.set_adapter(model, {"a": 0.5, "b": 2.0}),
    "the other, weighted": lambda model: gralora.set_adapter(model, {"b": -1.5}),
    "a bias that is computed": lambda model: parametrize.register_parametrization(
        model[0], "bias", Plus()
    ),
    "a weight that is computed": lambda model: parametrize.register_parametrization(
        model[0], "weight", Plus()
    ),
    "an adapter that is computed": lambda model: parametrize.register_parametrization(
        model[0].gralora_adapters["a"], "A", Plus()
    ),
    "a forward of the instance": lambda model: _wrap_forward(model[0]),
    "a hook on the adapter": lambda model: _hook(model[0].gralora_adapters["a"]),
    "another weight": lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(16, 16))),
    "a base of another type": lambda model: model[0].to(torch.bfloat16),
    "an adapter of another type": lambda model: model[0].gralora_adapters.to(torch.float64),
    "no bias": lambda model: setattr(model[0], "bias", None),
    "a larger rank": lambda model: gralora.prepare_hotswap(model, 8, "a"),
}


@pytest.mark.parametrize("kind", [nn.Linear, GraloraConv1D])
@pytest.mark.parametrize("change", CHANGES)
def test_without_gradients_whatever_was_changed_it_computes_what_it_does_with_them(kind, change):
    model = nn.Sequential(gralora.unload(kind(16, 16)))
    nn.init.normal_(model[0].bias)
    for name in ("a", "b"):
        gralora.inject(model, ["0"], random_config(alpha=4, use_rslora=True), adapter_name=name)
    x = torch.randn(1, 16)
    with torch.no_grad():
        before = model(x)
        CHANGES[change](model)
        x = x.to(model[0]._parameters["weight"].dtype) if "weight" in model[0]._parameters else x
        y = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x)
    given = x.clone().requires_grad_()
    torch.testing.assert_close(
        y, model(given).detach(), rtol=1e-2 if y.dtype is torch.bfloat16 else 1e-5, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rounded, model(given).detach(), rtol=3e-2, atol=3e-2)
    same = relative(y.float(), before) < 1e-2
    assert same is (
        change
        in (
            "nothing",
            "merged",
            "a base of another type",
            "an adapter of another type",
            "a larger rank",
        )
    )


def test_without_gradients_blocks_and_dropout_count():
    model = gralora.inject(
        nn.Sequential(nn.Linear(16, 16)), ["0"], random_config(gralora_dropout=0.5)
    )
    plain, x = gralora.unload(copy.deepcopy(model)), torch.randn(1, 16)
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x))
        y = model.eval()(x)
        assert torch.equal(y, model(x)) and not torch.allclose(y, plain(x))
        with gralora.disable_adapter(model):
            assert same_bits(model(x), plain(x))
        with gralora.mixed_batch(model, [None]):
            assert same_bits(model(x), plain(x))
        assert same_bits(model(x), y)
        assert model(torch.empty(0, 16)).shape == (0, 16)
        assert model(torch.randn(2, 3, 16)).shape == (2, 3, 16)
        view = torch.randn(16, 5).t()
        torch.testing.assert_close(model(view), model(view.contiguous()))
