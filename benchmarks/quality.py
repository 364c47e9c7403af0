"""Held-out quality by rank: LoRA, GraLoRA at k = 2, 4, 8, hybrid GraLoRA, and full fine-tuning, on the main job's data.

Each is trained on 2,000 terms for one epoch, with three learning rates and three seeds (of the initial values, the
choice of terms and their order). The learning rate is the one with the lowest mean error on 500 terms for validation;
what is told is the error on the 1,000 held-out terms, mean and spread over the seeds. All of one rank have the same
number of trained parameters.

    python -m benchmarks.quality             two hours on two cores; writes after every run, and goes on where it was
    python -m benchmarks.quality --quick     20 seconds
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import nn
from tqdm import tqdm

import gralora
from benchmarks import common, finetune

RANKS = (8, 16, 32, 64, 128)
ADAPTERS = ("LoRA", "GraLoRA k=2", "GraLoRA k=4", "GraLoRA k=8", "hybrid k=2")
FULL = "full fine-tuning"
RATES = {FULL: (3e-5, 1e-4, 3e-4)}
ADAPTER_RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
TRAINED, VALIDATED = 2000, 500


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
        return [Run(name, 8, 1e-3, 0) for name in ADAPTERS[:2]]
    adapters = [(name, rank) for rank in RANKS for name in ADAPTERS]
    cases = [(name, rank, lr) for name, rank in [*adapters, (FULL, 0)] for lr in RATES.get(name, ADAPTER_RATES)]
    return [Run(*case, seed) for seed in SEEDS for case in cases]


def prepared(run: Run) -> nn.Module:
    """MiniLM with a new head, and what the run trains."""
    model: nn.Module = finetune.fresh_model(run.seed)
    r = run.rank
    if run.name == FULL:
        return model
    if run.name == "LoRA":
        linear = ["query", "key", "value", "dense"]
        return peft.get_peft_model(
            model, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=linear, modules_to_save=["head"])
        )
    k, hybrid_r = int(run.name[-1]), r // 2 if run.name.startswith("hybrid") else 0
    config = gralora.GraloraConfig(r - hybrid_r, hybrid_r, alpha=2 * r, gralora_k=k, modules_to_save=["head"])
    return gralora.inject(model, "all-linear", config)


def measure(run: Run, data: finetune.Data, held_out: finetune.Data, steps: int | None) -> dict[str, Any]:
    order = torch.randperm(len(data) - VALIDATED, generator=torch.Generator().manual_seed(run.seed))
    training, validation = data[VALIDATED + order[:TRAINED]], data[torch.arange(VALIDATED)]
    model = prepared(run)
    losses, seconds = finetune.train(model, training, run.lr, steps, run.key, seed=run.seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "validation": finetune.quality(model, validation),
        "held out": finetune.quality(model, held_out),
        "training loss": statistics.fmean(losses[-10:]),
        "trainable": trained,
        "seconds": seconds,
    }


def chosen(runs: list[Run], done: Done) -> Iterator[Case]:
    """(name, rank, summary) of every case, at the learning rate that validation chooses."""
    for name, rank in dict.fromkeys((run.name, run.rank) for run in runs):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for run in runs:
            if (run.name, run.rank) == (name, rank) and run.key in done:
                by_rate.setdefault(run.lr, []).append(done[run.key])
        if not by_rate:
            continue
        lr = min(by_rate, key=lambda rate: statistics.fmean(each["validation"]["mse"] for each in by_rate[rate]))
        errors = [each["held out"]["mse"] for each in by_rate[lr]]
        pearson = [each["held out"]["pearson"] for each in by_rate[lr]]
        yield (
            name,
            rank,
            {
                "lr": lr,
                "seeds": len(errors),
                "mse": statistics.fmean(errors),
                "spread": statistics.stdev(errors) if len(errors) > 1 else 0.0,
                "pearson": statistics.fmean(pearson),
                "trainable": by_rate[lr][0]["trainable"],
            },
        )


def picture(cases: list[Case]) -> common.Figure:
    figure = common.Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for name in ADAPTERS:
        rows = [(rank, case) for each, rank, case in cases if each == name]
        if rows:
            ranks, errors, spreads = zip(*((rank, case["mse"], case["spread"]) for rank, case in rows), strict=True)
            axes.errorbar(ranks, errors, yerr=spreads, marker="o", capsize=3, label=name)
    for name, _, case in cases:
        if name == FULL:
            axes.axhline(case["mse"], color="grey", linestyle="--", label=f"{FULL} (22.6 M)")
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
    common.write(out, "quality", {"chosen": summary, "runs": done}, picture(cases), quiet=quiet)
    return cases


def main() -> None:
    args = common.parser(__doc__, quick="two runs of 10 steps").parse_args()
    runs, steps = plan(quick=args.quick), 10 if args.quick else None
    file: Path = args.out / "quality.json"
    done = {} if args.quick or not file.exists() else json.loads(file.read_text())["runs"]
    data, held_out = finetune.load_data()
    for run in tqdm([run for run in runs if run.key not in done], desc="quality", mininterval=1):
        done[run.key] = measure(run, data, held_out, steps)
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
