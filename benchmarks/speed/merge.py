"""Merging an adapter into the weight (ΔW, and the sum), against PEFT, and against the least that it
can be: a clone of the weight (which exact unmerging needs) followed by one product for each block.
The finite check is on.

python -m benchmarks.speed.merge
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

import gralora
from benchmarks import common
from benchmarks.speed._variants import OURS, PEFT_GRALORA, build

SIZES = ((1024, 1024), (768, 3072), (3072, 768), (4096, 4096))
LEAST = "clone, a product a block"


@torch.no_grad()
def least(layer: gralora.GraloraLayer) -> Callable[[], Tensor]:
    adapter = layer.gralora_adapters["default"]
    weight, A, B, scaling = layer.weight, adapter.A, adapter.B, adapter.config.scaling
    k, m, r = A.shape
    s, o = r // k, B.shape[2]

    @torch.no_grad()
    def run() -> Tensor:
        new = weight.clone()
        for j in range(k):
            for i in range(k):
                block, up = new[j * o : (j + 1) * o, i * m : (i + 1) * m], B[j][i * s : (i + 1) * s]
                block.addmm_(up.t(), A[i][:, j * s : (j + 1) * s].t(), alpha=scaling)
        return new

    return run


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="small sizes").parse_args(argv)
    sizes = ((256, 256), (256, 512)) if args.quick else SIZES
    results = []
    for n_in, n_out in tqdm(sizes, desc="merge", mininterval=1):
        for r, k in ((32, 2), (64, 4), (128, 8)):
            models = build(
                nn.Sequential(nn.Linear(n_in, n_out)), ["0"], r, k, names=(OURS, PEFT_GRALORA)
            )
            theirs = models[PEFT_GRALORA][0]
            times: dict[str, list[float]] = {OURS: [], PEFT_GRALORA: [], LEAST: []}
            floor = least(models[OURS][0])
            for _ in range(11):
                times[LEAST].append(common.timed(floor)[0])
                times[OURS].append(common.timed(gralora.merge, models[OURS])[0])
                gralora.unmerge(models[OURS])
                with torch.no_grad():
                    times[PEFT_GRALORA].append(common.timed(theirs.merge)[0])
                    theirs.unmerge()
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratio = common.ratio(times, OURS, PEFT_GRALORA)
            over = common.ratio(times, OURS, LEAST)
            results.append(
                {
                    "in": n_in,
                    "out": n_out,
                    "r": r,
                    "k": k,
                    "seconds": medians,
                    "ratio": ratio,
                    "over_least": over,
                }
            )
    labels = [f"{v['in']}x{v['out']}, r={v['r']}, k={v['k']}" for v in results]
    rows = [
        (
            label,
            *(f"{s * 1e3:.2f}" for s in v["seconds"].values()),
            f"{v['ratio']:.3f}",
            f"{v['over_least']:.2f}",
        )
        for label, v in zip(labels, results, strict=True)
    ]
    print(
        common.table(
            ("", *(f"{name}, ms" for name in times), "over PEFT's", "over the least"), rows
        )
    )
    summary = statistics.median(v["ratio"] for v in results)
    print(f"\nmedian ratio {summary:.3f}")
    figure = common.bars(
        "Time to merge, over PEFT's", "ratio", labels, {OURS: [v["ratio"] for v in results]}
    )
    common.write(args.out, "merge", {"median_ratio": summary, "rows": results}, figure)


if __name__ == "__main__":
    main()
