"""Every known way in which an adapter could be injected and do nothing."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import gralora
from gralora.layers import gralora_layers

from .models import assert_same, bert, fingerprint, gpt2, llama, logits, mlp, random_config, same_bits

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
    "encoder with mask": (encoder, lambda m: m(X, src_key_padding_mask=torch.arange(5).expand(2, 5) > 3)),
    "decoder": (decoder, lambda m: m(X, X)),
    "bert": (bert, logits),
    "gpt2": (gpt2, logits),
    "llama": (llama, logits),
}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": contextlib.nullcontext}


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


def test_a_forward_that_accelerate_set_before_inject_is_kept_and_the_adapter_acts():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = mlp(16, 16)
    base = model(X)
    add_hook_to_module(model[0], Counting())
    gralora.inject(model, ["0"], random_config())
    y = model(X)
    assert Counting.calls == 1
    assert not torch.allclose(y, base)
    add_hook_to_module(model[0], Counting())  # replaced
    assert same_bits(model(X), y)
    assert Counting.calls == 2
    add_hook_to_module(model[0], Counting(), append=True)
    assert same_bits(model(X), y)
    remove_hook_from_module(model[0])
    assert same_bits(model(X), y)
    assert same_bits(gralora.unload(model)(X), base)


def test_hooks_of_accelerate_before_inject_survive_unload_and_those_after_too():
    from accelerate.hooks import ModelHook, add_hook_to_module

    for order in ("before", "after"):
        model = mlp(16, 16)
        base = model(X)
        if order == "before":
            add_hook_to_module(model[0], ModelHook())
        before = fingerprint(model)
        gralora.inject(model, ["0"], random_config())
        if order == "after":
            add_hook_to_module(model[0], ModelHook())
        assert not torch.allclose(model(X), base)
        assert not torch.allclose(copy.deepcopy(model)(X), base)
        gralora.unload(model)
        assert same_bits(model(X), base)
        if order == "before":
            assert_same(fingerprint(model), before)


def test_the_fused_path_of_the_encoder_layer_is_off_whether_or_not_its_owner_is_seen():
    layer = encoder().layers[0].eval()
    with torch.no_grad():
        base = layer(X)
        gralora.inject(layer.linear1, "", random_config(alpha=32))  # the parent is not in sight
        assert not torch.allclose(layer(X), base)
        gralora.unload(layer.linear1)
        assert same_bits(layer(X), base)


def test_the_fused_path_stays_off_in_copies_and_drop_in_layers():
    model = gralora.inject(encoder(), "all-linear", random_config(alpha=32))
    with torch.no_grad():
        y = model(X)
        assert same_bits(copy.deepcopy(model)(X), y)
        layer = encoder().layers[0].eval()
        base = layer(X)
        layer.linear2 = gralora.GraloraLinear.from_linear(layer.linear2, random_config(alpha=32))
        assert not torch.allclose(layer(X), base)


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
    "targets", [["self_attn.out_proj"], r".*out_proj", lambda name, module: name.endswith("out_proj")]
)
def test_out_proj_of_multihead_attention_has_an_effect(targets):
    model = encoder()
    with torch.no_grad():
        base = model(X)
        gralora.inject(model, targets, random_config(alpha=32))
        assert not torch.allclose(model(X), base)


def test_out_proj_has_an_effect_when_replaced_by_a_linear_layer_and_is_refused_when_alone_in_sight():
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
def test_a_layer_that_returns_no_tensor_says_so_at_the_first_forward(grad):
    model = gralora.inject(nn.ModuleDict({"router": Router(16, 4)}), "all-linear", random_config())
    with torch.set_grad_enabled(grad):
        with pytest.raises(TypeError, match=r"the forward of Router returns a tuple.*exclude_modules"):
            model["router"](X)
        with gralora.mixed_batch(model, ["default", None]), pytest.raises(TypeError, match="the forward of Router"):
            model["router"](X)
        with gralora.disable_adapter(model):
            assert len(model["router"](X)) == 2


class Reads(nn.Module):
    """Computes with a weight, and never calls the layer; or does both; or only asks for its type."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(16, 16), how

    def forward(self, x):
        return self.deeper(x)

    def deeper(self, x):
        return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)


