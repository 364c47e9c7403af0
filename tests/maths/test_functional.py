"""The mathematics against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gralora.maths import functional

from ..models import relative


@st.composite
def adapters(draw):
    """(tensors, scaling, x) in float64, of any legal shape."""
    k = draw(st.integers(1, 5))
    m, o, s = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    h = draw(st.integers(0, 4))
    leading = draw(st.lists(st.integers(0, 3), max_size=3))
    torch.manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64)

    general = (normal(h, k * m), normal(k * o, h)) if h else (None, None)
    return (
        (normal(k, m, k * s), normal(k, k * s, k * o // k), *general),
        draw(st.floats(0.1, 4)),
        normal(*leading, k * m),
    )


def loop_delta(A, B, A_general, B_general, scaling):
    """Section 1 of the design, block by block, with nothing clever."""
    k, m, r = A.shape
    o, s = B.shape[2], r // k
    W = torch.zeros(k * o, k * m, dtype=A.dtype)
    for i in range(k):
        for j in range(k):
            block = A[i][:, j * s : (j + 1) * s] @ B[j][i * s : (i + 1) * s, :]
            W[j * o : (j + 1) * o, i * m : (i + 1) * m] = block.T
    if A_general is not None:
        W = W + B_general @ A_general
    return W * scaling


@given(adapters())
def test_delta_weight_is_the_blocks_of_the_definition(case):
    tensors, scaling, _ = case
    torch.testing.assert_close(
        functional.delta_weight(*tensors, scaling=scaling), loop_delta(*tensors, scaling)
    )


@given(adapters())
def test_forward_is_x_times_delta_weight_transposed(case):
    tensors, scaling, x = case
    y = functional.gralora_update(x, *tensors, scaling=scaling)
    torch.testing.assert_close(
        y, F.linear(x, loop_delta(*tensors, scaling)), rtol=1e-10, atol=1e-10
    )


@given(adapters())
def test_lora_factors_multiply_to_delta_weight(case):
    tensors, scaling, _ = case
    down, up = functional.lora_factors(*tensors)
    k, r = tensors[0].shape[0], tensors[0].shape[2]
    assert (
        down.shape[0] == up.shape[1] == k * r + (0 if tensors[2] is None else tensors[2].shape[0])
    )
    torch.testing.assert_close(
        scaling * up @ down, loop_delta(*tensors, scaling), rtol=1e-10, atol=1e-10
    )


@given(adapters(), st.booleans())
def test_adding_rows_gives_weight_plus_delta_in_both_layouts(case, transposed):
    tensors, scaling, _ = case
    delta = loop_delta(*tensors, scaling)
    weight = torch.randn(delta.T.shape if transposed else delta.shape, dtype=torch.float64)
    expected = (weight.T if transposed else weight) + delta
    rows = weight.T if transposed else weight
    step = tensors[1].shape[-1] // math.gcd(tensors[1].shape[-1], 2)
    for start in range(0, rows.shape[0], math.gcd(step, tensors[1].shape[-1])):
        stop = start + math.gcd(step, tensors[1].shape[-1])
        functional.add_delta_rows_(rows[start:stop], start, *tensors, scaling=scaling)
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize(("k", "r", "h"), [(1, 4, 0), (2, 4, 0), (4, 8, 0), (2, 4, 3), (8, 8, 0)])
def test_rank_of_the_update_is_k_r_plus_hybrid_r(k, r, h):
    n = 96
    general = (torch.randn(h, n).double(), torch.randn(n, h).double()) if h else ()
    A, B = torch.randn(k, n // k, r).double(), torch.randn(k, r, n // k).double()
    assert (
        torch.linalg.matrix_rank(functional.delta_weight(A, B, *general, scaling=1.0)) == k * r + h
    )
    assert A.numel() + B.numel() + sum(g.numel() for g in general) == (r + h) * 2 * n


def test_k_1_is_lora_exactly():
    A, B = torch.randn(1, 12, 3).double(), torch.randn(1, 3, 8).double()
    x = torch.randn(5, 12).double()
    assert relative(functional.gralora_update(x, A, B, scaling=2.0), 2.0 * x @ A[0] @ B[0]) < 1e-15


def test_multiply_adds_per_token_are_those_of_lora_and_delta_weight_takes_k_times_fewer():
    from torch.utils.flop_counter import FlopCounterMode

    tokens, n_in, n_out, r = 10, 24, 48, 16
    x = torch.randn(tokens, n_in)
    for k in (1, 2, 4, 8):
        A, B = torch.randn(k, n_in // k, r), torch.randn(k, r, n_out // k)
        with FlopCounterMode(display=False) as forward:
            functional.gralora_update(x, A, B, scaling=1.0)
        with FlopCounterMode(display=False) as delta:
            functional.delta_weight(A, B, scaling=1.0)
        assert forward.get_total_flops() == 2 * tokens * r * (n_in + n_out)
        assert delta.get_total_flops() == 2 * r * n_in * n_out // k


def test_dropout_draws_once_for_the_blocks_and_once_for_the_general_pair():
    A, B = torch.randn(2, 8, 4), torch.randn(2, 4, 8)
    Ag, Bg = torch.randn(3, 16), torch.randn(16, 3)
    x = torch.randn(7, 16)
    torch.manual_seed(1)
    y = functional.gralora_update(x, A, B, Ag, Bg, scaling=1.0, dropout=0.5)
    torch.manual_seed(1)
    first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
    expected = functional.gralora_update(first, A, B, scaling=1.0) + F.linear(
        F.linear(second, Ag), Bg
    )
    torch.testing.assert_close(y, expected)
    assert not torch.equal(first, second)


def test_the_error_of_the_best_lora_is_that_of_the_cut_singular_values():
    delta = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))
    for rank, left in ((0, 30), (1, 14), (2, 5), (3, 1), (4, 0), (9, 0)):
        assert functional.best_lora_error(delta, rank) == pytest.approx(math.sqrt(left / 30))
    assert functional.best_lora_error(torch.zeros(3, 4), 1) == 0


@pytest.mark.parametrize("p", [0.1, 0.8])
def test_dropout_is_of_its_probability(p):
    x = torch.ones(100_000)
    dropped = functional.dropped(x, p)
    assert (dropped == 0).float().mean() == pytest.approx(p, abs=0.02)
    assert dropped.max() == pytest.approx(1 / (1 - p))
    assert functional.dropped(x, 0.0) is x


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_a_pair_cut_or_padded_to_a_rank_is_the_nearest_of_it(rank):
    down, up = torch.randn(5, 12, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    product = up @ down
    new_down, new_up, error = functional.truncated(down, up, rank)
    assert new_down.shape == (rank, 12) and new_up.shape == (7, rank)
    S = torch.linalg.svdvals(product)
    assert error == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-12)
    off = (new_up @ new_down - product).norm() / product.norm()
    assert float(off) == pytest.approx(error, abs=1e-12)
    assert functional.product_norm(down, up) == pytest.approx(float(product.norm()))
    assert functional.truncated(down, 0 * up, rank)[2] == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lora_factors_keep_the_type_and_leading_axes(dtype):
    A, B = torch.randn(3, 2, 4, 6).to(dtype), torch.randn(3, 2, 6, 5).to(dtype)
    general = torch.randn(3, 1, 8).to(dtype), torch.randn(3, 10, 1).to(dtype)
    down, up = functional.lora_factors(A, B, *general)
    assert down.dtype == up.dtype == dtype
    assert down.shape == (3, 13, 8) and up.shape == (3, 10, 13)
    delta = functional.delta_weight(
        A.double(), B.double(), *(t.double() for t in general), scaling=1.0
    )
    torch.testing.assert_close(up.double() @ down.double(), delta)
