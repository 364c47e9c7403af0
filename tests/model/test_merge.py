"""Into the weights, and exactly out again."""

import copy

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.model import merge as merging

from ..models import (
    Block,
    Doubled,
    assert_same,
    fingerprint,
    gpt2,
    logits,
    mlp,
    random_config,
    randomize_,
    relative,
    same_bits,
    two_adapters,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_merge_then_unmerge_restores_base_bit_for_bit(dtype, k):
    model = gralora.inject(Block().to(dtype), "all-linear", random_config(gralora_k=k, hybrid_r=1))
    x = torch.randn(2, 5, 16).to(dtype)
    before, y = fingerprint(model), model(x)
    gralora.merge(model)
    assert not same_bits(model.q.weight, before["tensors"]["q.weight"])
    assert relative(model(x).double(), y.double()) < TOLERANCE[dtype]
    gralora.unmerge(model)
    assert_same(fingerprint(model), before)
    assert same_bits(model(x), y)


def test_merge_of_conv1d():
    model = gralora.inject(gpt2(), ["c_attn", "c_proj"], random_config())
    y = logits(model)
    gralora.merge(model)
    assert relative(logits(model), y) < 1e-5
    layer = model.transformer.h[0].attn.c_attn
    base = layer.gralora_adapters.base_weight
    torch.testing.assert_close(layer.weight, base + gralora.delta_weight(layer))


def test_a_merged_layer_runs_nothing_but_its_base(monkeypatch):
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    gralora.merge(model)
    monkeypatch.setattr("gralora.layers.adapter.GraloraAdapter.forward", None)
    model(torch.randn(2, 16))


def test_merging_twice_and_in_parts_equals_merging_at_once():
    x = torch.randn(5, 16)
    results = []
    for steps in ([["a", "a_b"]], [["a"], ["a_b"]], [["a"], ["a", "a_b"], ["a", "a_b"]]):
        torch.manual_seed(1)
        model = two_adapters()
        gralora.set_adapter(model, {"a": 0.5, "a_b": 2.0})
        y = model(x)
        for names in steps:
            gralora.merge(model, names)
            torch.testing.assert_close(model(x), y)  # what is not merged yet goes on acting
        results.append(model[2].weight.clone())
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_set_adapter_unmerges_first():
    model = two_adapters()
    before = model[0].weight.clone()
    gralora.merge(model)
    gralora.set_adapter(model, "a_b")
    assert same_bits(model[0].weight, before)
    assert not model[0].gralora_adapters.merged


def test_tied_weights_are_merged_apart_and_tied_again():
    model = mlp(8, 8, 8)
    model[2].weight = model[0].weight
    gralora.inject(model, ["0", "2"], random_config())
    x = torch.randn(3, 8)
    y = model(x)
    gralora.merge(model)
    torch.testing.assert_close(model(x), y)
    assert model[0].weight is not model[2].weight
    gralora.unmerge(model)
    assert model[0].weight is model[2].weight
    torch.testing.assert_close(gralora.merge_and_unload(model)(x), y)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.out.weight = self.embedding.weight

    model = gralora.inject(Tied(), ["out"], random_config())
    embedding = model.embedding.weight.clone()
    gralora.merge_and_unload(model)
    assert same_bits(model.embedding.weight, embedding)
    assert not torch.equal(model.out.weight, embedding)


def test_unmerge_after_a_move_gives_the_base_in_the_new_type():
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    expected = model[0].weight.to(torch.bfloat16)
    gralora.merge(model)
    model.to(torch.bfloat16)
    gralora.unmerge(model)
    assert same_bits(model[0].weight, expected)


def test_merge_and_unload_gives_a_plain_model_in_place():
    for dtype in (torch.float32, torch.bfloat16):
        model = Block().to(dtype)
        keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
        parameters = dict(model.named_parameters())
        gralora.inject(model, "all-linear", random_config())
        x = torch.randn(2, 5, 16).to(dtype)
        y = model(x)
        assert gralora.merge_and_unload(model) is model
        assert relative(model(x).double(), y.double()) < TOLERANCE[dtype]
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == classes
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(p.requires_grad for p in model.parameters())


def test_merge_and_unload_keeps_saved_modules_and_biases():
    model = gralora.inject(
        Block(), ["q"], random_config(bias="all", modules_to_save=["head", "norm"])
    )
    with torch.no_grad():
        for p in gralora.adapter_parameters(model):
            p.add_(0.1)
    x = torch.randn(2, 5, 16)
    y = model(x)
    twin = copy.deepcopy(model)
    gralora.merge(twin)
    for m in (model, twin):
        torch.testing.assert_close(gralora.merge_and_unload(m)(x), y)
        assert not any("gralora_" in name for name in m.state_dict())
        assert type(m.head) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", [gralora.merge, gralora.merge_and_unload])
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(function, value):
    model = gralora.inject(Block(), ["q", "v"], random_config())
    model.v.gralora_adapters["default"].B.data[0, 0, 0] = value
    before = fingerprint(model)
    with pytest.raises(ValueError, match="not finite"):
        function(model)
    assert_same(fingerprint(model), before)


def test_safe_merge_refuses_an_overflow_of_float16():
    model = gralora.inject(mlp(16, 8, dtype=torch.float16), ["0"], random_config(alpha=1e9))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"not finite.*torch\.float16.*alpha too large"):
        gralora.merge(model)
    assert_same(fingerprint(model), before)
    gralora.merge(model, safe=False)
    assert not model[0].weight.isfinite().all()
    gralora.unmerge(model)
    assert_same(fingerprint(model), before)


