"""The mathematics of GraLoRA (arXiv 2505.20355) as pure functions on tensors.

One letter per axis, here and everywhere: `i` input block, `j` output block, `m` = in / k, `o` = out
/ k, `r` rank, `s` = r / k, the rank of one block. Block (i, j) of the weight has the
down-projection `A[i][:, j*s:(j+1)*s]` and the up-projection `B[j][i*s:(i+1)*s, :]`. These functions
are the definition; faster paths elsewhere are held to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""(A, B, A_general, B_general) of one adapter."""


def gralora_update(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """What the adapter adds to the layer's output: scaling * x @ ΔWᵀ, without ΔW.

        z[i]  = dropout(x)[i] @ A[i]        y[j] = z regrouped by j @ B[j]
        y    += dropout(x) @ A_generalᵀ @ B_generalᵀ        (a draw of its own, as in PEFT)

    Args:
        x: (..., in), of A's dtype.
        A, B: (k, in / k, r) and (k, r, out / k); or the part of some block columns or rows, which
            is not square.
        A_general, B_general: (hybrid_r, in) and (out, hybrid_r), or None.
        dropout: probability; 0 outside training.

    Returns:
        (..., out). Source: paper, section 3; PEFT `tuners/gralora/layer.py`, `Linear.forward`.
    """
    blocks = rearrange(dropped(x, dropout), "... (i m) -> ... i m", i=len(A))
    z = einsum(blocks, A, "... i m, i m r -> ... i r")
    z = rearrange(z, "... i (j s) -> ... j (i s)", j=len(B))
    y = rearrange(einsum(z, B, "... j r, j r o -> ... j o"), "... j o -> ... (j o)")
    if A_general is not None and B_general is not None:
        y = y + F.linear(F.linear(dropped(x, dropout), A_general), B_general)
    return y * scaling


def gralora_rows(
    rows: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    *,
    scaling: float,
    dropout: float = 0.0,
    padding: int | None = None,
) -> Tensor:
    """Rows of ΔW, without ΔW: what the adapter of an embedding adds for the tokens `rows`.

        ΔW[n, i] = scaling * B[j][i*s:(i+1)*s, n mod o] @ A[i][:, j*s:(j+1)*s]ᵀ        j = n div o,
        the block row of token n

    Args:
        rows: integers (...), below k * o.
        dropout: probability that a token, the input of this map, is dropped.
        padding: a row that gets no gradient.

    Returns:
        (..., in).
    """
    block, column = rows // B.shape[2], rows % B.shape[2]

    def chosen(found: Tensor) -> Tensor:
        found = (
            found
            if padding is None
            else torch.where((rows == padding)[..., None], found.detach(), found)
        )
        return found * dropped(found.new_ones(rows.shape), dropout)[..., None] if dropout else found

    up = rearrange(chosen(B[block, :, column]), "... (i s) -> ... i s", i=len(A))
    here = (block[..., None] == torch.arange(len(B), device=rows.device)).to(up.dtype)
    z = rearrange(einsum(up, here, "... i s, ... j -> ... i j s"), "... i j s -> ... i (j s)")
    y = rearrange(einsum(z, A, "... i r, i m r -> ... i m"), "... i m -> ... (i m)")
    if A_general is not None and B_general is not None:
        y = y + chosen(B_general[rows]) @ A_general
    return y * scaling


def delta_weight(
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    *,
    scaling: float,
) -> Tensor:
    """ΔW of shape (..., out, in): every block a product of rank s, so r * in * out / k
    multiply-adds in all.

    Leading axes of all tensors alike, as of an adapter for each of many experts, go through. A and
    B may be the part of some block columns or rows, which is not square.
    """
    down = rearrange(A, "... i m (j s) -> ... i m j s", j=B.shape[-3])
    up = rearrange(B, "... j (i s) o -> ... j i s o", i=A.shape[-3])
    delta = rearrange(
        einsum(down, up, "... i m j s, ... j i s o -> ... j o i m"),
        "... j o i m -> ... (j o) (i m)",
    )
    if A_general is not None and B_general is not None:
        delta = delta + B_general @ A_general
    return delta * scaling


def add_delta_rows_(
    rows: Tensor,
    start: int,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
    *,
    scaling: float,
) -> Tensor:
    """rows += the rows of ΔW from `start` on, in place, block by block, with no temporary of their
    size.

    Args:
        rows: (n, in), any strides, of A's dtype; n rows that lie within one output block.
    """
    k, o, n = A.shape[0], B.shape[-1], rows.shape[0]
    j, first = divmod(start, o)
    down = rearrange(A, "i m (j s) -> j i s m", j=k)[j]
    up = rearrange(B, "j (i s) o -> j i o s", i=k)[j]
    for i, block in enumerate(rearrange(rows, "n (i m) -> i n m", i=k)):
        block.addmm_(up[i, first : first + n], down[i], alpha=scaling)
    if A_general is not None and B_general is not None:
        rows.addmm_(B_general[start : start + n], A_general, alpha=scaling)
    return rows


def lora_factors(
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None = None,
    B_general: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same update as one plain LoRA pair, exactly.

    Returns:
        down (..., k * r + hybrid_r, in), block-sparse, and up (..., out, k * r + hybrid_r): scaling
        * up @ down is ΔW.
    """
    k = A.shape[-3]
    same_block = torch.eye(k, dtype=A.dtype, device=A.device)
    down = einsum(
        rearrange(A, "... i m (j s) -> ... i m j s", j=k),
        same_block,
        "... i m j s, i h -> ... i j s h m",
    )
    up = einsum(
        rearrange(B, "... j (i s) o -> ... j i s o", i=k),
        same_block,
        "... j i s o, j h -> ... h o i j s",
    )
    down = rearrange(down, "... i j s h m -> ... (i j s) (h m)")
    up = rearrange(up, "... h o i j s -> ... (h o) (i j s)")
    if A_general is not None and B_general is not None:
        down, up = torch.cat([down, A_general], dim=-2), torch.cat([up, B_general], dim=-1)
    return down, up


def with_room(tensors: Tensors, r: int, hybrid_r: int) -> Tensors:
    """The same update in factors of larger ranks: zeros behind the ranks of every block, and behind
    the plain pair's.

    Args:
        r, hybrid_r: of the result, at least those of `tensors`; 0 and no plain pair make one of
            zeros.
    """
    A, B, A_general, B_general = tensors
    k, (n_in, n_out) = A.shape[-3], (A.shape[-3] * A.shape[-2], B.shape[-3] * B.shape[-1])
    more = (r - A.shape[-1]) // k
    A = rearrange(
        F.pad(rearrange(A, "... m (j s) -> ... m j s", j=k), (0, more)), "... m j s -> ... m (j s)"
    )
    up = F.pad(rearrange(B, "... (i s) o -> ... i s o", i=k), (0, 0, 0, more))
    if A_general is None and hybrid_r:
        A_general, B_general = (
            A.new_zeros(*A.shape[:-3], 0, n_in),
            A.new_zeros(*A.shape[:-3], n_out, 0),
        )
    if A_general is not None and B_general is not None:
        rest = hybrid_r - A_general.shape[-2]
        A_general, B_general = F.pad(A_general, (0, 0, 0, rest)), F.pad(B_general, (0, rest))
    return A, rearrange(up, "... i s o -> ... (i s) o"), A_general, B_general


def truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best pair of rank `rank` for up @ down, by SVD of a core no larger than the pair's own
    rank.

    Returns:
        down (rank, in), up (out, rank), padded with zeros where the product's rank is lower, and
        the relative error.
    """
    Q_up, R_up = torch.linalg.qr(up)
    Q_down, R_down = torch.linalg.qr(down.mT)
    U, S, Vh = torch.linalg.svd(R_up @ R_down.mT, full_matrices=False)
    kept = min(rank, len(S))
    root = S[:kept].sqrt()
    pad = rank - kept
    new_up = F.pad((Q_up @ U[:, :kept]) * root, (0, pad))
    new_down = F.pad(root[:, None] * (Vh[:kept] @ Q_down.mT), (0, 0, 0, pad))
    total = float(S.norm())
    return new_down, new_up, float(S[kept:].norm()) / total if total else 0.0


def product_norm(down: Tensor, up: Tensor) -> float:
    """The Frobenius norm of up @ down, without the product."""
    return float((torch.linalg.qr(up).R @ torch.linalg.qr(down.mT).R.mT).norm())


def block_svd(delta: Tensor, r: int, k: int) -> tuple[Tensor, Tensor]:
    """The GraLoRA pair whose ΔW, at scaling 1, is nearest to `delta` (..., out, in): a truncated
    SVD of every block.
    """
    U, S, Vh = torch.linalg.svd(
        rearrange(delta, "... (j o) (i m) -> ... j i o m", j=k, i=k), full_matrices=False
    )
    s = min(r // k, S.shape[-1])
    root, pad = S[..., :s].sqrt(), r // k - s
    up = F.pad(U[..., :s] * root[..., None, :], (0, pad))
    down = F.pad(root[..., None] * Vh[..., :s, :], (0, 0, 0, pad))
    return rearrange(down, "... j i s m -> ... i m (j s)"), rearrange(
        up, "... j i o s -> ... j (i s) o"
    )


def rank_of_share(delta: Tensor, share: float, k: int) -> int:
    """The smallest r, a multiple of k, whose blocks can keep `share` of the squared norm of `delta`
    (..., out, in).
    """
    S = torch.linalg.svdvals(rearrange(delta, "... (j o) (i m) -> ... j i o m", j=k, i=k).double())
    return k * _count_for(S, share)


def _count_for(S: Tensor, share: float) -> int:
    """How many of the singular values (..., n), the largest first, hold `share` of the sum of all
    squares; at least one.
    """
    kept = S.square().flatten(end_dim=-2).sum(0).cumsum(0) if S.dim() > 1 else S.square().cumsum(0)
    return min(int((kept < share * kept[-1]).sum()) + 1, len(kept))


def pair_rank_of_share(down: Tensor, up: Tensor, share: float) -> int:
    """The smallest rank that keeps `share` of the squared norm of up @ down, (..., r, in) and (...,
    out, r).
    """
    core = torch.linalg.qr(up.double()).R @ torch.linalg.qr(down.double().mT).R.mT
    return _count_for(torch.linalg.svdvals(core), share)


def nearest_factors(
    delta: Tensor, r: int, k: int, hybrid_r: int = 0, *, sweeps: int = 8
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(A, B, A_general, B_general) whose ΔW, at scaling 1, is near to `delta` (..., out, in).

    Without `hybrid_r` it is the nearest. With it, blocks and plain pair are fitted in turn to what
    the other leaves over; every sweep comes nearer.
    """
    A, B = block_svd(delta, r, k)
    if not hybrid_r:
        return A, B, None, None
    for _ in range(sweeps):
        general = block_svd(delta - delta_weight(A, B, scaling=1.0), hybrid_r, 1)
        A_general, B_general = (
            rearrange(general[0], "... 1 i r -> ... r i"),
            rearrange(general[1], "... 1 r o -> ... o r"),
        )
        A, B = block_svd(delta - B_general @ A_general, r, k)
    return A, B, A_general, B_general


def best_lora_error(delta: Tensor, rank: int) -> float:
    """The relative error of the best LoRA of rank `rank` for `delta`."""
    S = torch.linalg.svdvals(delta)
    return float(S[rank:].norm() / S.norm()) if S.norm() else 0.0


def within(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), which of a nested tensor is that of every tensor in it."""
    if not x.is_nested:
        return function(x)
    if x.layout is torch.jagged:
        return torch.nested.nested_tensor_from_jagged(function(x.values()), cast(Any, x).offsets())
    return torch.nested.as_nested_tensor([function(each) for each in x.unbind()])


def dropped(x: Tensor, p: float) -> Tensor:
    """x after dropout, without a kernel where `p` is 0."""
    return F.dropout(x, p) if p else x
