"""What rank buys: spectra of trained updates, and how near LoRA and GraLoRA can come to a real full
fine-tuning.

Both at equal parameters, on MiniLM and the main job's data. First, LoRA and GraLoRA of rank 32 are
trained for one epoch, and the singular values of their updates are looked at. Then MiniLM is
fine-tuned whole, and the difference of every linear layer is approximated as well as each method
can: a truncated SVD of the whole, or of every block.

    python -m benchmarks.evidence.expressivity             three minutes on two cores
    python -m benchmarks.evidence.expressivity --quick     4 steps each, half the ks, one layer of
    six
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

import gralora
from benchmarks import common
from benchmarks.jobs import encoder
from gralora.layers.base import gralora_layers

KS = (1, 2, 4, 8)
RANKS = (4, 8, 16, 32, 64, 128)
TRAINED_RANK = 32
SOME = 6
LR, FULL_LR = 1e-3, 5e-5


def name_of(k: int) -> str:
    return "LoRA" if k == 1 else f"GraLoRA k={k}"


def adapted(start: nn.Module, k: int) -> nn.Module:
    r = TRAINED_RANK
    config = gralora.GraloraConfig(r=r, alpha=2 * r, gralora_k=k, modules_to_save=["head"])
    torch.manual_seed(0)
    return gralora.inject(copy.deepcopy(start), "all-linear", config)


def spectrum(delta: Tensor) -> dict[str, Any]:
    """Singular values over their largest, and what they say of the rank."""
    values = torch.linalg.svdvals(delta.double())
    share = values.square() / values.square().sum()
    return {
        "rank": int((values > 1e-5 * values[0]).sum()),
        "stable rank": float(values.square().sum() / values[0] ** 2),
        "effective rank": float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum())),
        "values": (values / values[0])[:256].tolist(),
    }


def left_over(delta: Tensor, r: int, k: int) -> float:
    """‖delta - the nearest update of r and k‖ / ‖delta‖."""
    blocks = rearrange(delta.double(), "(j o) (i m) -> j i o m", j=k, i=k)
    rest = torch.linalg.svdvals(blocks)[..., r // k :]
    return float(rest.norm() / delta.double().norm())


def trained_spectra(
    start: nn.Module, data: encoder.Data, held_out: encoder.Data, steps: int | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k in KS[::2] if steps else KS:
        model = adapted(start, k)
        encoder.train(model, data, LR, steps, name_of(k))
        layers = list(gralora_layers(model))[:: SOME if steps else 1]
        own = {name: spectrum(gralora.delta_weight(layer).detach()) for name, layer in layers}
        mean = {
            key: statistics.fmean(each[key] for each in own.values())
            for key in ("rank", "stable rank", "effective rank")
        }
        values = torch.tensor([each["values"] for each in own.values()]).mean(0).tolist()
        found[name_of(k)] = {**mean, **encoder.quality(model, held_out), "values": values}
    return found


def best_approximations(start: nn.Module, data: encoder.Data, steps: int | None) -> dict[str, Any]:
    tuned = copy.deepcopy(start)
    encoder.train(tuned, data, FULL_LR, steps, "full fine-tuning")
    there = dict(tuned.named_modules())
    found = [
        (name, m)
        for name, m in start.named_modules()
        if isinstance(m, nn.Linear) and name != "head"
    ]
    layers = dict(found[:: SOME if steps else 1])
    errors: dict[str, dict[int, list[float]]] = {
        name_of(k): {r: [] for r in RANKS if r % k == 0} for k in KS
    }
    stable = []
    for name, layer in tqdm(layers.items(), desc="approximations", mininterval=1):
        delta = (there[name].weight - layer.weight).detach()
        stable.append(spectrum(delta)["stable rank"])
        for k in KS:
            for r, own in errors[name_of(k)].items():
                own.append(left_over(delta, r, k))
    means = {
        name: {r: statistics.fmean(own) for r, own in by_rank.items()}
        for name, by_rank in errors.items()
    }
    best = {
        r: [
            min(KS, key=lambda k: errors[name_of(k)].get(r, [9.0] * 99)[i])
            for i in range(len(layers))
        ]
        for r in RANKS
    }
    return {
        "errors": means,
        "best k by layer": {r: dict(zip(layers, ks, strict=True)) for r, ks in best.items()},
        "stable rank": statistics.fmean(stable),
    }


def picture(spectra: dict[str, Any], errors: dict[str, dict[int, float]]) -> common.Figure:
    figure = common.Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2)
    for name, each in spectra.items():
        left.plot(range(1, len(each["values"]) + 1), each["values"], label=name)
    left.set_yscale("log")
    left.set(
        ylim=(1e-5, 1.5),
        xlabel="singular value",
        ylabel="over the largest",
        title=f"trained ΔW, r = {TRAINED_RANK}, mean of the layers",
    )
    for name, by_rank in errors.items():
        right.plot(list(by_rank), list(by_rank.values()), marker="o", label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(RANKS, [str(r) for r in RANKS])
    right.set(
        xlabel="r (equal parameters)",
        ylabel="relative error",
        title="the nearest update to full fine-tuning's",
    )
    for axes in (left, right):
        axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="4 steps each, half the ks, one layer of six").parse_args(
        argv
    )
    steps = 4 if args.quick else None
    data, held_out = encoder.load_data(quick=args.quick)
    start = encoder.fresh_model()
    spectra = trained_spectra(start, data, held_out, steps)
    approximations = best_approximations(start, data, steps)
    errors = approximations["errors"]
    rows = [
        (
            name,
            *(f"{each[key]:.1f}" for key in ("rank", "stable rank", "effective rank")),
            f"{each['mse']:.3f}",
        )
        for name, each in spectra.items()
    ]
    print(
        "\n"
        + common.table(
            (
                f"trained, r = {TRAINED_RANK}",
                "rank",
                "stable rank",
                "effective rank",
                "held-out MSE",
            ),
            rows,
        )
    )
    head = ("relative error of the nearest", *(f"r={r}" for r in RANKS))
    print(
        "\n"
        + common.table(
            head,
            [
                (name, *(f"{own[r]:.3f}" if r in own else "" for r in RANKS))
                for name, own in errors.items()
            ],
        )
    )
    print(
        "\nstable rank of full fine-tuning's difference, mean of the layers:"
        f" {approximations['stable rank']:.1f}"
    )
    common.write(
        args.out,
        "expressivity",
        {"trained": spectra, "nearest": approximations},
        picture(spectra, errors),
    )


if __name__ == "__main__":
    main()
