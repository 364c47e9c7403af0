"""Values for A to start from: directions out of data, in place of a draw.

Directions are the rows of block (i, j)'s down-projection, orthonormal. Decompositions run on the
CPU in float64, and the sign of every direction is fixed, so that the same data give the same start
on every device.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


def orthonormal_rows(r: int, k: int, m: int) -> Tensor:
    """Random (k, r, m) whose r rows are orthonormal, or where r exceeds m, the r / k of every
    block.
    """
    each = r if r <= m else r // k
    drawn = [
        nn.init.orthogonal_(torch.empty(each, m, device="cpu")) for _ in range(k * (r // each))
    ]
    return rearrange(torch.stack(drawn), "(k j) s m -> k (j s) m", k=k)


def gram_of_blocks(rows: Tensor, k: int) -> Tensor:
    """(k, m, m): Σ over `rows` (t, k * m) of x[i]ᵀ x[i], of every input block; what of them an SVD
    sees, in bounded memory.
    """
    blocks = rearrange(rows, "t (i m) -> i t m", i=k)
    return blocks.mT @ blocks


def leading_directions(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The right singular vectors of what `gram` (k, m, m) sums up, the largest first.

    Returns:
        directions (k, n, m) and the squares of their singular values (k, n), n the smaller of
        `count` and m.
    """
    values, vectors = torch.linalg.eigh(gram.to("cpu", torch.float64))  # ascending
    n = min(count, gram.shape[-1])
    values = values.clamp_min(0).flip(-1)[..., :n]
    return signed(rearrange(vectors.flip(-1)[..., :n], "i m n -> i n m")), values


def leading_of_blocks(gradient: Tensor, k: int, count: int) -> Tensor:
    """The leading right singular vectors of every block of `gradient` (out, in): (j, i, n, m), n at
    most `count`.

    Out of the eigenvectors of a block's Gram matrix on its shorter side, which takes a fraction of
    its SVD's time; in float64 the leading ones lose nothing that matters by it.
    """
    blocks = rearrange(gradient.to("cpu", torch.float64), "(j o) (i m) -> j i o m", j=k, i=k)
    tall = blocks.shape[-2] >= blocks.shape[-1]
    gram = blocks.mT @ blocks if tall else blocks @ blocks.mT
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :count].mT
    return signed(vectors if tall else orthonormal(vectors @ blocks))


def orthonormal(directions: Tensor) -> Tensor:
    """Rows made orthonormal, the first first; those that are zero, as of a block that lacks the
    rank, become any others.
    """
    Q: Tensor = torch.linalg.qr(directions.mT).Q
    return Q.mT


def signed(directions: Tensor) -> Tensor:
    """Each with the sign that makes its largest entry positive."""
    largest = directions.abs().argmax(-1, keepdim=True)
    return directions * directions.gather(-1, largest).sign()


def down_from_directions(directions: Tensor, r: int, spare: Tensor) -> Tensor:
    """A (k, m, r) whose block (i, j) holds directions[j, i], or directions[i] for every j alike.

    Args:
        directions: (j, i, n, m) or (i, n, m), n at most s = r / k.
        spare: A as it was, (k, m, r): what stays in the rows for which there is no direction.
    """
    k = len(spare)
    each = repeat(directions, "i n m -> j i n m", j=k) if directions.dim() == 3 else directions
    down = rearrange(spare.to("cpu", torch.float64), "i m (j s) -> j i s m", j=k).clone()
    down[:, :, : each.shape[2]] = each
    return rearrange(down, "j i s m -> i m (j s)")
