"""Directions for A to start from, against plain decompositions."""

import pytest
import torch
from einops import rearrange

from gralora.maths import starts


@pytest.mark.parametrize(("r", "k", "m"), [(8, 2, 16), (8, 4, 4), (16, 2, 8), (12, 1, 12)])
def test_rows_are_orthonormal_all_of_an_input_block_or_where_they_are_too_many_those_of_each_block(
    r, k, m
):
    rows = starts.orthonormal_rows(r, k, m)
    assert rows.shape == (k, r, m)
    blocks = rows[:, None] if r <= m else rearrange(rows, "k (j s) m -> k j s m", j=k)
    eye = torch.eye(blocks.shape[-2]).expand(*blocks.shape[:-1], blocks.shape[-2])
    torch.testing.assert_close(blocks @ blocks.mT, eye, atol=1e-6, rtol=0)
    assert not torch.equal(rows[0], rows[-1]) or k == 1


def test_where_a_block_has_more_rows_than_columns_the_columns_are_orthonormal():
    rows = rearrange(starts.orthonormal_rows(16, 2, 4), "k (j s) m -> k j s m", j=2)
    torch.testing.assert_close(rows.mT @ rows, torch.eye(4).expand(2, 2, 4, 4), atol=1e-6, rtol=0)


def test_directions_from_sums_over_pieces_are_those_of_a_full_svd():
    x = torch.randn(60, 24, dtype=torch.float64) @ torch.diag(
        torch.linspace(3, 0.1, 24, dtype=torch.float64)
    )
    gram = sum(starts.gram_of_blocks(piece, 3) for piece in x.split(7))
    directions, values = starts.leading_directions(gram, 4)
    for i, block in enumerate(x.split(8, dim=1)):
        _, S, V = torch.linalg.svd(block, full_matrices=False)
        torch.testing.assert_close(values[i], S[:4] ** 2)
        torch.testing.assert_close(
            (directions[i] * V[:4]).sum(-1).abs(), torch.ones(4, dtype=torch.float64)
        )
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()


def test_directions_of_a_gradient_are_those_of_each_block():
    gradient = torch.randn(8, 12, dtype=torch.float64)
    found = starts.leading_of_blocks(gradient, 2, 3)
    assert found.shape == (2, 2, 3, 6)
    for j in range(2):
        for i in range(2):
            block = gradient[4 * j : 4 * j + 4, 6 * i : 6 * i + 6]
            V = torch.linalg.svd(block, full_matrices=False).Vh
            torch.testing.assert_close(
                (found[j, i] * V[:3]).sum(-1).abs(), torch.ones(3, dtype=torch.float64)
            )


def test_directions_lie_in_their_blocks_and_what_they_leave_over_stays():
    spare = torch.randn(2, 6, 8)
    by_block = torch.randn(2, 2, 3, 6, dtype=torch.float64)  # of 4 rows, 3
    A = rearrange(starts.down_from_directions(by_block, 8, spare), "i m (j s) -> j i s m", j=2)
    assert torch.equal(A[:, :, :3], by_block)
    assert torch.equal(A[:, :, 3], rearrange(spare, "i m (j s) -> j i s m", j=2)[:, :, 3].double())
    alike = rearrange(
        starts.down_from_directions(by_block[0], 8, spare), "i m (j s) -> j i s m", j=2
    )
    assert torch.equal(alike[0, :, :3], by_block[0]) and torch.equal(alike[1, :, :3], by_block[0])
