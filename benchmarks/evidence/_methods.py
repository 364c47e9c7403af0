"""What the evidence compares: LoRA, GraLoRA by k and full fine-tuning of one model, each at the
learning rate that suits it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import peft
from torch import nn

import gralora

BEFORE, LORA, FULL, RECOMMENDED = "before", "LoRA", "full fine-tuning", "recommended"
Case = TypeVar("Case", bound=Hashable)
Result = TypeVar("Result", bound=Mapping[str, Any])


def rates(name: str, adapters: Sequence[float], full: Sequence[float]) -> Sequence[float]:
    """The learning rates that are tried: those of `adapters`, or of `full` fine-tuning; what is
    recommended, at its own.
    """
    own = [gralora.GraloraConfig.RECOMMENDED_RATE * 2.0**i for i in (-1, 0, 1)]
    return {BEFORE: (0.0,), FULL: full, RECOMMENDED: own}.get(name, adapters)


def prepared(
    model: nn.Module, name: str, r: int, linear: str | list[str], head: str | None = None
) -> nn.Module:
    """`model` with what is trained: all of it, or adapters of alpha = 2 * r in the layers `linear`,
    and the `head` whole.

    `name` is "before" (nothing is trained), "full fine-tuning", "LoRA" (PEFT's), "GraLoRA k=N" or
    "hybrid k=N", of whose rank half is a plain LoRA pair, or "recommended":
    `GraloraConfig.recommended(r)`, whose alpha is its own.
    """
    if name in (BEFORE, FULL):
        return model.requires_grad_(name == FULL)
    saved = [head] if head else None
    if name == LORA:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=linear, modules_to_save=saved),
        )
    if name == RECOMMENDED:
        return gralora.inject(
            model, linear, gralora.GraloraConfig.recommended(r, modules_to_save=saved)
        )
    hybrid_r = r // 2 if name.startswith("hybrid") else 0
    config = gralora.GraloraConfig(
        r - hybrid_r, hybrid_r, alpha=2 * r, gralora_k=int(name[-1]), modules_to_save=saved
    )
    return gralora.inject(model, linear, config)


def trained(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def by_case(
    runs: Iterable[tuple[Case, float, Result]], error: Callable[[Result], float]
) -> Iterator[tuple[Case, dict[float, list[Result]], float]]:
    """Of (case, learning rate, result): each case, its results by rate, and its best rate.

    That is the one with the lowest mean `error`, which is to be one on data for validation.
    """
    found: dict[Case, dict[float, list[Result]]] = {}
    for case, lr, result in runs:
        found.setdefault(case, {}).setdefault(lr, []).append(result)
    for case, by_rate in found.items():
        yield case, by_rate, min(by_rate, key=lambda lr: statistics.fmean(map(error, by_rate[lr])))


def verdict(differences: Sequence[float], agreeing: int) -> str:
    """Of paired differences: better if `agreeing` of them are above 0 and the mean is more than two
    standard errors; or worse.
    """
    mean, error = (
        statistics.fmean(differences),
        statistics.stdev(differences) / math.sqrt(len(differences)),
    )
    if mean > 2 * error and sum(d > 0 for d in differences) >= agreeing:
        return "better"
    return "worse" if mean < -2 * error and sum(d < 0 for d in differences) >= agreeing else "alike"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
