"""Memory of merging into a checkpoint on disk: `gralora merge`, against loading the whole
checkpoint and merging there.

python -m benchmarks.speed.merge_on_disk
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import gralora
from benchmarks import common

PER_SHARD = 8

# not ru_maxrss, which a child inherits from its parent
REPORT = (
    "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
)

RUNS = {
    "nothing (imports)": "import gralora.__main__",
    "gralora merge": (
        "import gralora.__main__; gralora.__main__.main(['merge', 'base', 'adapter', 'out',"
        " '--force'])"
    ),
    "all in memory": (
        """
import glob, gralora, torch
from safetensors.torch import load_file, save_file
paths = sorted(glob.glob('base/*.safetensors'))
tensors = {key: t for path in paths for key, t in load_file(path).items()}
layers = [torch.nn.Linear(*t.shape, bias=False, device='meta') for t in tensors.values()]
model = torch.nn.ModuleDict({'l': torch.nn.ModuleList(layers)})
model.load_state_dict(tensors, assign=True)
gralora.merge_and_unload(gralora.load_adapter(model, 'adapter'))
save_file(model.state_dict(), 'out.safetensors')
"""
    ),
}


def checkpoint(folder: Path, layers: int, width: int) -> nn.Module:
    """Square bfloat16 layers, eight to a shard, and the model on the meta device."""
    base = folder / "base"
    base.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(layers // PER_SHARD):
        names = [f"l.{shard * PER_SHARD + i}.weight" for i in range(PER_SHARD)]
        save_file(
            {n: torch.randn(width, width).bfloat16() for n in names}, base / f"{shard}.safetensors"
        )
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    linear = [
        nn.Linear(width, width, bias=False, device="meta", dtype=torch.bfloat16)
        for _ in range(layers)
    ]
    return nn.ModuleDict({"l": nn.ModuleList(linear)})


def adapter(model: nn.Module, path: Path) -> None:
    gralora.inject(
        model, "all-linear", gralora.GraloraConfig(r=16, gralora_k=2, init_weights=False)
    )
    for module in model.modules():
        if isinstance(module, gralora.GraloraLayer):
            module.gralora_adapters.to_empty(device="cpu")
            module.gralora_adapters["default"].reset_parameters()
    gralora.save_adapter(model, path)


def peak(code: str, folder: Path) -> tuple[int, float]:
    """(bytes at the peak, seconds) of a process that runs `code`."""
    root = str(Path(__file__).parents[2])
    start = time.perf_counter()
    command = [sys.executable, "-c", f"{code}\n{REPORT}"]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1]) * 1024, time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="64 MiB").parse_args(argv)
    width, sizes = (512, (128,)) if args.quick else (4096, (16, 32, 64, 128))
    rows, result = [], []
    for layers in tqdm(sizes, desc="merge_on_disk", mininterval=1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            adapter(checkpoint(folder, layers, width), folder / "adapter")
            size = layers * width * width * 2
            row = {
                run: dict(zip(("bytes", "seconds"), peak(code, folder), strict=True))
                for run, code in RUNS.items()
            }
            result.append({"checkpoint": size, "runs": row})
            rows.append([f"{size >> 20}", *(f"{each['bytes'] >> 20}" for each in row.values())])
            rows[-1] += [f"{row[run]['seconds']:.1f}" for run in list(RUNS)[1:]]
    tensor = width * width * 2 / 2**20
    print(f"\nMiB at the peak of the process; the largest tensor has {tensor:.1f} MiB\n")
    print(common.table(("checkpoint, MiB", *RUNS, "gralora merge, s", "all in memory, s"), rows))
    series = {run: [each["runs"][run]["bytes"] / 2**20 for each in result] for run in RUNS}
    labels = [f"{each['checkpoint'] >> 20} MiB" for each in result]
    figure = common.bars("Merging into a checkpoint on disk: peak memory", "MiB", labels, series)
    common.write(args.out, "merge_on_disk", {"width": width, "sizes": result}, figure)


if __name__ == "__main__":
    main()
