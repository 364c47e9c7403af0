"""Injecting an adapter into many layers, and taking it out again, against PEFT; and how the time
grows with their number.

1,000 layers of 64 x 64 side by side; the same, each in a module of its own, as in every real model;
and a Llama of 32 layers on the meta device, "all-linear" (224 layers of it).

    python -m benchmarks.speed.inject
"""

from __future__ import annotations

import copy
import gc
import statistics
import warnings

import peft
import torch
from torch import nn
from tqdm import tqdm

import gralora
from benchmarks import common

OURS, PEFT = "gralora", "PEFT"


class Block(nn.Module):
    """A layer in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(64, 64), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.fc(x))


def flat(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(count)))


def nested(count: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(count))})


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))


def measure(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Seconds of inject and of unload, ours and PEFT's, one after the other in every round."""
    times: dict[str, list[float]] = {
        f"{what}, {who}": [] for what in ("inject", "unload") for who in (OURS, PEFT)
    }
    targets = "all-linear" if hasattr(model, "config") else r".*fc|\d+"
    ours, theirs = gralora.GraloraConfig(r=8), peft.GraloraConfig(r=8, target_modules=targets)
    for _ in range(rounds + 1):
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        steps = [
            common.timed(gralora.inject, one, targets, ours),
            common.timed(peft.get_peft_model, other, theirs),
        ]
        steps += [common.timed(gralora.unload, one), common.timed(steps[1][1].unload)]
        for values, (seconds, _) in zip(times.values(), steps, strict=True):
            values.append(seconds)
    return {name: values[1:] for name, values in times.items()}


def grown(count: int, rounds: int) -> dict[str, float]:
    """Medians of the seconds of inject and of unload, each on a model that was just built."""
    found: dict[str, list[float]] = {"inject": [], "unload": []}
    for _ in range(rounds):
        model = nested(count)
        gc.collect()  # what the rounds before have left is not this one's
        found["inject"].append(
            common.timed(gralora.inject, model, "all-linear", gralora.GraloraConfig(r=8))[0]
        )
        found["unload"].append(common.timed(gralora.unload, model)[0])
    return {what: statistics.median(values) for what, values in found.items()}


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="50 layers, a Llama of 2, one round").parse_args(argv)
    rounds, count, depth = (1, 50, 2) if args.quick else (7, 1000, 32)
    models = {
        f"{count:,} layers, flat": flat(count),
        f"{count:,} layers, nested": nested(count),
        f"Llama, {depth} layers, meta": llama(depth),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = {
            name: measure(model, rounds)
            for name, model in tqdm(models.items(), desc="inject", mininterval=1)
        }
    rows, result = [], {}
    for name, own in times.items():
        ratios = {
            what: common.ratio(own, f"{what}, {OURS}", f"{what}, {PEFT}")
            for what in ("inject", "unload")
        }
        medians = {key: statistics.median(values) for key, values in own.items()}
        rows.append(
            (
                name,
                *(f"{value * 1e3:.0f}" for value in medians.values()),
                *(f"{r:.2f}" for r in ratios.values()),
            )
        )
        result[name] = {"seconds": medians, "ratio": ratios}
    head = (
        "",
        *(f"{key}, ms" for key in next(iter(times.values()))),
        "inject, over PEFT's",
        "unload, over PEFT's",
    )
    print("\n" + common.table(head, rows))
    growth = {
        many: grown(many, 1 if args.quick else 5)
        for many in ((10, 20, 40) if args.quick else (100, 1000, 10_000))
    }
    head = ("nested layers", "inject, µs a layer", "unload, µs a layer")
    rows = [(f"{n:,}", *(f"{t / n * 1e6:.0f}" for t in own.values())) for n, own in growth.items()]
    print("\n" + common.table(head, rows))
    series = {
        key: [own["seconds"][key] * 1e3 for own in result.values()]
        for key in result[next(iter(result))]["seconds"]
    }
    figure = common.bars("Injecting and taking out", "ms", list(result), series)
    common.write(args.out, "inject", {"models": result, "growth": growth}, figure)


if __name__ == "__main__":
    main()
