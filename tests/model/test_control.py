"""Activate, disable, delete, count."""

import pytest
import torch
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig

from ..models import Block, assert_same, fingerprint, mlp, random_config, same_bits, two_adapters


def reference(model, x, weights):
    """Through W + Σ weight * ΔW."""
    for index, layer in ((0, model[0]), (2, model[2])):
        weight = layer.weight + sum(
            w * gralora.delta_weight(layer, name)
            for name, w in weights.items()
            if name in layer.gralora_adapters
        )
        x = F.linear(x, weight, layer.bias)
        x = torch.tanh(x) if index == 0 else x
    return x


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ("a", {"a": 1}),
        ("a_b", {"a_b": 1}),
        (["a", "a_b"], {"a": 1, "a_b": 1}),
        ({"a": 0.7, "a_b": -0.3}, {"a": 0.7, "a_b": -0.3}),
        ([], {}),
    ],
)
def test_set_adapter_makes_exactly_these_act_and_train(names, weights):
    model = two_adapters()
    x = torch.randn(5, 16)
    gralora.set_adapter(model, names)
    torch.testing.assert_close(model(x), reference(model, x, weights))
    for name in ("a", "a_b"):
        assert all(
            p.requires_grad is (name in weights) for p in gralora.adapter_parameters(model, name)
        )


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ("b", KeyError, "no adapter 'b' in this model; it has: a, a_b"),
        (["a", "c"], KeyError, "no adapter 'c'"),
        ({"a": float("nan")}, ValueError, "weight of adapter 'a' is nan"),
        ({"a": True}, ValueError, "weight of adapter 'a' is True"),
        (3, TypeError, "names=3"),
    ],
)
def test_set_adapter_refuses_and_changes_nothing(names, error, text):
    model = two_adapters()
    before = fingerprint(model)
    with pytest.raises(error) as raised:
        gralora.set_adapter(model, names)
    assert text in str(raised.value)
    assert_same(fingerprint(model), before)


def test_adapter_names_are_in_order():
    assert gralora.adapter_names(two_adapters()) == ["a", "a_b"]
    assert gralora.adapter_names(mlp(4, 4)) == []


def test_disable_adapter_gives_the_base_bit_for_bit_and_back():
    model = mlp(16, 24, 8)
    x = torch.randn(5, 16)
    base = model(x)
    gralora.inject(model, "all-linear", random_config(bias="all", modules_to_save=None))
    with torch.no_grad():
        model[0].gralora_adapters["default"].bias.add_(1)
    adapted = model(x)
    for prepare in (lambda: None, lambda: gralora.merge(model)):
        prepare()
        y, before = model(x), fingerprint(model)
        with gralora.disable_adapter(model):
            assert same_bits(model(x), base)
            with gralora.disable_adapter(model):
                assert same_bits(model(x), base)
            assert same_bits(model(x), base)
        with pytest.raises(RuntimeError, match="on purpose"), gralora.disable_adapter(model):
            raise RuntimeError("on purpose")
        assert same_bits(model(x), y)
        assert_same(fingerprint(model), before)
    torch.testing.assert_close(model(x), adapted)


def test_delete_adapter_removes_all_of_it():
    model = two_adapters()
    x = torch.randn(5, 16)
    gralora.set_adapter(model, ["a", "a_b"])
    gralora.delete_adapter(model, "a")
    assert gralora.adapter_names(model) == ["a_b"]
    torch.testing.assert_close(model(x), reference(model, x, {"a_b": 1}))
    with pytest.raises(KeyError, match="it has: a_b"):
        gralora.delete_adapter(model, "a")
    gralora.delete_adapter(model, "a_b")
    assert [n for n, _ in model.named_parameters() if "gralora_" in n] == []
    gralora.inject(model, ["0"], random_config(), adapter_name="c")
    torch.testing.assert_close(model(x), reference(model, x, {"c": 1}))


def test_a_merged_adapter_cannot_be_deleted():
    model = two_adapters()
    gralora.merge(model, "a")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="adapter 'a' is merged .* unmerge first"):
        gralora.delete_adapter(model, "a")
    assert_same(fingerprint(model), before)


def test_adapter_parameters_are_what_is_trained():
    model = Block()
    gralora.inject(model, ["q"], random_config(bias="gralora_only", modules_to_save=["head"]))
    assert {id(p) for p in gralora.adapter_parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert len(gralora.adapter_parameters(model, "default")) == 2 + 1 + 2
    with pytest.raises(KeyError):
        gralora.adapter_parameters(model, "other")


def test_mark_only_adapters_trainable_and_its_undoing():
    model = gralora.inject(Block(), ["q"], random_config(bias="all", modules_to_save=["head"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    gralora.mark_only_adapters_trainable(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    gralora.unload(model)
    assert all(p.requires_grad for p in model.parameters())


def test_counts_tied_parameters_once():
    model = mlp(8, 8, 8)
    model[2].weight = model[0].weight
    gralora.inject(model, ["0"], GraloraConfig(r=2))
    assert gralora.count_parameters(model) == (2 * 16, 2 * 16 + 64 + 16)
