"""Held-out quality by rank: LoRA, GraLoRA at k = 2, 4, 8, hybrid GraLoRA, and full fine-tuning, on
the main job's data.

Beside them, at r = 16 and 64, what the library recommends after the chat experiment: MiniLM is a
task that it was not chosen on. Each is trained on 2,000 terms for one epoch, with four learning
rates and three seeds (of the initial values, the choice of terms and their order). The learning
rate is the one with the lowest mean error on 500 terms for validation; what is told is the error on
the 1,000 held-out terms, mean and spread over the seeds, and how it changes with the learning rate.
All of one rank have the same number of trained parameters.

    python -m benchmarks.evidence.quality             50 minutes on two cores; goes on where it was
    interrupted python -m benchmarks.evidence.quality --quick     20 seconds
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gralora
from benchmarks import common
from benchmarks.evidence import _methods as methods
from benchmarks.jobs import encoder

RANKS = (8, 16, 32, 64, 128)
ADAPTERS = (methods.LORA, "GraLoRA k=2", "GraLoRA k=4", "GraLoRA k=8", "hybrid k=2")
ADAPTER_RATES, FULL_RATES = (1e-4, 3e-4, 1e-3, 3e-3), (3e-5, 1e-4, 3e-4)
FIXED = "0.001"  # of these, the one at which all are compared beside
SEEDS = (0, 1, 2)
TRAINED, VALIDATED = 2000, 500

Done = dict[str, dict[str, Any]]


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
        return [Run(name, 8, 1e-3, 0) for name in ADAPTERS[::4]]
    adapters = [(name, rank) for rank in RANKS for name in ADAPTERS]
    adapters += [(methods.RECOMMENDED, rank) for rank in (16, 64)]
    cases = [
        (name, rank, lr)
        for name, rank in [*adapters, (methods.FULL, 0)]
        for lr in methods.rates(name, ADAPTER_RATES, FULL_RATES)
    ]
    return [Run(*case, seed) for seed in SEEDS for case in cases]


def prepared(run: Run) -> nn.Module:
    """MiniLM with a new head, and what the run trains."""
    model: nn.Module = encoder.fresh_model(run.seed)
    return methods.prepared(model, run.name, run.rank, encoder.LINEAR, "head")


load_data = functools.lru_cache(encoder.load_data)


def measure(run: Run, steps: int | None = None) -> dict[str, Any]:
    data, held_out = load_data(quick=steps is not None)
    generator = torch.Generator("cpu").manual_seed(run.seed)
    order = torch.randperm(len(data) - VALIDATED, generator=generator, device="cpu")
    training, validation = (
        data[VALIDATED + order[:TRAINED]],
        data[torch.arange(VALIDATED if steps is None else 50)],
    )
    model = prepared(run)
    losses, seconds = encoder.train(model, training, run.lr, steps, run.key, seed=run.seed)
    return {
        "validation": encoder.quality(model, validation),
        "held out": encoder.quality(model, held_out),
        "training loss": statistics.fmean(losses[-10:]),
        "trainable": methods.trained(model),
        "k": dict(Counter(row.gralora_k for row in gralora.summary(model))),
        "seconds": seconds,
        **({} if steps is None else {"steps": steps}),
    }


def chosen(runs: list[Run], done: Done) -> list[dict[str, Any]]:
    """Every case that has been run: its errors at each rate, and what it is worth at the rate that
    validation chooses.

    "differences" are to the LoRA of that rank, seed by seed: runs of one seed share their terms,
    their order and their head.
    """
    ended = (((run.name, run.rank), run.lr, done[run.key]) for run in runs if run.key in done)
    cases, lora = [], {}
    for (name, rank), by_rate, lr in methods.by_case(ended, lambda each: each["validation"]["mse"]):
        best = by_rate[lr]
        errors = [each["held out"]["mse"] for each in best]
        if name == methods.LORA:
            lora[rank] = errors
        mse, spread = methods.spread(errors)
        case = {
            "name": name,
            "rank": rank,
            "lr": lr,
            "seeds": len(best),
            "mse": mse,
            "spread": spread,
        }
        case["pearson"], _ = methods.spread([each["held out"]["pearson"] for each in best])
        if name in (*ADAPTERS[1:], methods.RECOMMENDED) and len(lora.get(rank, ())) == len(errors):
            case["differences"] = [a - b for a, b in zip(errors, lora[rank], strict=True)]
        case["by rate"] = {
            f"{rate:g}": statistics.fmean(each["held out"]["mse"] for each in results)
            for rate, results in by_rate.items()
        }
        cases.append({**case, "trainable": best[0]["trainable"]})
    return cases


def picture(cases: list[dict[str, Any]]) -> common.Figure:
    figure = common.Figure(figsize=(12, 4.5))
    panes = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(ADAPTERS):
        own = [case for case in cases if case["name"] == name]
        beside = [case["rank"] * 1.03 ** (i - 2.5) for case in own]
        errors, spreads = [case["mse"] for case in own], [case["spread"] for case in own]
        panes[0].errorbar(
            beside,
            errors,
            yerr=spreads,
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=name,
        )
        fixed = [(case["rank"], case["by rate"][FIXED]) for case in own if FIXED in case["by rate"]]
        panes[1].plot(*zip(*fixed, strict=True), marker="o", markersize=4, label=name)
    for case in cases:
        if case["name"] == methods.FULL:
            panes[0].axhline(case["mse"], color="grey", linestyle="--", label=methods.FULL)
            panes[0].axhspan(
                case["mse"] - case["spread"], case["mse"] + case["spread"], color="grey", alpha=0.15
            )
    for pane, title in zip(
        panes, ("each at its best learning rate", f"all at learning rate {FIXED}"), strict=True
    ):
        pane.set_xscale("log", base=2)
        pane.set_xticks(RANKS, [str(rank) for rank in RANKS])
        pane.set(
            xlim=(6.5, 160),
            xlabel="rank r (equal parameters)",
            title=f"MiniLM on VADER ratings, {title}",
        )
    panes[0].set_ylabel("held-out MSE")
    panes[1].legend(*panes[0].get_legend_handles_labels(), fontsize=8)
    return figure


def by_rate(cases: list[dict[str, Any]]) -> str:
    """A table: a row for a method and a learning rate, a column for a rank."""
    ranks = list(dict.fromkeys(case["rank"] for case in cases))
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for case in cases:
        for rate, error in case["by rate"].items():
            rows.setdefault((case["name"], rate), {})[case["rank"]] = error
    head = ("", "lr", *(f"r={rank}" if rank else "all" for rank in ranks))
    return common.table(
        head, [(*key, *(row.get(rank, "") for rank in ranks)) for key, row in rows.items()]
    )


def write(out: Path, runs: list[Run], done: Done, *, quiet: bool = False) -> list[dict[str, Any]]:
    cases = chosen(runs, done)
    ordered = {run.key: done[run.key] for run in runs if run.key in done}  # whatever ended first
    common.write(out, "quality", {"chosen": cases, "runs": ordered}, picture(cases), quiet=quiet)
    return cases


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="two runs of 10 steps").parse_args(argv)
    runs, steps = plan(quick=args.quick), 10 if args.quick else None
    there = common.written(args.out, "quality")
    done = {
        key: result for key, result in there.get("runs", {}).items() if result.get("steps") == steps
    }
    left = [run for run in runs if run.key not in done]
    for run, result in common.each(
        functools.partial(measure, steps=steps), left, "quality", here=args.quick
    ):
        done[run.key] = result
        write(args.out, runs, done, quiet=True)
    cases = write(args.out, runs, done)
    head = ("", "r", "lr", "held-out MSE", "to LoRA's, by seed", "Pearson r", "trainable", "seeds")
    rows = []
    for case in cases:
        error, difference = f"{case['mse']:.3f} ± {case['spread']:.3f}", ""
        if "differences" in case:
            difference = "{:+.3f} ± {:.3f}".format(*methods.spread(case["differences"]))
        told = f"{case['pearson']:.3f}", f"{case['trainable']:,}", case["seeds"]
        rows.append((case["name"], case["rank"] or "", f"{case['lr']:g}", error, difference, *told))
    print("\n" + common.table(head, rows))
    for name in ADAPTERS[1:]:
        pairs = [
            each for case in cases if case["name"] == name for each in case.get("differences", ())
        ]
        if pairs:
            better = sum(each < 0 for each in pairs)
            print(
                f"{name}: {statistics.fmean(pairs):+.3f} to LoRA's, better in {better} of"
                f" {len(pairs)} pairs"
            )
    print("\nheld-out MSE at every learning rate:\n" + by_rate(cases))


if __name__ == "__main__":
    main()
