"""Which k: by the paper's rule, where it is legal."""

from __future__ import annotations

import math

from torch import nn

from gralora.config import GraloraConfig, divisors, suggested
from gralora.layers.kinds import ADAPTABLE, maps_of


def suggest_k(target: nn.Module | GraloraConfig, config: GraloraConfig | None = None) -> int:
    """A `gralora_k` for a layer, or for any layer that a config may meet.

    The paper's rule (section 4): 2 up to r = 32, 4 from r = 64; the largest legal value up to that,
    where it is not legal. The parameters are r * (in + out) whatever k. A rule that followed a
    gradient stood here once: on held-out data it was no better than LoRA, which it chose for every
    layer (`benchmarks/README.md`).

    Args:
        target: a layer (an attention counts with all its projections), or a config.
        config: of the adapter, where `target` is a layer; `GraloraConfig()` if None.

    Raises:
        TypeError: `target` is neither.
    """
    if isinstance(target, GraloraConfig):
        return suggested(target.r, divisors(target.r))
    maps = list(maps_of(target)) if isinstance(target, nn.Module) else []
    if not maps:
        raise TypeError(
            f"suggest_k takes a GraloraConfig or one of {ADAPTABLE}, not a {type(target).__name__}."
        )
    r = (config or GraloraConfig()).r
    return suggested(
        r, divisors(math.gcd(r, *(size for map in maps for size in map.divided_sizes)))
    )
