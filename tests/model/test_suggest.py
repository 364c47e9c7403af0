"""Which k: the paper's rule, and the best for a gradient."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig, GraloraConv1D, suggest_k

from ..models import Block, Experts


@pytest.mark.parametrize(
    ("r", "k"),
    [(1, 1), (2, 2), (8, 2), (32, 2), (48, 2), (64, 4), (128, 4), (3, 1), (9, 1), (66, 3), (100, 4), (65, 1)],
)
def test_the_papers_rule_among_the_divisors_of_r(r, k):
    assert suggest_k(GraloraConfig(r=r, gralora_k=1)) == k
    assert suggest_k(nn.Linear(960, 960), GraloraConfig(r=r, gralora_k=1)) == math.gcd(k, 960)


@pytest.mark.parametrize(
    ("layer", "r", "k"),
    [
        (nn.Linear(9, 14), 8, 1),
        (nn.Linear(6, 12), 64, 2),
        (nn.Linear(12, 64), 64, 4),
        (nn.Conv2d(6, 4, 3), 32, 2),
        (nn.Conv2d(6, 9, 3), 32, 1),
        (GraloraConv1D(8, 12), 128, 4),
        (nn.MultiheadAttention(12, 3), 64, 4),
        (nn.MultiheadAttention(12, 3, kdim=6), 64, 2),
        (Experts(), 64, 4),
    ],
)
def test_what_is_suggested_for_a_layer_is_legal_there(layer, r, k):
    assert suggest_k(layer, GraloraConfig(r=r)) == k
    gralora.inject(
        nn.Sequential(layer), lambda name, module: name == "0", GraloraConfig(r=r, gralora_k=k), adapter_name="new"
    )


def test_the_default_config_is_that_of_inject():
    assert suggest_k(nn.Linear(64, 64)) == GraloraConfig().gralora_k


def test_inject_offers_it():
    with pytest.raises(ValueError, match=r"Legal here: 1, 2\. suggest_k gives 2\.$"):
        gralora.inject(nn.Linear(6, 12), "", GraloraConfig(r=64, gralora_k=4))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(24, 36), lambda: GraloraConv1D(24, 36), lambda: nn.Conv1d(24, 12, 3)]
)
def test_with_a_gradient_it_is_the_k_whose_extracted_adapter_is_nearest(make):
    layer, config = make(), GraloraConfig(r=12)
    seen = set()
    for seed in range(12):
        gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)).pow(3)
        if seed % 3 == 0:  # of rank 8 as a whole
            gradient = torch.linalg.qr(gradient.flatten(1))[0][:, :8] @ torch.randn(8, gradient.flatten(1).shape[1])
            gradient = gradient.view(layer.weight.shape)
        elif seed % 3 == 1:  # one block of four by four
            gradient[:, gradient.shape[1] // 4 :] = 0
            gradient[gradient.shape[0] // 4 :] = 0
        found = suggest_k(layer, config, gradient=gradient)
        errors = {}
        for k in (1, 2, 3, 4, 6, 12):
            base, tuned = make(), make()
            gralora.unload(base), gralora.unload(tuned)
            tuned.load_state_dict(base.state_dict())
            with torch.no_grad():
                tuned.weight.add_(gradient)
            own: dict[str, float] = {}
            gralora.extract(
                base, tuned, lambda name, module: True, dataclasses.replace(config, gralora_k=k), errors=own
            )
            errors[k] = own[""]
        assert errors[found] <= min(errors.values()) + 1e-5, (found, errors)
        seen.add(found)
    assert len(seen) > 1


def test_a_calibration_batch_gives_each_layer_its_own():
    torch.manual_seed(0)
    model = Block()
    model(torch.randn(8, 5, 16)).pow(2).sum().backward()
    config = GraloraConfig(r=4)
    ks = {
        name: suggest_k(module, config, gradient=module.weight.grad)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    gralora.inject(
        model, {name.replace(".", r"\."): dataclasses.replace(config, gralora_k=k) for name, k in ks.items()}
    )
    assert {row.layer: row.gralora_k for row in gralora.summary(model)} == ks and set(ks.values()) <= {1, 2, 4}


def test_ties_go_to_the_smaller_k():
    assert suggest_k(nn.Linear(8, 8), GraloraConfig(r=8), gradient=torch.zeros(8, 8)) == 1


def test_what_is_no_layer_or_no_gradient_is_refused():
    for stranger in (nn.LayerNorm(4), "layer", nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(TypeError, match="takes a GraloraConfig or one of nn.Linear"):
            suggest_k(stranger)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) was given for a weight of \(6, 4\)"):
        suggest_k(nn.Linear(4, 6), gradient=torch.ones(4, 4))
    with pytest.raises(ValueError, match="4 maps"):
        suggest_k(nn.MultiheadAttention(4, 2), gradient=torch.ones(12, 4))
    with pytest.raises(ValueError, match="not finite"):
        suggest_k(nn.Linear(4, 4), gradient=torch.full((4, 4), float("nan")))
