"""Sums that nobody has computed, by their numbers; those who use them are in `test_unevaluated` and
`test_experts`.
"""

import pytest
import torch
from torch.nn import functional as F

from gralora.layers.sums import part_of, sum_of_one, swapped
from gralora.maths import functional

from ..models import relative


def one(transposed=False, hybrid_r=2):
    torch.manual_seed(0)
    A, B = torch.randn(2, 4, 6).double(), torch.randn(2, 6, 5).double()
    general = (
        (torch.randn(hybrid_r, 8).double(), torch.randn(10, hybrid_r).double())
        if hybrid_r
        else (None, None)
    )
    weight = torch.randn(8, 10).double() if transposed else torch.randn(10, 8).double()
    return weight, [((A, B, *general), 0.7, 0.0), ((A * 2, B - 1, None, None), 0.3, 0.0)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("of_inputs", [False, True])
def test_a_part_of_whole_blocks_is_a_part_of_the_sum(transposed, of_inputs):
    weight, shares = one(transposed)
    whole = sum_of_one(weight, shares, transposed)
    dense = whole.evaluate(*whole.parameters)
    matrix = dense.mT if transposed else dense
    size = 4 if of_inputs else 5
    for first in (0, size):
        part = part_of(weight, shares, transposed, first, first + size, of_inputs)
        wanted = matrix.narrow(int(of_inputs), first, size)
        found = part.evaluate(*part.parameters)
        assert relative(found.mT if transposed else found, wanted) < 1e-14
        x = torch.randn(3, wanted.shape[1]).double()
        assert relative(part.product(x, None), x @ wanted.mT) < 1e-14
    for first, last in ((1, size), (0, size - 1), (0, 0)):
        assert part_of(weight, shares, transposed, first, last, of_inputs) is None


def test_the_transposed_map_is_the_same_with_a_and_b_in_each_others_place():
    weight, shares = one()
    whole, other = sum_of_one(weight, shares, False), sum_of_one(weight, swapped(shares), True)
    assert relative(other.evaluate(*other.parameters), whole.evaluate(*whole.parameters)) < 1e-14
    x = torch.randn(3, 10).double()
    assert (
        relative(other.product(x, None), F.linear(x, whole.evaluate(*whole.parameters).mT)) < 1e-14
    )
    assert functional.delta_weight(*shares[0][0], scaling=0.7).norm() > 1
