"""Which k: by the paper's rule, or by how well its blocks can follow a gradient."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from gralora.config import GraloraConfig, divisors, suggested
from gralora.layers.kinds import ADAPTABLE, spots


def suggest_k(
    target: nn.Module | GraloraConfig, config: GraloraConfig | None = None, *, gradient: Tensor | None = None
) -> int:
    """A `gralora_k` for a layer, or for any layer that a config may meet.

    The paper's rule (section 4): 2 up to r = 32, 4 from r = 64; the largest legal value up to that, where it is not legal.
    With a gradient instead: the legal k whose best adapter of this r, a truncated SVD of every block, comes nearest to it.
    The parameters are r * (in + out) whatever k.

    Args:
        target: a layer (an attention counts with all its projections), or a config.
        config: of the adapter, where `target` is a layer; `GraloraConfig()` if None.
        gradient: of the layer's weight, in its layout, as a calibration batch leaves it in `layer.weight.grad`.

    Raises:
        TypeError: `target` is neither. ValueError: the gradient is not of the weight's shape, or not finite.
    """
    if isinstance(target, GraloraConfig):
        return suggested(target.r, divisors(target.r))
    maps = list(spots(target)) if isinstance(target, nn.Module) else []
    if not maps:
        raise TypeError(f"suggest_k takes a GraloraConfig or one of {ADAPTABLE}, not a {type(target).__name__}.")
    r = (config or GraloraConfig()).r
    legal = divisors(math.gcd(r, *(size for spot in maps for size in spot.cut)))
    if gradient is None:
        return suggested(r, legal)
    spot = maps[0]
    if len(maps) > 1 or gradient.shape != spot.weight.shape:
        raise ValueError(
            f"a gradient of shape {tuple(gradient.shape)} was given for a weight of {tuple(spot.weight.shape)}, with "
            f"{len(maps)} maps in the layer: it must be the gradient of the one map's weight."
        )
    if not gradient.isfinite().all():
        raise ValueError("the gradient is not finite.")
    matrix = spot.kind.matrix(spot.module, spot.part, gradient.detach())
    return max(legal, key=lambda k: (_followed(matrix, r, k), -k))


def _followed(matrix: Tensor, r: int, k: int) -> float:
    """The squared norm of the part of `matrix` (..., out, in) that an adapter of r and k can follow."""
    blocks = rearrange(matrix, "... (j o) (i m) -> ... j i o m", j=k, i=k)
    values = torch.linalg.svdvals(blocks.to(torch.promote_types(matrix.dtype, torch.float32)))
    return float(values[..., : r // k].double().square().sum())
