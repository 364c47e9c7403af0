"""What users do with a model that has adapters: copy, pickle, move, cast, prune, average, save
whole.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gralora
from gralora import GraloraConfig, GraloraLinear

from .models import (
    Block,
    X,
    assert_same,
    everything,
    fingerprint,
    mlp,
    random_config,
    randomize_,
    relative,
    same_bits,
)


class Mixer(nn.Module):
    """An architecture written with the layers."""

    def __init__(self, linear=GraloraLinear, **config):
        super().__init__()
        extra = (
            {"config": GraloraConfig(r=8, gralora_k=4, **config)} if linear is GraloraLinear else {}
        )
        self.up, self.down = linear(16, 32, **extra), linear(32, 16, bias=False, **extra)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_an_architecture_of_drop_in_layers_takes_the_weights_of_a_plain_one():
    plain, x = Mixer(nn.Linear), torch.randn(4, 16)
    model = Mixer()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (
        not missing and not unexpected
    )  # what is missing is the adapters', which keep their values
    assert same_bits(model(x), plain(x))
    randomize_(model)
    assert not torch.allclose(model(x), plain(x))
    model.load_state_dict(plain.state_dict())
    with gralora.disable_adapter(model):
        assert same_bits(model(x), plain(x))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.gralora_adapters.default.{letter}" for layer in ("up", "down") for letter in "AB"
    }


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved_and_loaded(model),
}


def _saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("state", ["active", "weighted", "merged", "none"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_the_whole_model(how, state):
    model = everything()
    base = model(X)
    names = {
        "active": "a",
        "weighted": {"a": 0.5, "b": 2.0},
        "merged": {"a": 0.5, "b": 2.0},
        "none": [],
    }[state]
    gralora.set_adapter(model, names)
    y = model(X)
    if state == "merged":
        gralora.merge(model)
        merged = model(X)
        torch.testing.assert_close(merged, y, rtol=1e-4, atol=1e-5)
    before, now = fingerprint(model), model(X)
    other = COPIES[how](model)
    assert same_bits(other(X), now)
    assert type(other.block.q) is type(model.block.q) and type(other.attention) is type(
        model.attention
    )
    randomize_(other)
    gralora.set_adapter(other, "b")
    assert relative(other(X), y) > 1e-3
    assert_same(fingerprint(model), before)
    assert same_bits(model(X), now)
    gralora.unload(other)
    plain = gralora.unload(model)
    assert same_bits(other(X), plain(X))
    assert not torch.allclose(plain(X), base)
    assert {name: type(m) for name, m in other.named_modules()} == {
        name: type(m) for name, m in plain.named_modules()
    }


def test_moving_and_casting_the_whole_model():
    model = everything()
    y = model(X)
    double = copy.deepcopy(model).to(torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    torch.testing.assert_close(double(X.double()), y.double(), rtol=1e-4, atol=1e-4)
    for cast in (lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half()):
        half = cast(copy.deepcopy(model))
        dtype = half.block.q.weight.dtype
        assert dtype.itemsize == 2 and half.block.q.gralora_adapters["a"].A.dtype is torch.float32
        assert relative(half(X.to(dtype)).float(), y) < 0.1
    meta = copy.deepcopy(model).to("meta")
    assert all(p.is_meta for p in meta.parameters())
    moved = meta.to_empty(device="cpu")
    moved.load_state_dict(model.state_dict())
    assert same_bits(moved(X), y)


def test_a_merged_model_that_is_cast_is_unmerged_in_the_new_type():
    model = everything()
    gralora.merge(model)
    model.to(torch.float64)
    y = model(X.double())
    gralora.unmerge(model)
    torch.testing.assert_close(model(X.double()), y, rtol=1e-4, atol=1e-4)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_state_dict_of_the_adapted_model_goes_round():
    model = everything()
    gralora.set_adapter(model, {"a": 0.5, "b": 2.0})
    y = model(X)
    other = everything()
    randomize_(other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    gralora.set_adapter(other, {"a": 0.5, "b": 2.0})
    assert same_bits(other(X), y)
    assert set(model.state_dict()) == {
        *dict(model.named_parameters()),
        *dict(model.named_buffers()),
    } | {name for name in model.state_dict() if "gralora_saved" in name}


WAYS = {
    "prune before": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "before"),
    "prune after": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "after"),
    "weight_norm before": (parametrizations.weight_norm, "before"),
    "weight_norm after": (parametrizations.weight_norm, "after"),
    "spectral_norm before": (lambda layer: parametrizations.spectral_norm(layer).eval(), "before"),
    "orthogonal before": (parametrizations.orthogonal, "before"),
    "old weight_norm before": (nn.utils.weight_norm, "before"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_pruned_and_normed_targets_are_adapted_and_never_merged_wrongly(way):
    change, when = WAYS[way]
    model, x = mlp(16, 16), torch.randn(4, 16)
    if when == "before":
        change(model[0])
    gralora.inject(model, ["0"], random_config())
    if when == "after":
        change(model[0])
    layer = model[0]
    expected = nn.functional.linear(x, layer.weight + gralora.delta_weight(layer), layer.bias)
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert layer.gralora_adapters["default"].A.grad is not None
    before = fingerprint(model)
    with pytest.raises(TypeError, match="'0' computes its weight"):
        gralora.merge(model)
    assert_same(fingerprint(model), before)
    with gralora.disable_adapter(model):
        base = model(x)
    assert not torch.allclose(base, expected)
    if when == "before":
        assert same_bits(gralora.unload(model)(x), base)
        if parametrize.is_parametrized(model[0]):
            parametrize.remove_parametrizations(model[0], "weight")
            assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("ema", [True, False])
def test_averaged_copies(ema):
    model = gralora.inject(Block(), "all-linear", GraloraConfig(r=4))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None)
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-2)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        values.append(model.q.gralora_adapters["default"].B.detach().clone())
    expected = (
        0.5 * (0.5 * values[0] + 0.5 * values[1]) + 0.5 * values[2] if ema else sum(values) / 3
    )
    torch.testing.assert_close(average.module.q.gralora_adapters["default"].B.detach(), expected)
    torch.testing.assert_close(average.module.q.weight, model.q.weight, rtol=1e-6, atol=1e-7)
    assert relative(average(X), model(X)) > 1e-6
    assert set(gralora.adapter_state_dict(average.module)) == set(gralora.adapter_state_dict(model))


def test_a_copy_by_from_linear_pickles_and_casts():
    linear = nn.Linear(16, 8)
    layer = GraloraLinear.from_linear(linear, random_config())
    x = torch.randn(2, 16)
    y = layer(x)
    assert same_bits(pickle.loads(pickle.dumps(layer))(x), y)
    torch.testing.assert_close(
        copy.deepcopy(layer).double()(x.double()), y.double(), rtol=1e-5, atol=1e-5
    )
    assert linear.weight.dtype == torch.float32 and layer.weight is linear.weight