class Alias(Reads):
    def deeper(self, x):
        weight = self.fc.weight
        return x.to(self.fc.weight.dtype) @ weight.mT


class Calls(Reads):
    def deeper(self, x):
        x = x.to(self.fc.weight.dtype).to(self.fc.weight.device)
        return self.fc.forward(x) if self.how == "forward" else self.fc(x) + self.fc.weight.square().mean()


@pytest.mark.parametrize("cls", [Reads, Alias])
def test_a_parent_that_reads_the_weight_and_never_calls_the_layer_is_refused_by_name(cls):
    model = nn.Sequential(cls(""), nn.Linear(16, 16))
    before = fingerprint(model)
    text = f"'0.fc' has its weight read by the forward of {cls.__name__}, which never calls it: an adapter would have no effect"
    for targets in (["fc"], r".*fc", lambda name, module: isinstance(module, nn.Linear)):
        with pytest.raises(ValueError, match=text):
            gralora.inject(model, targets, random_config())
    assert_same(fingerprint(model), before)
    gralora.inject(model, "all-linear", random_config())
    assert [name for name, _ in gralora_layers(model)] == ["1"]
    alone = cls("")
    gralora.inject(alone.fc, "", random_config())  # the parent is not in sight: see README, Limits


@pytest.mark.parametrize("how", ["call", "forward"])
def test_a_parent_that_calls_the_layer_in_any_way_is_adapted(how):
    model = Calls(how)
    base = model(X)
    gralora.inject(model, ["fc"], random_config())
    assert not torch.allclose(model(X), base)


def test_a_layer_shared_by_one_that_calls_and_one_that_reads_is_adapted():
    model = nn.ModuleDict({"calls": Calls("call"), "reads": Reads("")})
    model["reads"].fc = model["calls"].fc
    base = model["calls"](X)
    gralora.inject(model, ["calls.fc"], random_config())
    assert not torch.allclose(model["calls"](X), base)


@pytest.mark.parametrize("when", ["before inject", "after inject"])
def test_compiled_before_or_after_inject(when):
    model = mlp(16, 16)
    if when == "before inject":
        compiled = torch.compile(model, backend="eager")
        base = compiled(X)
        gralora.inject(model, ["0"], random_config())
    else:
        base = model(X)
        gralora.inject(model, ["0"], random_config())
        compiled = torch.compile(model, backend="eager")
    assert not torch.allclose(compiled(X), base)
    torch.testing.assert_close(compiled(X), model(X))
    gralora.unload(model)
    torch.testing.assert_close(compiled(X), base)


def test_inject_into_a_compiled_model_itself():
    compiled = torch.compile(mlp(16, 16), backend="eager")
    base = compiled(X)
    gralora.inject(compiled, "all-linear", random_config())
    assert not torch.allclose(compiled(X), base)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_or_traced_module_is_no_target_and_says_so():
    for make in (torch.jit.script, lambda m: torch.jit.trace(m, X)):
        model = nn.ModuleDict({"jit": make(nn.Linear(16, 16)), "fc": nn.Linear(16, 16)})
        with pytest.raises(ValueError, match=r"'jit' is a \w+; adaptable are"):
            gralora.inject(model, ["jit"], random_config())


def test_a_layer_called_past_its_call_operator():
    layer = nn.Linear(16, 16)
    base = layer(X)
    gralora.inject(layer, "", random_config())
    for call in (layer.forward, lambda x: nn.Module.__call__(layer, x), lambda x: type(layer).forward(layer, x)):
        assert not torch.allclose(call(X), base)


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
    assert same_bits(model["tied"](X), base)  # the tie is of the base's weight; the adapter is the layer's own
    assert len(list(gralora_layers(model))) == 1


def test_a_parent_whose_source_is_not_at_hand_is_not_judged():
    space = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x @ self.fc.weight.mT\n", space)
    parent = space["Hidden"]()
    parent.fc = nn.Linear(16, 16)
    gralora.inject(parent, ["fc"], random_config())  # see README, Limits
    assert isinstance(parent.fc, gralora.GraloraLinear)
