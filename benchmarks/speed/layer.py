"""One adapted layer, forward and backward, and one token without gradients.

Beside it: the frozen layer, PEFT's LoRA and GraLoRA, loralib, the plain path, and the arithmetic
floor: the frozen layer's time for the adapter's extra multiply-adds. "Above" is the time above the
frozen layer, pair by pair.

    python -m benchmarks.speed.layer
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import common
from benchmarks.speed._variants import (
    FROZEN,
    LORALIB,
    OURS,
    PEFT_GRALORA,
    PEFT_LORA,
    PLAIN,
    build,
    training_step,
)

SHAPES = {
    (768, 768): (1, 256, 1024, 4096),
    (768, 3072): (1, 256, 1024),
    (3072, 768): (1, 256, 1024),
    (1024, 1024): (1, 256, 1024),
    (4096, 4096): (1, 256),
}
RANKS = ((16, 2), (32, 2), (64, 4), (128, 8))
MANY_TOKENS = 256


def measure(n_in: int, n_out: int, tokens: int, r: int, k: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    names = (FROZEN, OURS, PEFT_GRALORA, PEFT_LORA, LORALIB)
    models = build(nn.Sequential(nn.Linear(n_in, n_out)), ["0"], r, k, names=names)
    x, grad = torch.randn(1, tokens, n_in, requires_grad=True), torch.randn(1, tokens, n_out)
    steps = {name: training_step(model, x, grad) for name, model in models.items()}
    steps[PLAIN] = training_step(models[OURS], x, grad, plain=True)
    times = common.interleaved(steps, rounds, repeats=20 if tokens == 1 else 1)
    frozen = statistics.median(times[FROZEN])
    floor = (
        frozen * 3 * r * (n_in + n_out) / (2 * n_in * n_out)
    )  # forward and backward: 3 products against 2
    above = {name: common.above(times, name, FROZEN) for name in steps if name != FROZEN}
    result = {
        **{
            "in": n_in,
            "out": n_out,
            "tokens": tokens,
            "r": r,
            "k": k,
            "frozen": frozen,
            "floor": floor,
        },
        "above": above,
        "over_peft_gralora": above[OURS] / above[PEFT_GRALORA],
        "over_peft_lora": above[OURS] / above[PEFT_LORA],
        "over_floor": above[OURS] / floor,
        "peft_gralora_over_floor": above[PEFT_GRALORA] / floor,
        "peft_lora_over_floor": above[PEFT_LORA] / floor,
    }
    if tokens == 1:
        with torch.no_grad():
            forward = {name: (lambda m=model: m(x)) for name, model in models.items()}
            times = common.interleaved(forward, rounds, repeats=100)
            result["no_grad_over_peft_gralora"] = common.ratio(times, OURS, PEFT_GRALORA)
            result["no_grad_over_peft_lora"] = common.ratio(times, OURS, PEFT_LORA)
    return result


def compiled(rounds: int, backend: str) -> float:
    """`torch.compile` of an adapted layer, over the same with nothing but the plain path in it."""
    x, grad = torch.randn(1, 512, 768, requires_grad=True), torch.randn(1, 512, 768)
    steps = {}
    for name in ("as it is", "plain"):
        torch._dynamo.reset()
        model = torch.compile(
            build(nn.Sequential(nn.Linear(768, 768)), ["0"], 32, 2, names=(OURS,))[OURS],
            fullgraph=True,
            backend=backend,
        )
        step = training_step(model, x, grad, plain=name == "plain")
        step()
        steps[name] = step
    return common.ratio(common.interleaved(steps, rounds), "as it is", "plain")


def main(argv: list[str] | None = None) -> None:
    args = common.parser(
        __doc__, quick="one shape, few rounds, no code made by the compiler"
    ).parse_args(argv)
    shapes = {(768, 768): (1, 256)} if args.quick else SHAPES
    rounds = 5 if args.quick else 15
    cases = [
        (*shape, t, r, k) for shape, counts in shapes.items() for t in counts for r, k in RANKS
    ]
    results = [measure(*case, rounds) for case in tqdm(cases, desc="layer", mininterval=1)]
    many = [row for row in results if row["tokens"] >= MANY_TOKENS]
    single = [row for row in results if row["tokens"] == 1]
    summary = {key: statistics.median(row[key] for row in many) for key in many[0] if "over" in key}
    summary |= {
        key: statistics.median(row[key] for row in single)
        for key in single[0]
        if key.startswith("no_grad")
    }
    summary["compiled_over_compiled_plain"] = compiled(
        rounds, "aot_eager" if args.quick else "inductor"
    )
    rows = [
        (
            f"{row['in']}x{row['out']}, {row['tokens']}",
            f"{row['r']}, {row['k']}",
            f"{row['frozen'] * 1e3:.2f}",
            f"{row['floor'] * 1e3:.2f}",
            *(
                f"{row['above'][name] * 1e3:.2f}"
                for name in (OURS, PLAIN, PEFT_GRALORA, PEFT_LORA, LORALIB)
            ),
        )
        for row in results
    ]
    head = (
        "layer, tokens",
        "r, k",
        "frozen ms",
        "floor +",
        *(f"{n} +" for n in (OURS, PLAIN, PEFT_GRALORA, PEFT_LORA, LORALIB)),
    )
    print(common.table(head, rows))
    print("\nmedians (with 256 tokens or more, unless no_grad: one token):")
    print(
        common.table(("ratio", "median"), [(key, f"{value:.2f}") for key, value in summary.items()])
    )
    shown = [row for row in many if (row["r"], row["k"]) == (64, 4)]
    labels = [f"{row['in']}x{row['out']}\n{row['tokens']} tokens" for row in shown]
    series = {
        n: [row["above"][n] / row["floor"] for row in shown]
        for n in (OURS, PEFT_GRALORA, PEFT_LORA)
    }
    title = "r = 64, k = 4: time above the frozen layer, over the arithmetic floor"
    common.write(
        args.out,
        "layer",
        {"summary": summary, "rows": results},
        common.bars(title, "ratio", labels, series),
    )


if __name__ == "__main__":
    main()
