"""Aten calls that move data (views, detach and bare allocation left out), forward and backward:
exact, repeatable.

256 x 256, r = 32, k = 2, input (4, 16, 256) that needs a gradient.

    python -m benchmarks.speed.kernels
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import common
from benchmarks.speed._counting import kernels
from benchmarks.speed._variants import (
    FROZEN,
    OURS,
    PEFT_GRALORA,
    PEFT_LORA,
    PLAIN,
    build,
    plain_path,
    training_step,
)

NAMES = (FROZEN, OURS, PLAIN, PEFT_GRALORA, PEFT_LORA)


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="the same; it takes seconds").parse_args(argv)
    counts: dict[str, dict[str, list[str]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Sequential(nn.Linear(256, 256, dtype=dtype))
        models = build(base, ["0"], 32, 2, names=tuple(n for n in NAMES if n != PLAIN))
        x, grad = (
            torch.randn(4, 16, 256, dtype=dtype, requires_grad=True),
            torch.randn(4, 16, 256, dtype=dtype),
        )
        kind = str(dtype).removeprefix("torch.")
        both = {
            n: kernels(training_step(models.get(n, models[OURS]), x, grad, plain=n == PLAIN))
            for n in NAMES
        }
        with torch.no_grad():
            forward = {n: kernels(lambda m=model, x=x: m(x)) for n, model in models.items()}
            with plain_path():
                forward[PLAIN] = kernels(lambda m=models[OURS], x=x: m(x))
        counts[f"{kind}, forward + backward"] = both
        counts[f"{kind}, forward, no gradient"] = {n: forward[n] for n in NAMES}
    numbers = {
        case: {name: len(ops) for name, ops in by_name.items()} for case, by_name in counts.items()
    }
    print(
        common.table(("", *NAMES), [(case, *by_name.values()) for case, by_name in numbers.items()])
    )
    series = {name: [by_name[name] for by_name in numbers.values()] for name in NAMES}
    figure = common.bars(
        "Kernels of one adapted layer", "aten calls that move data", list(numbers), series
    )
    common.write(args.out, "kernels", {"counts": numbers, "names": counts}, figure)


if __name__ == "__main__":
    main()
