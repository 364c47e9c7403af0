"""Injecting into 1,000 layers of 64 x 64, and taking the adapter out again, against PEFT.

python -m benchmarks.inject
"""

from __future__ import annotations

import statistics
import time

import peft
from torch import nn
from tqdm import tqdm

import gralora
from benchmarks import common


def main() -> None:
    args = common.parser(__doc__, quick="100 layers").parse_args()
    count = 100 if args.quick else 1000
    times: dict[str, list[float]] = {"gralora": [], "PEFT": [], "unload (gralora)": [], "unload (PEFT)": []}
    for _ in tqdm(range(5), desc="inject", mininterval=1):
        ours, theirs = (nn.Sequential(*(nn.Linear(64, 64) for _ in range(count))) for _ in range(2))
        start = time.perf_counter()
        gralora.inject(ours, r"\d+", gralora.GraloraConfig(r=8, gralora_k=2))
        times["gralora"].append(time.perf_counter() - start)
        start = time.perf_counter()
        wrapped = peft.get_peft_model(theirs, peft.GraloraConfig(r=8, gralora_k=2, target_modules=r"\d+"))
        times["PEFT"].append(time.perf_counter() - start)
        start = time.perf_counter()
        gralora.unload(ours)
        times["unload (gralora)"].append(time.perf_counter() - start)
        start = time.perf_counter()
        wrapped.unload()
        times["unload (PEFT)"].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = common.ratio(times, "gralora", "PEFT")
    print(common.table(("", "ms"), [(name, f"{value * 1e3:.0f}") for name, value in medians.items()]))
    print(f"\ninject {count} layers: {ratio:.3f} of PEFT's time")
    figure = common.bars(f"{count} layers", "ms", list(medians), {"median": [v * 1e3 for v in medians.values()]})
    common.write(args.out, "inject", {"layers": count, "seconds": medians, "ratio": ratio}, figure)


if __name__ == "__main__":
    main()
