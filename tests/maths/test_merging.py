"""Updates merged value by value, against PEFT's own functions."""

import pytest
import torch
from peft.utils import merge_utils

from gralora.maths import merging

DELTAS = [
    torch.randn(24, 16, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for n in range(3)
]
WEIGHTS = [0.7, 1.5, 0.3]


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (merging.ties, merge_utils.ties),
        (merging.dare, merge_utils.dare_linear),
        (merging.magnitude_prune, merge_utils.magnitude_prune),
    ],
)
def test_a_merge_is_pefts(own, theirs, density):
    torch.manual_seed(1)
    wanted = theirs(DELTAS, torch.tensor(WEIGHTS, dtype=torch.float64), density)
    torch.manual_seed(1)
    given = [d.clone() for d in DELTAS]
    torch.testing.assert_close(own(given, WEIGHTS, density), wanted, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(given, DELTAS, strict=True))
    plain = sum(d * w for d, w in zip(DELTAS, WEIGHTS, strict=True))
    assert torch.allclose(wanted, plain) == (density == 1 and own is not merging.ties)


def test_ties_elects_a_sign():
    one, two, three = (torch.tensor([[x, 1.0]]) for x in (3.0, 2.0, -4.0))
    assert torch.equal(merging.ties([one, two, three], [1, 1, 1], 1.0), torch.tensor([[2.5, 1.0]]))


def test_dare_keeps_the_mean():
    torch.manual_seed(0)
    many = torch.stack([merging.dare([DELTAS[0]], [1.0], 0.5) for _ in range(2000)])
    assert (many == 0).double().mean() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(many.mean(0), DELTAS[0], rtol=0, atol=0.35)
