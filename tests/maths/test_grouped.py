"""Rows that lie grouped by adapter: the numbers of the definition, group by group."""

import pytest
import torch

from benchmarks.speed._counting import kernels
from gralora.maths import functional
from gralora.maths.grouped import update_by_groups, update_of_each

COUNTS = (3, 0, 1, 4)


def tensors(hybrid_r=0, n=4, dtype=torch.float64):
    torch.manual_seed(1)
    A, B = torch.randn(n, 2, 4, 6, dtype=dtype), torch.randn(n, 2, 6, 3, dtype=dtype)
    general = (
        (torch.randn(n, hybrid_r, 8, dtype=dtype), torch.randn(n, 6, hybrid_r, dtype=dtype))
        if hybrid_r
        else (None, None)
    )
    return tuple(t if t is None else t.requires_grad_() for t in (A, B, *general))


def definition(x, counts, own, scaling):
    parts = []
    for g, rows in enumerate(x.split(counts)):
        parts.append(
            functional.gralora_update(
                rows, *(None if t is None else t[g] for t in own), scaling=scaling
            )
        )
    return torch.cat(parts)


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_values_and_gradients_are_those_of_the_definition(hybrid_r):
    own, x = tensors(hybrid_r), torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    y, wanted = update_by_groups(x, COUNTS, own, 0.7, 0.0), definition(x, COUNTS, own, 0.7)
    torch.testing.assert_close(y, wanted)
    inputs = [x, *(t for t in own if t is not None)]
    grad = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b)
    each = x[:8].unflatten(0, (4, 2))
    torch.testing.assert_close(
        update_of_each(each, own, 0.7, 0.0).flatten(0, 1), definition(x, (2, 2, 2, 2), own, 0.7)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("hybrid_r", [0, 1])
def test_gradcheck_and_gradgradcheck(hybrid_r, dropout):
    own, x = tensors(hybrid_r, n=2), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    given = [t for t in own if t is not None]

    def function(x, *given):
        torch.manual_seed(2)
        return update_by_groups(x, (2, 1), (*given, *[None] * (4 - len(given))), 0.7, dropout)

    assert torch.autograd.gradcheck(function, (x, *given))
    assert torch.autograd.gradgradcheck(function, (x, *given))


def test_rows_behind_the_last_group_get_zero_and_only_what_is_needed_is_computed():
    own, x = tensors(), torch.randn(10, 8, dtype=torch.float64)
    y = update_by_groups(x, COUNTS, own, 1.0, 0.0)
    assert y[8:].abs().max() == 0 and y[:8].abs().min() > 0
    leaf = x.clone().requires_grad_()
    frozen = tuple(t if t is None else t.detach() for t in own)
    few = kernels(lambda: update_by_groups(leaf, COUNTS, frozen, 1.0, 0.0).sum().backward())
    many = kernels(lambda: update_by_groups(leaf, COUNTS, own, 1.0, 0.0).sum().backward())
    assert len(few) < len(many)
    half = update_by_groups(
        x.to(torch.bfloat16), COUNTS, tuple(t if t is None else t.float() for t in own), 1.0, 0.0
    )
    assert half.dtype is torch.float32
