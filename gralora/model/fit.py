"""An adapter fitted to an update: the nearest of its r and k, block by block."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from gralora.config import GraloraConfig
from gralora.engines.distributed import copy_into, whole
from gralora.maths import functional
from gralora.maths.functional import Tensors


def difference(key: str, base: Tensor, tuned: Tensor | None) -> Tensor:
    """tuned - base in float32 at least, or a ValueError that names `key`."""
    if tuned is None or tuned.shape != base.shape:
        found = "missing there" if tuned is None else f"of shape {tuple(tuned.shape)} there"
        raise ValueError(f"{key} is of shape {tuple(base.shape)} in the base, and {found}.")
    dtype = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    delta = tuned.detach().to(base.device, dtype) - base.detach().to(dtype)
    if not delta.isfinite().all():
        raise ValueError(f"{key} is not finite in one of the two models.")
    return delta


def fitted(delta: Tensor, config: GraloraConfig) -> tuple[Tensors, float]:
    """The factors of the adapter nearest to `delta` (out, in), with its scaling taken out, and the
    relative error.
    """
    tensors = functional.nearest_factors(delta, config.r, config.gralora_k, config.hybrid_r)
    root = math.sqrt(config.scaling)
    factors = cast(Tensors, tuple(None if t is None else t / root for t in tensors))
    total = float(delta.norm())
    off = float((functional.delta_weight(*factors, scaling=config.scaling) - delta).norm())
    return factors, off / total if total else 0.0


@torch.no_grad()
def fill(tensors: Tensors, delta: Tensor, config: GraloraConfig) -> float:
    """Give an adapter the values nearest to `delta` (..., out, in); returns the relative error."""
    factors, error = fitted(delta, config)
    for parameter, factor in zip(tensors, factors, strict=True):
        if parameter is not None and factor is not None:
            copy_into(parameter, factor)
    return error


def widened(tensors: Tensors) -> Tensors:
    """Whole, without gradients, and in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return cast(Tensors, tuple(None if t is None else whole(t.detach()).to(dtype) for t in tensors))


def rank_for(delta: Tensor, r: int | float | None, k: int, default: int) -> int:
    """`r` as a rank: itself, `default` where it is None, or of a share the smallest multiple of k
    that keeps it of ‖delta‖².
    """
    if r is None:
        return default
    return functional.rank_of_share(delta, r, k) if is_share(r) else cast(int, r)


def is_share(rank: object) -> bool:
    """Whether a rank is given as the share of the squared norm that is to stay, 0 < share < 1.

    Raises:
        ValueError: it is a float, but no share.
    """
    if not isinstance(rank, float):
        return False
    if not 0 < rank < 1:
        raise ValueError(
            f"rank={rank!r} is not legal: it must be an integer of at least 1, or a share of the"
            " squared norm between 0 and 1."
        )
    return True
