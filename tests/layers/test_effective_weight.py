"""Effective weights by their numbers; code that reads them is in `test_lazy_weight` and
`test_experts`.
"""

import pytest
import torch
from torch.nn import functional as F

from gralora.layers.effective_weight import (
    EffectiveWeight,
    ExpertsWeight,
    MatrixWeight,
    UnreadableWeight,
)

from ..models import relative


def one(transposed=False, hybrid_r=2, copies=()):
    torch.manual_seed(0)
    A, B = torch.randn(*copies, 2, 4, 6).double(), torch.randn(*copies, 2, 6, 5).double()
    general = (
        (torch.randn(*copies, hybrid_r, 8).double(), torch.randn(*copies, 10, hybrid_r).double())
        if hybrid_r
        else (None, None)
    )
    weight = torch.randn(*copies, *((8, 10) if transposed else (10, 8))).double()
    return weight, [((A, B, *general), 0.7, 0.0), ((A * 2, B - 1, None, None), 0.3, 0.0)]


def value(weight):
    return weight.evaluate(*weight.parameters)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_transposed_matrix_is_the_same_with_a_and_b_in_each_others_place(transposed):
    effective = MatrixWeight(*one(transposed), transposed)
    turned = effective.transpose()
    dense = value(effective)
    assert torch.equal(value(turned), dense.mT) and torch.equal(value(turned.transpose()), dense)
    for each, wanted in ((effective, dense), (turned, dense.mT)):
        x, bias = torch.randn(3, wanted.shape[1]).double(), torch.randn(len(wanted)).double()
        assert relative(each.linear(x, bias), F.linear(x, wanted, bias)) < 1e-14


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_selected_and_multiplied_with_their_adapters(transposed):
    effective = ExpertsWeight(*one(transposed, copies=(3,)), transposed)
    dense = value(effective)
    assert relative(value(effective.index(1)), dense[1]) < 1e-14
    for index in (slice(1, 3), torch.tensor([2, 2, 0])):
        assert relative(value(effective.index(index)), dense[index]) < 1e-14
    for each, wanted in ((effective, dense), (effective.transpose(), dense.mT)):
        x = torch.randn(3, 4, wanted.shape[1]).double()
        assert relative(each.bmm(x), torch.bmm(x, wanted)) < 1e-14
        assert relative(value(each.index(2)), wanted[2]) < 1e-14
        rows, ends = x.flatten(0, 1), torch.tensor([4, 8, 12])

        def multiply(matrices, x=x):
            return torch.bmm(x, matrices).flatten(0, 1)

        assert relative(each.grouped(multiply, rows, ends), multiply(wanted)) < 1e-14


def test_a_transposed_copy_takes_the_experts_apart_no_second_time():
    effective = ExpertsWeight(*one(copies=(3,)))
    turned = effective.transpose()
    effective.index(0)
    assert turned.apart is effective.apart and turned.apart


def test_what_no_operation_serves_is_none_and_needs_the_sum():
    weight, shares = one()
    effective = EffectiveWeight(weight, shares)
    x = torch.ones(3, 8).double()
    assert effective.linear(x, None) is effective.bmm(x) is effective.index(0) is None
    assert effective.embedding(x, None) is effective.grouped(lambda w: w, x, x) is None
    assert effective.transpose().transpose() is effective
    assert effective.transpose().parameters[0] is weight


def test_an_unreadable_weight_gives_its_form_and_raises_its_reason():
    effective = UnreadableWeight(MatrixWeight(*one()), "the weight of this layer is sharded")
    assert effective.linear(torch.ones(3, 8).double(), None) is None
    assert effective.transpose().weight.shape == (8, 10)
    for each in (effective, effective.transpose()):
        with pytest.raises(ValueError, match="the weight of this layer is sharded"):
            value(each)
