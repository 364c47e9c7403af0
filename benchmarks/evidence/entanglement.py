"""Gradient entanglement: what one outlier channel does to the update that a gradient step gives to
the weight.

At linear layers of MiniLM, with real inputs and real gradients of their outputs: one input channel
is scaled by 1 to 1000 (and its weights divided by the same, so the layer's output and the gradient
there stay). The full gradient then changes in that channel's column alone. A step on A and B
changes W by what A and B mix; how far this departs from the full gradient is told apart as 1 -
cosine (0 is the same direction, 1 is none of it): for the eighth of the inputs that the outlier is
in, for the other inputs, and for those outside the block column of k that it is in. A is as
initialised, B random and small, as early in training.

    python -m benchmarks.evidence.entanglement             under a minute on two cores
    python -m benchmarks.evidence.entanglement --quick     six layers, one rank
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from tqdm import tqdm

import gralora
from benchmarks import common
from benchmarks.jobs import encoder
from gralora.layers.adapter import GraloraAdapter
from gralora.maths import functional

SCALES = (1, 3, 10, 30, 100, 300, 1000)
KS, RANKS, FINEST = (1, 2, 4, 8), (8, 32, 128), 8
OUTLIER = 6.0  # times the median channel
B_SIZE = 0.02
WHERE = {
    "outside": "outside the outlier's eighth of the inputs",
    "outside its own": "outside the outlier's own block column, of k",
    "within": "within the outlier's eighth",
}


def captured(model: nn.Module, data: encoder.Data) -> dict[str, tuple[Tensor, Tensor]]:
    """(inputs (tokens, in), gradients of the outputs (tokens, out)) of every linear layer of the
    encoder, on one batch.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    real = data.attention_mask.bool()

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.retain_grad()
            outputs[name] = output

        return hook

    layers = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name != "head"
    ]
    handles = [module.register_forward_hook(keep(name)) for name, module in layers]
    model.eval()
    F.mse_loss(model(data), data.rating).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, _ in layers:
        gradient = outputs[name].grad
        assert gradient is not None
        found[name] = inputs[name][real].double(), gradient[real].double()
    return found


def outlier_channels(inputs: Tensor) -> list[tuple[int, float]]:
    """(channel, its root mean square over that of the median channel), largest first, of those that
    stand out.
    """
    size = inputs.square().mean(0).sqrt()
    ratio = size / size.median()
    order = ratio.argsort(descending=True)
    return [(int(i), float(ratio[i])) for i in order if ratio[i] > OUTLIER]


def first_order_update(adapter: GraloraAdapter, x: Tensor, gradient: Tensor) -> Tensor:
    """By what a small gradient step on A and B changes W, over the step."""
    A, B = adapter.A.detach().double(), adapter.B.detach().double()

    def output(A: Tensor, B: Tensor) -> Tensor:
        return functional.gralora_update(x, A, B, scaling=adapter.config.scaling)

    grads = torch.func.vjp(output, A, B)[1](gradient)
    delta = lambda A, B: functional.delta_weight(A, B, scaling=adapter.config.scaling)  # noqa: E731
    return jvp(delta, (A, B), grads)[1]


def departure(update: Tensor, full: Tensor) -> float:
    return float(1 - F.cosine_similarity(update.flatten(), full.flatten(), dim=0))


def block_column(channel: int, size: int, k: int) -> Tensor:
    """Which of `size` inputs share the block column of `channel`, of k."""
    return torch.arange(size) * k // size == channel * k // size


def measure(
    x: Tensor, gradient: Tensor, adapter: GraloraAdapter, channel: int
) -> dict[str, list[float]]:
    within, own = (block_column(channel, x.shape[1], k) for k in (FINEST, adapter.config.gralora_k))
    found: dict[str, list[float]] = {where: [] for where in WHERE}
    for scale in SCALES:
        scaled = x.clone()
        scaled[:, channel] *= scale
        full, update = gradient.T @ scaled, first_order_update(adapter, scaled, gradient)
        found["within"].append(departure(update[:, within], full[:, within]))
        found["outside"].append(departure(update[:, ~within], full[:, ~within]))
        found["outside its own"].append(
            1.0 if own.all() else departure(update[:, ~own], full[:, ~own])
        )
    return found


def picture(means: dict[str, dict[str, list[float]]], rank: int) -> common.Figure:
    figure = common.Figure(figsize=(13, 4))
    for axes, where in zip(figure.subplots(1, len(WHERE), sharey=True), WHERE, strict=True):
        for k in (
            KS[1:] if where == "outside its own" else KS
        ):  # LoRA has one block, so nothing outside
            values = means[f"k={k}, r={rank}"][where]
            axes.plot(
                SCALES,
                values,
                marker="o",
                label="LoRA" if k == 1 else f"GraLoRA k={k}",
                color=f"C{KS.index(k)}",
            )
        axes.set_xscale("log")
        axes.set_xlabel("scale of one input channel")
        axes.set_title(f"{WHERE[where]}, r = {rank}", fontsize=9)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("1 - cosine with the full gradient")
    return figure


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="six layers, one rank").parse_args(argv)
    data, _ = encoder.load_data()
    layers = captured(encoder.fresh_model(), data[torch.arange(64)])
    own = {name: outlier_channels(x) for name, (x, _) in layers.items()}
    if args.quick:
        layers = dict(list(layers.items())[:6])
    ranks = RANKS[1:2] if args.quick else RANKS
    cases: dict[str, dict[str, list[list[float]]]] = {}
    for index, (x, gradient) in enumerate(
        tqdm(layers.values(), desc="entanglement", mininterval=1)
    ):
        size = x.square().mean(0)
        channel = int((size - size.median()).abs().argmin())  # an ordinary one
        for r in ranks:
            for k in KS:
                torch.manual_seed(index)
                config = gralora.GraloraConfig(r=r, alpha=2 * r, gralora_k=k)
                adapter = GraloraAdapter(x.shape[1], gradient.shape[1], config, dtype=torch.float64)
                with torch.no_grad():
                    adapter.B.normal_(std=B_SIZE / r**0.5)
                found = cases.setdefault(f"k={k}, r={r}", {where: [] for where in WHERE})
                for where, values in measure(x, gradient, adapter, channel).items():
                    found[where].append(values)
    means = {
        case: {w: [statistics.fmean(v) for v in zip(*rows, strict=True)] for w, rows in by.items()}
        for case, by in cases.items()
    }
    for where, text in WHERE.items():
        shown = {
            case: by[where]
            for case, by in means.items()
            if where != "outside its own" or not case.startswith("k=1")
        }
        rows = [(case, *(f"{value:.3f}" for value in values)) for case, values in shown.items()]
        print("\n" + common.table((text, *(f"x {scale}" for scale in SCALES)), rows))
    named = [(name, len(found), *found[0]) for name, found in own.items() if found]
    rows = [
        (name, count, channel, f"{ratio:.1f}")
        for name, count, channel, ratio in sorted(named, key=lambda row: -row[3])
    ]
    print(
        f"\nchannels of MiniLM's own inputs above {OUTLIER:g} times the median channel: in"
        f" {len(rows)} of {len(own)} layers"
    )
    print(common.table(("layer", "channels", "the largest", "times the median"), rows))
    result = {"scales": SCALES, "departure": means, "outlier channels": own}
    common.write(args.out, "entanglement", result, picture(means, ranks[len(ranks) // 2]))


if __name__ == "__main__":
    main()
