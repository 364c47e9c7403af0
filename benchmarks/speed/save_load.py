"""Saving an adapter and loading it into a fresh model, against PEFT. Ours is written atomically and
synced to disk.

python -m benchmarks.speed.save_load
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path

import peft
from torch import nn
from tqdm import tqdm

import gralora
from benchmarks import common
from benchmarks.speed._variants import OURS, PEFT_GRALORA

TARGETS = [str(i) for i in range(48)]


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="narrow layers").parse_args(argv)
    width = 64 if args.quick else 768
    base = nn.Sequential(*(nn.Linear(width, width) for _ in TARGETS))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.GraloraConfig(r=32, gralora_k=2, target_modules=TARGETS)
    )
    ours = gralora.inject(copy.deepcopy(base), TARGETS, gralora.GraloraConfig(r=32, gralora_k=2))
    names = [f"{what} ({who})" for what in ("save", "load") for who in (OURS, PEFT_GRALORA)]
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        file, directory = Path(folder) / "adapter.safetensors", Path(folder) / "peft"
        for _ in tqdm(range(5), desc="save_load", mininterval=1):
            fresh, other = copy.deepcopy(base), copy.deepcopy(base)
            runs = (
                lambda: gralora.save_adapter(ours, file),
                lambda: theirs.save_pretrained(directory),
                lambda m=fresh: gralora.load_adapter(m, file),
                lambda m=other: peft.PeftModel.from_pretrained(m, directory),
            )
            for name, run in zip(names, runs, strict=True):
                times[name].append(common.timed(run)[0])
        size = file.stat().st_size
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        common.table(("", "ms"), [(name, f"{value * 1e3:.1f}") for name, value in medians.items()])
    )
    figure = common.bars(
        f"48 layers of {width}", "ms", names, {"median": [v * 1e3 for v in medians.values()]}
    )
    common.write(args.out, "save_load", {"seconds": medians, "bytes": size}, figure)


if __name__ == "__main__":
    main()
