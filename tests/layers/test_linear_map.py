"""One map of a model, adapted or not."""

import pytest
import torch
from torch import nn

import gralora
from gralora.layers.kinds import maps_of
from gralora.layers.linear import Conv1D

from ..models import Experts, random_config

CASES = {  # module: part, (in, out), what k divides, copies, shape, transposed
    "linear": (lambda: nn.Linear(8, 12), "", (8, 12), (8, 12), None, (12, 8), False),
    "GPT-2's": (lambda: Conv1D(12, 8), "", (8, 12), (8, 12), None, (12, 8), True),
    "embedding": (lambda: nn.Embedding(12, 8), "", (8, 12), (8, 12), None, (12, 8), False),
    "convolution": (
        lambda: nn.Conv2d(8, 12, (3, 2), groups=2),
        *("", (24, 6), (4, 6), 2, (12, 4, 3, 2), False),
    ),
    "transposed convolution": (
        lambda: nn.ConvTranspose1d(8, 12, 3),
        *("", (8, 36), (8, 12), None, (8, 12, 3), False),
    ),
    "projection": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4),
        *("k_proj", (4, 8), (4, 8), None, (8, 4), False),
    ),
    "packed projection": (
        lambda: nn.MultiheadAttention(8, 2),
        *("v_proj", (8, 8), (8, 8), None, (8, 8), False),
    ),
    "experts": (lambda: Experts(), "up", (8, 12), (8, 12), 3, (3, 12, 8), False),
    "experts, transposed": (lambda: Experts(True), "up", (8, 12), (8, 12), 3, (3, 12, 8), True),
}


def map_of(module, part):
    return next(map for map in maps_of(module) if map.part == part)


@pytest.mark.parametrize("case", CASES)
def test_a_map_tells_the_same_before_and_after_it_is_adapted(case):
    build, part, sizes, divided, copies, shape, transposed = CASES[case]
    module = build()
    owner, name = map_of(module, part).place
    weight = owner._parameters[name]
    for adapted in (False, True):
        map = map_of(module, part)
        assert (map.sizes, map.divided_sizes, map.copies) == (sizes, divided, copies)
        assert (map.shape, map.transposed) == (shape, transposed)
        assert map.weight is map.base_weight is weight
        assert tuple(map.base_matrix().shape[-2:]) == sizes[::-1]
        assert map.reason_unfit() is None
        assert (map.adapters is not None) is adapted
        adapters = map.attach()
        assert map.adapters is map.attach() is adapters


@pytest.mark.parametrize("case", [case for case in CASES if case != "packed projection"])
def test_in_layout_is_the_reverse_of_matrix(case):
    build, part, *_ = CASES[case]
    map = map_of(build(), part)
    matrix = map.base_matrix()
    assert torch.equal(map.matrix(map.in_layout(matrix.clone())), matrix)


def test_the_map_of_an_adapted_layer_is_that_of_the_module():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.MultiheadAttention(8, 2)})
    gralora.inject(model, ["a", "b"], random_config())
    assert (model["a"].map.module, model["a"].map.part) == (model["a"], "")
    projection = model["b"].gralora_q_proj
    assert (projection.map.module, projection.map.part) == (model["b"], "q_proj")
    assert projection.map.adapters is projection.gralora_adapters


def test_the_base_weight_is_without_a_merged_adapter():
    layer = nn.Linear(8, 8)
    weight = layer.weight
    gralora.inject(layer, "", random_config())
    gralora.merge(layer)
    assert layer.map.base_weight is weight and layer.map.weight is not weight
