"""Every known way in which an adapter could be injected and do nothing."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import gralora
from gralora.layers.base import gralora_layers

from .models import bert, gpt2, llama, logits, mlp, random_config, relative, same_bits

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def encoder(layers=2, **kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, **kwargs)
    return nn.TransformerEncoder(layer, layers).eval()


def decoder():
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerDecoder(layer, 1).eval()


def hooked():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = mlp(16, 16, 16)
    add_hook_to_module(model[0], ModelHook())
    return model


MODELS = {
    "mlp": (lambda: mlp(16, 16, 16), lambda m: m(X)),
    "accelerate": (hooked, lambda m: m(X)),
    "encoder layer": (lambda: encoder().layers[0].eval(), lambda m: m(X)),
    "encoder": (encoder, lambda m: m(X)),
    "encoder with mask": (
        encoder,
        lambda m: m(X, src_key_padding_mask=torch.arange(5).expand(2, 5) > 3),
    ),
    "decoder": (decoder, lambda m: m(X, X)),
    "bert": (bert, logits),
    "gpt2": (gpt2, logits),
    "llama": (llama, logits),
}
MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": contextlib.nullcontext,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_each_adapted_layer_alone_changes_the_output(name, mode):
    make, run = MODELS[name]
    model = gralora.inject(make(), "all-linear", random_config(alpha=32))
    layers = dict(gralora_layers(model))
    assert layers
    with MODES[mode]():
        with gralora.disable_adapter(model):
            base = run(model).clone()
        for alone in layers:
            for path, layer in layers.items():
                layer.gralora_adapters.active = {"default": 1.0} if path == alone else {}
            assert not torch.allclose(run(model), base), f"{alone} has no effect"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_a_padding_mask_runs_in_eval_and_has_its_flag_back_after_unload():
    model = encoder()
    assert model.use_nested_tensor
    mask = torch.arange(5).expand(2, 5) > 3
    with torch.no_grad():
        base = model(X, src_key_padding_mask=mask)
        gralora.inject(model, ["linear1"], random_config())
        adapted = model(X, src_key_padding_mask=mask)
        assert not torch.allclose(adapted[~mask], base[~mask])
        assert not model.use_nested_tensor
        gralora.unload(model)
        assert model.use_nested_tensor
        assert same_bits(model(X, src_key_padding_mask=mask), base)


@pytest.mark.parametrize(
    "targets",
    [["self_attn.out_proj"], r".*out_proj", lambda name, module: name.endswith("out_proj")],
)
def test_out_proj_of_multihead_attention_has_an_effect(targets):
    model = encoder()
    with torch.no_grad():
        base = model(X)
        gralora.inject(model, targets, random_config(alpha=32))
        assert not torch.allclose(model(X), base)


def test_out_proj_has_an_effect_as_a_plain_linear_and_is_refused_when_targeted_alone():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match="never calls it"):
        gralora.inject(attention.out_proj, "", random_config())
    attention.out_proj = nn.Linear(16, 16)
    base = attention(X, X, X)[0]
    gralora.inject(attention, ["out_proj"], random_config())
    assert not torch.allclose(attention(X, X, X)[0], base)


class Router(nn.Linear):
    """A linear layer by class that returns something else, as Llama 4's router does."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_that_returns_more_than_a_tensor_computes_with_w_plus_delta_w(grad):
    base = Router(16, 4)
    model = gralora.inject(
        nn.ModuleDict({"router": copy.deepcopy(base)}), "all-linear", random_config()
    )
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain.weight.add_(gralora.delta_weight(model["router"]))
    x = X[:, 0]
    with torch.set_grad_enabled(grad):
        for mine, wanted, was in zip(model["router"](x), plain(x), base(x), strict=True):
            assert relative(mine, wanted) < 1e-5 and relative(mine, was) > 1e-2
        with gralora.mixed_batch(model, ["default", *[None] * (len(x) - 1)]):
            mixed = model["router"](x)[1]
        assert (
            relative(mixed[0], plain(x)[1][0]) < 1e-5 and relative(mixed[1:], base(x)[1][1:]) < 1e-5
        )
        with gralora.disable_adapter(model):
            assert all(torch.equal(a, b) for a, b in zip(model["router"](x), base(x), strict=True))
    if grad:
        model["router"](x)[1].sum().backward()
        assert all(p.grad is not None for p in gralora.adapter_parameters(model))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_get_the_update():
    layer, tensors = nn.Linear(16, 16), [torch.randn(3, 16), torch.randn(5, 16)]
    gralora.inject(layer, "", random_config())
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(tensors, layout=layout)
        for mine, x in zip(layer(nested).unbind(), tensors, strict=True):
            torch.testing.assert_close(mine, layer(x))


def test_a_module_reached_by_two_names_and_one_whose_weight_is_tied():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared, "tied": nn.Linear(16, 16)})
    model["tied"].weight = shared.weight
    base = model["tied"](X)
    gralora.inject(model, ["b"], random_config())
    assert not torch.allclose(model["a"](X), nn.functional.linear(X, shared.weight, shared.bias))
    assert same_bits(
        model["tied"](X), base
    )  # the tie is of the base's weight; the adapter is the layer's own
    assert len(list(gralora_layers(model))) == 1
