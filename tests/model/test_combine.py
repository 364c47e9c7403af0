"""One adapter out of others."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora.layers.base import gralora_layers

from ..models import (
    Block,
    Experts,
    assert_same,
    fingerprint,
    gpt2,
    logits,
    mlp,
    random_config,
    randomize_,
    relative,
    same_bits,
)


def model_of(**configs):
    """One adapter a name, of these fields; in float64."""
    model = mlp(24, 48, 24, dtype=torch.float64)
    for name, fields in configs.items():
        gralora.inject(
            model, fields.pop("targets", "all-linear"), random_config(**fields), adapter_name=name
        )
    randomize_(model)
    return model


SAME_K = {
    "a": {"r": 4, "alpha": 3, "use_rslora": True},
    "b": {"r": 8, "hybrid_r": 2},
    "c": {"r": 2, "targets": ["2"]},
}
OTHER_K = {
    "a": {"r": 4, "gralora_k": 2},
    "b": {"r": 6, "gralora_k": 3, "hybrid_r": 1},
    "c": {"r": 4, "gralora_k": 4},
}


@pytest.mark.parametrize("configs", [SAME_K, OTHER_K], ids=["same k", "other k"])
@pytest.mark.parametrize("weights", [[0.7, 0.3, -1.0], None])
def test_exact_equals_the_weighted_adapters_side_by_side(configs, weights):
    model = model_of(**copy.deepcopy(configs))
    x, errors = torch.randn(5, 24, dtype=torch.float64), {}
    gralora.combine(model, ["a", "b", "c"], weights, "new", errors=errors)
    assert set(gralora.adapter_names(model)) == {"a", "b", "c", "new"}
    assert set(errors) == {"0", "2"} and set(errors.values()) == {0.0}
    shares = dict(zip("abc", weights or [1.0] * 3))
    gralora.set_adapter(model, shares)
    y = model(x)
    deltas = {n: gralora.delta_weight(layer) for n, layer in gralora_layers(model)}
    gralora.set_adapter(model, [])
    base = model(x)
    gralora.set_adapter(model, "new")
    assert relative(y, base) > 1e-2
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)
    for name, layer in gralora_layers(model):
        torch.testing.assert_close(
            gralora.delta_weight(layer), deltas[name], rtol=1e-11, atol=1e-11
        )


def test_ranks_add_up_within_the_least_common_multiple_of_the_ks():
    model = model_of(**copy.deepcopy(OTHER_K))
    gralora.combine(model, ["a", "b"], [1, 1], "ab")
    config = model[0].gralora_adapters["ab"].config
    assert (config.gralora_k, config.r, config.hybrid_r, config.scaling) == (
        6,
        4 * 3 + 6 * 2,
        1,
        1.0,
    )
    gralora.combine(model, {"a": 2.0}, None, "a2")
    assert model[0].gralora_adapters["a2"].config.r == 4
    torch.testing.assert_close(
        gralora.delta_weight(model[0], "a2"), 2 * gralora.delta_weight(model[0], "a")
    )


def test_it_is_added_inactive_and_frozen_and_changes_nothing_else():
    model = model_of(**copy.deepcopy(SAME_K))
    x = torch.randn(5, 24, dtype=torch.float64)
    y, before = model(x), fingerprint(model)
    gralora.combine(model, ["a", "b"], [1, 1], "new")
    assert same_bits(model(x), y)
    assert not any(p.requires_grad for p in gralora.adapter_parameters(model, "new"))
    gralora.delete_adapter(model, "new")
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_svd_gives_the_nearest_of_its_rank_and_tells_the_error(k):
    model = model_of(**copy.deepcopy(SAME_K))
    errors = {}
    gralora.combine(
        model, ["a", "b"], [0.7, 0.3], "low", how="svd", r=4, gralora_k=k, errors=errors
    )
    config = model[0].gralora_adapters["low"].config
    assert (config.r, config.gralora_k) == (4, k or 2)
    gralora.set_adapter(model, {"a": 0.7, "b": 0.3})
    for name, layer in gralora_layers(model):
        delta, low = (gralora.delta_weight(layer, name).detach() for name in (None, "low"))
        assert 0.01 < errors[name] < 1
        assert errors[name] == pytest.approx(float((low - delta).norm() / delta.norm()), rel=1e-9)
    gralora.combine(model, ["a", "b"], [0.7, 0.3], "high", how="svd", r=24, errors=errors)
    assert max(errors.values()) < 1e-12


def test_svd_of_one_adapter_at_its_own_rank_is_that_adapter():
    model, errors = model_of(a={"r": 8, "gralora_k": 4}), {}
    gralora.combine(model, ["a"], None, "again", how="svd", errors=errors)
    assert max(errors.values()) < 1e-12
    assert model[0].gralora_adapters["again"].config.r == 8


@pytest.mark.filterwarnings("ignore:Adapter name")  # PEFT's, about "a"
@pytest.mark.parametrize(
    "how", ["ties", "magnitude_prune"]
)  # what dare draws: tests/maths/test_merging.py
def test_sparse_merges_are_pefts_at_k_1(how):
    base = mlp(24, 48, 24)
    model = copy.deepcopy(base)
    theirs = None
    for name in "ab":
        gralora.inject(model, "all-linear", random_config(r=4, gralora_k=1), adapter_name=name)
        config = peft.LoraConfig(
            r=4, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=False
        )
        if theirs is None:
            theirs = peft.get_peft_model(base, config, name)
        else:
            theirs.add_adapter(name, config)
    for path, layer in gralora_layers(model):
        their = theirs.base_model.model.get_submodule(path)
        for name in "ab":
            adapter = layer.gralora_adapters[name]
            with torch.no_grad():
                their.lora_A[name].weight.copy_(
                    adapter.A[0].T if adapter.A[0].shape[-1] == 4 else adapter.A[0]
                )
                their.lora_B[name].weight.copy_(
                    adapter.B[0].T if adapter.B[0].shape[0] == 4 else adapter.B[0]
                )
                their.scaling[name] = adapter.config.scaling
            assert relative(gralora.delta_weight(layer, name), their.get_delta_weight(name)) < 1e-5
    weights = [0.7, 0.6]
    theirs.add_weighted_adapter(
        ["a", "b"], weights, "new", combination_type=f"{how}_svd", svd_rank=24, density=0.4
    )
    gralora.combine(model, ["a", "b"], weights, "new", how, r=24, gralora_k=1, density=0.4)
    gralora.combine(model, ["a", "b"], [0.7, 0.6], "sum")
    for path, layer in gralora_layers(model):
        wanted = theirs.base_model.model.get_submodule(path).get_delta_weight("new")
        assert relative(gralora.delta_weight(layer, "new"), wanted) < 1e-4
        assert relative(gralora.delta_weight(layer, "sum"), wanted) > 1e-2


@pytest.mark.parametrize("how", ["ties", "dare", "magnitude_prune"])
def test_sparse_merges_of_other_ks_and_of_experts(how):
    model, errors = model_of(**copy.deepcopy(OTHER_K)), {}
    gralora.combine(model, {"a": 1.0, "b": 0.5}, None, "new", how, r=24, density=0.5, errors=errors)
    assert all(0 <= error < 1 for error in errors.values())
    gralora.set_adapter(model, "new")
    assert torch.isfinite(model(torch.randn(2, 24, dtype=torch.float64))).all()


@pytest.mark.parametrize("how", ["exact", "svd"])
def test_conv1d_convolutions_attention_and_experts(how):
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 8, 3),
            "attention": nn.MultiheadAttention(16, 4),
            "experts": Experts(),
            "gpt2": gpt2(),
        }
    ).double()
    targets = r"conv|attention|experts\.up|.*c_attn"
    gralora.inject(model, targets, random_config(), adapter_name="a")
    gralora.inject(model, targets, random_config(gralora_k=4, hybrid_r=1), adapter_name="b")
    randomize_(model)
    errors = {}
    gralora.combine(model, {"a": 0.5, "b": 2.0}, None, "new", how=how, errors=errors)
    gralora.set_adapter(model, {"a": 0.5, "b": 2.0})
    for name, layer in gralora_layers(model):
        delta = layer.delta_weight().detach()
        off = float((layer.delta_weight("new").detach() - delta).norm() / delta.norm())
        assert off == pytest.approx(errors[name], abs=1e-9)
        assert (off < 1e-9) == (how == "exact")
    assert len(errors) == 1 + 4 + 1 + 2


def test_what_one_of_them_trained_whole_goes_with_it_and_what_two_did_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.norm(self.fc(x)))

    model = gralora.inject(
        Net(),
        ["fc"],
        random_config(modules_to_save=["norm"], bias="gralora_only"),
        adapter_name="a",
    )
    x = torch.randn(16, 8)
    F.mse_loss(model(x), torch.zeros(16, 2)).backward()
    with torch.no_grad():
        for parameter in gralora.adapter_parameters(model):
            parameter.add_(0.1)
    gralora.inject(model, ["fc"], random_config(), adapter_name="b")
    gralora.combine(model, ["a", "b"], None, "new")
    model.eval()
    gralora.set_adapter(model, ["a", "b"])
    y = model(x)
    gralora.set_adapter(model, "new")
    torch.testing.assert_close(model(x), y)
    before = fingerprint(model)
    for how in ("exact", "svd"):
        with pytest.raises(ValueError, match="two of the adapters train '(norm.weight|fc.bias)'"):
            gralora.combine(model, ["a", "new"], None, "more", how=how)
    assert_same(fingerprint(model), before)


def test_it_is_saved_and_loaded_like_any_other(tmp_path):
    model = gralora.inject(gpt2(), ["c_attn"], random_config(), adapter_name="a")
    base = copy.deepcopy(model)
    gralora.inject(model, ["c_attn", "c_proj"], random_config(gralora_k=4), adapter_name="b")
    gralora.combine(model, ["a", "b"], [1, 1], "c")
    gralora.set_adapter(model, "c")
    gralora.save_adapter(model, tmp_path / "c.safetensors", "c")
    loaded = gralora.load_adapter(gralora.unload(base), tmp_path / "c.safetensors")
    assert same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("arguments", "fields", "error", "text"),
    [
        ((["a", "x"], None, "new"), {}, KeyError, "no adapter 'x' in this model; it has: a, b"),
        ((["a", "b"], None, "a"), {}, ValueError, "adapter 'a' is in this model already"),
        (
            (["a", "b"], [1], "new"),
            {},
            ValueError,
            "1 weights were given for the adapters ['a', 'b']",
        ),
        ((["a", "a"], [1, 1], "new"), {}, ValueError, "each once"),
        ((["a", "b"], [1, float("nan")], "new"), {}, ValueError, "weight of adapter 'b' is nan"),
        ((["a", "b"], None, "new.er"), {}, ValueError, "hold no dot"),
        (
            (["a", "b"], None, "new"),
            {"how": "cat"},
            ValueError,
            "how='cat' is not known; there are: 'exact', 'svd', 'ties'",
        ),
        ((["a", "b"], None, "new"), {"r": 4}, ValueError, "r and gralora_k are for the other ways"),
        ((["a", "b"], None, "new"), {"how": "ties"}, ValueError, "density=None with how='ties'"),
        ((["a", "b"], None, "new"), {"density": 0.5}, ValueError, "density=0.5 with how='exact'"),
        (
            (["a", "b"], None, "new"),
            {"how": "dare", "density": 0},
            ValueError,
            "density=0 with how='dare'",
        ),
        ((["a", "b"], None, "new"), {"how": "svd", "gralora_k": 5}, ValueError, "gralora_k=5"),
        (([], None, "new"), {}, ValueError, "adapter_names=[] names no adapter"),
    ],
)
def test_what_is_not_legal_is_refused_and_changes_nothing(arguments, fields, error, text):
    model = gralora.inject(Block(), ["q"], random_config(), adapter_name="a")
    gralora.inject(model, ["v"], random_config(), adapter_name="b")
    before = fingerprint(model)
    with pytest.raises(error) as raised:
        gralora.combine(model, *arguments, **fields)
    assert text in str(raised.value)
    assert_same(fingerprint(model), before)


def test_the_least_common_multiple_of_ks_fits_and_a_given_k_that_does_not_is_refused():
    model = mlp(12, 12)
    gralora.inject(model, ["0"], random_config(r=4, gralora_k=4), adapter_name="a")
    gralora.inject(model, ["0"], random_config(r=6, gralora_k=6), adapter_name="b")
    gralora.combine(model, ["a", "b"], None, "fits")
    model = mlp(20, 20)
    gralora.inject(model, ["0"], random_config(r=4, gralora_k=4), adapter_name="a")
    gralora.inject(model, ["0"], random_config(r=10, gralora_k=10), adapter_name="b")
    gralora.combine(model, ["a", "b"], None, "fits")
    model = nn.Sequential(nn.Linear(12, 18))
    gralora.inject(model, ["0"], random_config(r=2, gralora_k=2), adapter_name="a")
    gralora.inject(model, ["0"], random_config(r=3, gralora_k=3), adapter_name="b")
    gralora.combine(model, ["a", "b"], None, "fits")
    model = gralora.inject(
        nn.Sequential(nn.Linear(20, 30)), ["0"], random_config(r=2, gralora_k=2), adapter_name="a"
    )
    with pytest.raises(
        ValueError,
        match=(
            r"gralora_k=4 does not divide both sizes of '0', \(20, 30\)\. Legal here: 1, 2, 5, 10\."
        ),
    ):
        gralora.combine(model, ["a"], None, "b", how="svd", gralora_k=4, r=4)
