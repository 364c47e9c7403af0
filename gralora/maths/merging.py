"""One update out of several, value by value: TIES (arXiv 2306.01708), DARE (arXiv 2311.03099),
pruning by magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude_prune(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Σ weight * delta, each with its smallest values set to zero but for `density` of them.

    Args:
        deltas: of one shape.
        density: the share that is kept, in (0, 1].
    """
    return sum(
        (_largest(d, density) * w for d, w in zip(deltas, weights, strict=True)),
        start=torch.zeros(()),
    )


def dare(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Σ weight * delta, each with values dropped at random, and the `density` that stay scaled by
    its inverse.

    Drawn from torch's generator of the tensors' device, so `torch.manual_seed` repeats it.
    """
    kept = (d * torch.bernoulli(torch.full_like(d, density)) / density for d in deltas)
    return sum((d * w for d, w in zip(kept, weights, strict=True)), start=torch.zeros(()))


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """The mean of weight * delta over those deltas that have, after pruning by magnitude, the sign
    of their sum.
    """
    pruned = torch.stack([_largest(d, density) for d in deltas])
    elected = torch.where(pruned.sum(0) >= 0, 1, -1)
    agree = pruned.sign() == elected
    weighted = torch.stack([d * w for d, w in zip(pruned, weights, strict=True)])
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but the `density` of its values that are largest in magnitude set to
    zero.
    """
    if density >= 1:
        return delta
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    return torch.zeros_like(delta).view(-1).scatter(0, kept, delta.flatten()[kept]).view_as(delta)