def test_weights_that_are_no_plain_tensors_are_refused():
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(TypeError, match="'0' computes its weight"):
        gralora.merge(model)
    with torch.device("meta"):
        model = gralora.inject(mlp(16, 8), ["0"], random_config())
    with pytest.raises(TypeError, match="meta device"):
        gralora.merge(model)

    class Packed(nn.Parameter):
        pass

    model = mlp(16, 8)
    model[0].weight = Packed(torch.zeros(8, 16))
    gralora.inject(model, ["0"], random_config())
    for function in (gralora.merge, gralora.merge_and_unload):
        with pytest.raises(
            TypeError, match="Packed .* quantised or in a format of its own: merging would be wrong"
        ):
            function(model)


def test_a_forward_of_its_own_is_tried_before_it_is_merged():
    layer = gralora.inject(Doubled(16, 8), "", random_config())
    before = fingerprint(layer)
    for function in (gralora.merge, gralora.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"Doubled has a forward of its own that is not x @ Wᵀ"
        ):
            function(layer)
    assert_same(fingerprint(layer), before)

    class Logged(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    layer = gralora.inject(Logged(16, 8), "", random_config(gralora_dropout=0.5))
    gralora.merge(layer)
    assert layer.gralora_adapters["default"].training


def test_unknown_names_and_inactive_adapters():
    model = two_adapters()
    with pytest.raises(KeyError, match="it has: a, a_b"):
        gralora.merge(model, ["a", "zzz"])
    x = torch.randn(3, 16)
    gralora.set_adapter(model, "a_b")
    y = model(x)
    gralora.set_adapter(model, [])
    gralora.merge(model, "a_b")
    torch.testing.assert_close(model(x), y)


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_loading_a_base_into_merged_weights_is_refused():
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    state = mlp(16, 8).state_dict()
    gralora.merge(model)
    with pytest.raises(RuntimeError, match="unmerge, then load"):
        model.load_state_dict(state)
    gralora.unmerge(model)
    model.load_state_dict(state)


def test_delta_weight_sums_the_active_ones():
    model = two_adapters()
    gralora.set_adapter(model, {"a": 2.0, "a_b": 0.5})
    layer = model[2]
    expected = 2 * gralora.delta_weight(layer, "a") + 0.5 * gralora.delta_weight(layer, "a_b")
    torch.testing.assert_close(gralora.delta_weight(layer), expected)


def test_merge_during_training_is_not_silently_trained():
    model = gralora.inject(mlp(16, 8), ["0"], GraloraConfig(r=4))
    randomize_(model)
    gralora.merge(model)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(torch.randn(2, 16)).sum().backward()


class Halves(nn.Linear):
    """A quantised layer of our own making: int8 and one scale, in a parameter that only it
    understands.
    """

    def __init__(self, linear):
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_merge_and_unload_makes_a_plain_layer_of_a_quantised_one(bias):
    model = nn.Sequential(Halves(nn.Linear(16, 24, bias=bias)), nn.Tanh(), nn.Linear(24, 8))
    gralora.inject(model, "all-linear", random_config(hybrid_r=2))
    layer, hits, x = model[0], [], torch.randn(5, 16)
    layer.register_forward_hook(lambda *_: hits.append(1))
    y = model(x)
    before = fingerprint(model)
    with pytest.raises(TypeError, match="dequantize=torch.bfloat16"):
        gralora.merge_and_unload(model)
    assert_same(fingerprint(model), before)
    with gralora.disable_adapter(model):
        assert relative(model(x), y) > 0.05
    gralora.merge_and_unload(model, dequantize=torch.float32)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert model[0] is layer
    hits.clear()
    torch.testing.assert_close(model(x), y)
    assert hits == [1]
    assert set(model.state_dict()) == {n for n in before["tensors"] if "gralora_" not in n}


def test_merging_walks_the_model_as_often_for_many_layers_as_for_two(monkeypatch):
    walks = []
    real = merging.gralora_layers
    monkeypatch.setattr(merging, "gralora_layers", lambda model: walks.append(1) or real(model))
    for count in (2, 40):
        walks.clear()
        gralora.merge(gralora.inject(mlp(*[4] * (count + 1)), "all-linear", random_config()))
        assert len(walks) == 1


def test_any_subset_is_merged_with_weights_and_merging_it_again_changes_nothing():
    model = two_adapters()
    gralora.set_adapter(model, {"a": 0.5, "a_b": 2.0})
    x, base = torch.randn(5, 16), model[2].weight.clone()
    deltas = {name: gralora.delta_weight(model[2], name) for name in ("a", "a_b")}
    gralora.merge(model, {"a": -1.5})
    torch.testing.assert_close(model[2].weight, base - 1.5 * deltas["a"])
    merged = fingerprint(model)
    for again in ({"a": -1.5}, "a", ["a"]):
        gralora.merge(model, again)
        assert_same(fingerprint(model), merged)
    gralora.merge(model, {"a": 0.25, "a_b": 1.0})  # from the base, not on top
    torch.testing.assert_close(model[2].weight, base + 0.25 * deltas["a"] + deltas["a_b"])
    gralora.unmerge(model)
    assert same_bits(model[2].weight, base)
    with pytest.raises(ValueError, match="the weight of adapter 'a' is nan"):
        gralora.merge(model, {"a": float("nan")})
    assert same_bits(model[2].weight, base) and model(x).isfinite().all()


def test_merging_more_leaves_what_is_merged_at_its_weight():
    model = two_adapters()
    base = model[2].weight.clone()
    deltas = {name: gralora.delta_weight(model[2], name) for name in ("a", "a_b")}
    gralora.merge(model, {"a": -2.0})
    gralora.merge(model, ["a", "a_b"])
    torch.testing.assert_close(model[2].weight, base - 2 * deltas["a"] + deltas["a_b"])
