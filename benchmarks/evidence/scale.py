"""What the scale promises, simulated: how the best learning rate moves with r and k, at alpha / r
and at alpha / √r.

One layer (256 x 256) learns a matrix: the loss is ‖ΔW - T‖² / ‖T‖², which is what white inputs give
in the mean, so there is no data and no noise. T is random, with singular values that fall as 1 /
√n. ΔW is computed by the definition (`functional.delta_weight`), Adam takes 60 steps, alpha is 32.
Learning rates are a factor of √2 apart; the best is read off a parabola through the three lowest,
in the mean over three draws. Beside it: the norms of ΔW after a first step at a rate of 0.001.

    python -m benchmarks.evidence.scale             4 minutes on two cores
    python -m benchmarks.evidence.scale --quick     5 seconds
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import common
from gralora import GraloraConfig
from gralora.layers.adapter import GraloraAdapter
from gralora.maths import functional

SIZE, ALPHA, STEPS, SEEDS = 256, 32, 60, (0, 1, 2)
RANKS, KS = (4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8)
RATES = [2.0 ** (power / 2) for power in range(-26, 3)]


class Case(NamedTuple):
    """One shape of an adapter, under one scale."""

    r: int
    k: int
    use_rslora: bool

    @property
    def config(self) -> GraloraConfig:
        return GraloraConfig(self.r, alpha=ALPHA, gralora_k=self.k, use_rslora=self.use_rslora)


def target(seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = (
        common.placed(torch.randn(SIZE, SIZE, generator=generator, device="cpu")) for _ in range(2)
    )
    U, V = (torch.linalg.qr(each).Q for each in drawn)
    return (U / torch.arange(1, SIZE + 1).sqrt()) @ V.mT


def final_losses(case: Case, seed: int, rates: list[float], steps: int) -> list[float]:
    """The loss after `steps` steps of Adam at each of the rates, from one start."""
    torch.manual_seed(seed)
    wanted, adapter, config = target(seed), GraloraAdapter(SIZE, SIZE, case.config), case.config
    pairs = [[t.detach().clone().requires_grad_() for t in (adapter.A, adapter.B)] for _ in rates]
    optimizer = torch.optim.Adam(
        [{"params": pair, "lr": rate} for pair, rate in zip(pairs, rates, strict=True)]
    )

    def losses() -> Tensor:
        A, B = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
        delta = functional.delta_weight(A, B, scaling=config.scaling)
        return (delta - wanted).square().sum((-2, -1)) / wanted.square().sum()

    for _ in range(steps):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()
    with torch.no_grad():
        return [value if math.isfinite(value) else math.inf for value in losses().tolist()]


def best_rate(rates: list[float], losses: list[float]) -> float:
    """Where a parabola through the lowest loss and its neighbours, over the rate's logarithm, is
    lowest.
    """
    i = min(range(len(losses)), key=losses.__getitem__)
    if not 0 < i < len(losses) - 1:
        return rates[i]
    below, here, above = losses[i - 1 : i + 2]
    bend = below - 2 * here + above
    shift = (
        0.0
        if not math.isfinite(bend) or bend <= 0
        else max(-0.5, min(0.5, 0.5 * (below - above) / bend))
    )
    return rates[i] * (rates[1] / rates[0]) ** shift


def first_step(case: Case, rate: float = 1e-3) -> tuple[float, float]:
    """The Frobenius and the spectral norm of ΔW after one step of Adam from the usual start, where
    only B moves ΔW.
    """
    torch.manual_seed(0)
    adapter, wanted = GraloraAdapter(SIZE, SIZE, case.config), target(0)
    optimizer = torch.optim.Adam([adapter.B], lr=rate)
    (
        functional.delta_weight(adapter.A, adapter.B, scaling=case.config.scaling) - wanted
    ).square().sum().backward()
    optimizer.step()
    delta = adapter.delta_weight().detach()
    return float(delta.norm()), float(torch.linalg.matrix_norm(delta, 2))


def measure(
    ranks: tuple[int, ...], ks: tuple[int, ...], rates: list[float], steps: int
) -> list[dict[str, Any]]:
    result = []
    cases = [
        Case(r, k, rs) for rs, k, r in itertools.product((False, True), ks, ranks) if r % k == 0
    ]
    for case in tqdm(cases, desc="scale"):
        found = [final_losses(case, seed, rates, steps) for seed in SEEDS]
        losses = [sum(each) / len(each) for each in zip(*found, strict=True)]
        frobenius, spectral = first_step(case)
        result.append(
            {**case._asdict(), "best rate": best_rate(rates, losses), "loss": min(losses)}
            | {"first step": frobenius, "its spectral norm": spectral}
        )
    return result


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="two ranks, two k, ten rates, 10 steps").parse_args(argv)
    sizes = ((4, 16), (1, 2), RATES[4:24:2], 10) if args.quick else (RANKS, KS, RATES, STEPS)
    result = measure(*sizes)
    ranks, ks = sizes[:2]
    found = {(row["r"], row["k"], row["use_rslora"]): row for row in result}
    scales = {"alpha / r": False, "alpha / √r": True}
    for what, form in (("best rate", ".2g"), ("first step", ".3g"), ("its spectral norm", ".3g")):
        rows = []
        for (name, rs), k in itertools.product(scales.items(), ks):
            own = [found[r, k, rs][what] if (r, k, rs) in found else None for r in ranks]
            values = [value for value in own if value is not None]
            spread = f"{max(values) / min(values):.1f}"
            rows.append(
                (name, k, *("" if value is None else format(value, form) for value in own), spread)
            )
        print(f"\n{what} (ΔW at a rate of 0.001)" if "rate" not in what else f"\n{what}")
        print(common.table(("scale", "k", *(f"r={r}" for r in ranks), "largest / smallest"), rows))
    figure = common.Figure(figsize=(7, 4))
    axes = figure.subplots()
    for (name, rs), k in itertools.product(scales.items(), ks):
        own = [row for row in result if (row["k"], row["use_rslora"]) == (k, rs)]
        x, y = [row["r"] for row in own], [row["best rate"] for row in own]
        axes.plot(
            x,
            y,
            "--" if rs else "-",
            marker="o",
            markersize=3,
            color=f"C{ks.index(k)}",
            label=f"{name}, k = {k}",
        )
    axes.set_xscale("log", base=2)
    axes.set(
        yscale="log",
        xlabel="rank r",
        ylabel="best learning rate",
        title=f"Adam, {sizes[3]} steps, alpha = {ALPHA}",
    )
    axes.legend(fontsize=8)
    common.write(args.out, "scale", {"cases": result}, figure)


if __name__ == "__main__":
    main()
