"""Which k: the paper's rule, where it is legal."""

import math

import pytest
from torch import nn

import gralora
from gralora import GraloraConfig, GraloraConv1D, suggest_k

from ..models import Experts


@pytest.mark.parametrize(
    ("r", "k"),
    [
        (1, 1),
        (2, 2),
        (8, 2),
        (32, 2),
        (48, 2),
        (64, 4),
        (128, 4),
        (3, 1),
        (9, 1),
        (66, 3),
        (100, 4),
        (65, 1),
    ],
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
        nn.Sequential(layer),
        ["0.up"] if isinstance(layer, Experts) else lambda name, module: name == "0",
        GraloraConfig(r=r, gralora_k=k),
        adapter_name="new",
    )


def test_the_default_config_is_that_of_inject():
    assert suggest_k(nn.Linear(64, 64)) == GraloraConfig().gralora_k


def test_inject_offers_it():
    with pytest.raises(ValueError, match=r"Legal here: 1, 2\. suggest_k gives 2\.$"):
        gralora.inject(nn.Linear(6, 12), "", GraloraConfig(r=64, gralora_k=4))


def test_what_is_no_layer_is_refused():
    for stranger in (nn.LayerNorm(4), "layer", nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(TypeError, match="takes a GraloraConfig or one of nn.Linear"):
            suggest_k(stranger)
