"""The best GraLoRA for a difference, and adapters cut into other blocks."""

import copy
import warnings

import pytest
import torch
from einops import rearrange
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers
from gralora.maths import functional

from ..models import (
    Block,
    assert_same,
    fingerprint,
    gpt2,
    logits,
    random_config,
    relative,
    same_bits,
)

X = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(2, 5, 16)


def tuned_of(base, scale=0.1):
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * scale)
    return tuned


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_block_is_its_own_best_truncation(k):
    delta = torch.randn(12, 16, dtype=torch.float64)
    A, B = functional.block_svd(delta, 4, k)
    off = functional.delta_weight(A, B, scaling=1.0) - delta
    blocks = rearrange(delta, "(j o) (i m) -> j i o m", j=k, i=k)
    S = torch.linalg.svdvals(blocks)
    assert off.norm() == pytest.approx(S[..., 4 // k :].square().sum().sqrt())


def test_full_rank_is_exact_and_ranks_above_it_are_padded():
    delta = torch.randn(8, 16, dtype=torch.float64)
    for r in (16, 32):
        A, B = functional.block_svd(delta, r, 2)
        assert A.shape == (2, 8, r)
        assert relative(functional.delta_weight(A, B, scaling=1.0), delta) < 1e-13


def test_the_hybrid_comes_nearer_with_every_sweep():
    delta = torch.randn(16, 16, dtype=torch.float64)
    offs = []
    for sweeps in (1, 2, 4, 8):
        tensors = functional.nearest_factors(delta, 8, 4, 2, sweeps=sweeps)
        offs.append(float((functional.delta_weight(*tensors, scaling=1.0) - delta).norm()))
    assert offs == sorted(offs, reverse=True)
    assert (
        offs[-1]
        < offs[0]
        < float(
            (
                functional.delta_weight(*functional.block_svd(delta, 8, 4), scaling=1.0) - delta
            ).norm()
        )
    )


def test_extract_reaches_the_tuned_model_at_full_rank_and_says_its_error_below():
    base = Block().double()
    tuned = tuned_of(base)
    config = GraloraConfig(r=32, gralora_k=2, bias="all", modules_to_save=["norm", "head"])
    exact, errors = {}, {}
    model = gralora.extract(
        copy.deepcopy(base), tuned, ["q", "k", "v", "mlp.0", "mlp.2"], config, errors=exact
    )
    assert relative(model(X), tuned(X)) < 1e-12
    assert relative(base(X), tuned(X)) > 1e-2
    assert max(exact.values()) < 1e-12
    small = gralora.extract(
        copy.deepcopy(base),
        tuned,
        "all-linear",
        GraloraConfig(r=4, alpha=3, hybrid_r=1, bias="all", modules_to_save=["norm"]),
        errors=errors,
    )
    for name, layer in gralora_layers(small):
        delta = tuned.get_submodule(name).weight - layer.weight
        off = gralora.delta_weight(layer) - delta
        assert errors[name] == pytest.approx(float((off.norm() / delta.norm()).detach()))
        assert name == "head" or 0.1 < errors[name] < 1  # the head has blocks of two rows


def test_a_difference_that_is_gralora_is_found_whatever_alpha_and_layout():
    base = gpt2()
    tuned = gralora.inject(
        copy.deepcopy(base), ["c_attn", "c_fc"], random_config(r=8, gralora_k=4, alpha=5)
    )
    expected = logits(tuned)
    gralora.merge_and_unload(tuned)
    errors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing else differs
        model = gralora.extract(
            base, tuned, ["c_attn", "c_fc"], GraloraConfig(r=8, gralora_k=4, alpha=1), errors=errors
        )
    assert max(errors.values()) < 1e-5
    assert relative(logits(model), expected) < 1e-4


def test_what_else_differs_is_named():
    base = Block()
    with pytest.warns(UserWarning, match=r"differ in q.bias, k.weight.* and \d+ more as well"):
        gralora.extract(base, tuned_of(base), ["q"], random_config())


def test_extract_that_cannot_leaves_the_base_as_it_was():
    base, before = Block(), None
    before = fingerprint(base)
    broken = tuned_of(base)
    with torch.no_grad():
        broken.v.weight[0, 0] = torch.inf
    for tuned, text in [
        (Block(8), "v.weight is of shape|q.weight is of shape"),
        (nn.Linear(2, 2), "missing there"),
        (broken, "v.weight is not finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            gralora.extract(base, tuned, ["q", "v"], random_config())
        assert_same(fingerprint(base), before)


@pytest.mark.parametrize(("k", "r"), [(1, 32), (2, 16), (8, 16), (4, 8)])
def test_reblocking_is_exact_where_the_rank_suffices(k, r):
    model = gralora.inject(
        Block().double(), ["q", "mlp.0"], random_config(r=8, gralora_k=4, alpha=5)
    )
    y, errors = model(X), {}
    gralora.reblock(model, k, r=r, errors=errors)
    config = model.q.gralora_adapters["default"].config
    assert (config.gralora_k, config.r) == (k, r)
    assert relative(model(X), y) < 1e-12
    assert max(errors.values()) < 1e-12
    assert all(p.requires_grad for p in gralora.adapter_parameters(model))


def test_reblocking_below_that_rank_says_its_error_and_keeps_the_dtype():
    model = gralora.inject(
        Block(), ["q"], random_config(r=8, gralora_k=4, hybrid_r=2), dtype=torch.bfloat16
    )
    delta, errors = gralora.delta_weight(model.q).detach().float(), {}
    gralora.reblock(model, 1, errors=errors)
    assert model.q.gralora_adapters["default"].A.dtype == torch.bfloat16
    off = gralora.delta_weight(model.q).detach().float() - delta
    assert 0.05 < errors["q"] < 1
    assert float(off.norm() / delta.norm()) == pytest.approx(errors["q"], rel=0.05)


def test_reblocking_is_refused_whole():
    model = gralora.inject(Block(), ["q", "v"], random_config())
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'q': gralora_k=3 does not divide"):
        gralora.reblock(model, 3, r=6)
    with pytest.raises(KeyError, match="it has: default"):
        gralora.reblock(model, 1, "other")
    assert_same(fingerprint(model), before)
    gralora.merge(model)
    with pytest.raises(ValueError, match="merged"):
        gralora.reblock(model, 1)
    gralora.unmerge(model)
    assert same_bits(model.q.weight, before["tensors"]["q.weight"])
