"""Held-out quality by rank: LoRA, GraLoRA at k = 2, 4, 8, hybrid GraLoRA, and full fine-tuning, on the main job's data.

"k by gradient" is GraLoRA whose every layer has the k that `suggest_k` finds in the gradient of 256 of the training terms.

Each is trained on 2,000 terms for one epoch, with three learning rates and three seeds (of the initial values, the
choice of terms and their order). The learning rate is the one with the lowest mean error on 500 terms for validation;
what is told is the error on the 1,000 held-out terms, mean and spread over the seeds. All of one rank have the same
number of trained parameters.

    python -m benchmarks.quality             two hours on two cores; writes after every run, and goes on where it was
    python -m benchmarks.quality --quick     20 seconds
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import gralora
from benchmarks import common, finetune, methods

RANKS = (8, 16, 32, 64, 128)
ADAPTERS = (methods.LORA, "GraLoRA k=2", "GraLoRA k=4", "GraLoRA k=8", "hybrid k=2", "k by gradient")
SEEDS = (0, 1, 2)
TRAINED, VALIDATED, CALIBRATED = 2000, 500, 256

Done = dict[str, dict[str, Any]]
Case = tuple[str, int, dict[str, Any]]


class Run(NamedTuple):
    """One training run; `rank` is 0 where there is none."""

    name: str
    rank: int
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.name}, r={self.rank}, lr={self.lr:g}, seed={self.seed}"


def plan(*, quick: bool) -> list[Run]:
    """Every run, the seeds last, so that an interrupted plan has whole comparisons."""
    if quick:
        return [Run(name, 8, 1e-3, 0) for name in ADAPTERS[::5]]
    adapters = [(name, rank) for rank in RANKS for name in ADAPTERS]
    cases = [(name, rank, lr) for name, rank in [*adapters, (methods.FULL, 0)] for lr in methods.rates(name)]
    return [Run(*case, seed) for seed in SEEDS for case in cases]


def prepared(run: Run, training: finetune.Data) -> nn.Module:
    """MiniLM with a new head, and what the run trains."""
    model: nn.Module = finetune.fresh_model(run.seed)
    if run.name != "k by gradient":
        return methods.prepared(model, run.name, run.rank, finetune.LINEAR, "head")
    config = gralora.GraloraConfig(run.rank, alpha=2 * run.rank, modules_to_save=["head"])
    return gralora.inject(model, by_gradient(model, config, training[torch.arange(CALIBRATED)]))


def by_gradient(model: nn.Module, config: gralora.GraloraConfig, batch: finetune.Data) -> dict[str, Any]:
    """Targets, each linear layer of the encoder with the k that its weight's gradient on `batch` asks for."""
    F.mse_loss(model.eval()(batch), batch.rating).backward()
    targets = {}
    for name, module in model.named_modules():
        if name.endswith(tuple(finetune.LINEAR)):
            k = gralora.suggest_k(module, config, gradient=module.weight.grad)
            targets[re.escape(name)] = dataclasses.replace(config, gralora_k=k)
    model.zero_grad()
    return targets


load_data = functools.lru_cache(finetune.load_data)


def measure(run: Run, steps: int | None = None) -> dict[str, Any]:
    data, held_out = load_data()
    order = torch.randperm(len(data) - VALIDATED, generator=torch.Generator().manual_seed(run.seed))
    training, validation = data[VALIDATED + order[:TRAINED]], data[torch.arange(VALIDATED)]
    model = prepared(run, training)
    losses, seconds = finetune.train(model, training, run.lr, steps, run.key, seed=run.seed)
    return {
        "validation": finetune.quality(model, validation),
        "held out": finetune.quality(model, held_out),
        "training loss": statistics.fmean(losses[-10:]),
        "trainable": methods.trained(model),
        "k": dict(Counter(row.gralora_k for row in gralora.summary(model))),
        "seconds": seconds,
    }


def chosen(runs: list[Run], done: Done) -> Iterator[Case]:
    """(name, rank, summary) of every case, at the learning rate that validation chooses."""
    for name, rank in dict.fromkeys((run.name, run.rank) for run in runs):
        own = [(run.lr, done[run.key]) for run in runs if (run.name, run.rank) == (name, rank) and run.key in done]
        if not own:
            continue
        lr, best = methods.best_rate(own, lambda each: each["validation"]["mse"])
        mse, spread = methods.spread([each["held out"]["mse"] for each in best])
        pearson, _ = methods.spread([each["held out"]["pearson"] for each in best])
        summary = {"lr": lr, "seeds": len(best), "mse": mse, "spread": spread, "pearson": pearson}
        yield name, rank, {**summary, "trainable": best[0]["trainable"]}


def picture(cases: list[Case]) -> common.Figure:
    figure = common.Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for name in ADAPTERS:
        rows = [(rank, case) for each, rank, case in cases if each == name]
        if rows:
            ranks, errors, spreads = zip(*((rank, case["mse"], case["spread"]) for rank, case in rows), strict=True)
            axes.errorbar(ranks, errors, yerr=spreads, marker="o", capsize=3, label=name)
    for name, _, case in cases:
        if name == methods.FULL:
            axes.axhline(case["mse"], color="grey", linestyle="--", label=f"{methods.FULL} (22.6 M)")
            axes.axhspan(case["mse"] - case["spread"], case["mse"] + case["spread"], color="grey", alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set(xlabel="rank r (equal parameters)", ylabel="held-out MSE", title="MiniLM on VADER ratings, 2,000 terms")
    axes.legend(fontsize=8)
    return figure


def write(
    out: Path, runs: list[Run], done: dict[str, dict[str, Any]], *, quiet: bool = False
) -> list[tuple[str, int, dict[str, Any]]]:
    cases = list(chosen(runs, done))
    summary = [{"name": name, "rank": rank, **case} for name, rank, case in cases]
    ordered = {run.key: done[run.key] for run in runs if run.key in done}  # whatever ended first
    common.write(out, "quality", {"chosen": summary, "runs": ordered}, picture(cases), quiet=quiet)
    return cases


def main() -> None:
    args = common.parser(__doc__, quick="two runs of 10 steps").parse_args()
    runs, steps = plan(quick=args.quick), 10 if args.quick else None
    file: Path = args.out / "quality.json"
    done = {} if args.quick or not file.exists() else json.loads(file.read_text())["runs"]
    left = [run for run in runs if run.key not in done]
    for run, result in common.each(functools.partial(measure, steps=steps), left, "quality", here=args.quick):
        done[run.key] = result
        write(args.out, runs, done, quiet=True)
    cases = write(args.out, runs, done)
    head = ("", "r", "lr", "held-out MSE", "Pearson r", "trainable", "seeds")
    rows = []
    for name, rank, case in cases:
        error, trained = f"{case['mse']:.3f} ± {case['spread']:.3f}", f"{case['trainable']:,}"
        rows.append((name, rank or "", f"{case['lr']:g}", error, f"{case['pearson']:.3f}", trained, case["seeds"]))
    print("\n" + common.table(head, rows))


if __name__ == "__main__":
    main()
