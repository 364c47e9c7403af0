"""What every benchmark shares: its command line, the machine it ran on, its table, JSON and
picture.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib as mpl
import torch
from tqdm import tqdm

mpl.use("agg")
from matplotlib.figure import Figure

Case = TypeVar("Case")
Result = TypeVar("Result")
Placed = TypeVar("Placed", bound=Any)

VERSIONED = ("gralora", "torch", "peft", "transformers", "loralib", "numpy")


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """A command line with `--out`, `--quick` and `--device`; the module's docstring is its help."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/out"),
        help="folder for the JSON and the picture",
    )
    result.add_argument("--quick", action="store_true", help=quick)
    result.add_argument(
        "--device", default="cpu", type=_default_device, help="cpu, or an accelerator such as cuda"
    )
    return result


def _default_device(name: str) -> str:
    """What is made from now on is made there."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    legal = ["cpu", *([] if there is None else [there.type])]
    if name.partition(":")[0] not in legal:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not on this machine, which has {' and '.join(legal)}"
        )
    if name != "cpu":  # where it is so by itself, and setting it costs every tensor that is made
        torch.set_default_device(name)
    return name


def placed(there: Placed) -> Placed:
    """What a tokenizer, a file or a generator of the CPU has made, on the default device."""
    return there.to(torch.get_default_device())


def synchronize() -> None:
    """Wait till all that was asked of the default device is done; a CPU is never behind."""
    if torch.get_default_device().type != "cpu":
        torch.accelerator.synchronize()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu, device = platform.processor() or platform.machine(), torch.get_default_device()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe(info: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    device = "" if info["device"] == "cpu" else f"{info['device']}; "
    return (
        f"{device}{info['cpu']}, {info['cores']} cores, {info['threads']} threads; Python"
        f" {info['python']}, {versions}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its columns aligned."""
    texts = [list(head), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in texts
    ]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(lines)


def write(
    out: Path, name: str, result: dict[str, Any], figure: Figure, *, quiet: bool = False
) -> None:
    """`NAME.json` and `NAME.png` into `out`; the JSON whole at any moment, so that a long run can
    be interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    result = {**result, "machine": machine()}
    half = out / f".{name}.json"
    half.write_text(json.dumps(result, indent=1) + "\n")
    half.replace(out / f"{name}.json")
    figure.savefig(out / f"{name}.png", dpi=110, bbox_inches="tight")
    if quiet:
        return
    print(f"\n{describe(result['machine'])}\nwrote {out / name}.json and {out / name}.png")


def written(out: Path, name: str) -> dict[str, Any]:
    """What an earlier call has written into `NAME.json` of `out`; empty where there is none."""
    file = out / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def each(
    function: Callable[[Case], Result], cases: Sequence[Case], name: str, *, here: bool
) -> Iterator[tuple[Case, Result]]:
    """(case, function(case)) as they end: in this process, or in one for every core, with one
    thread each.

    Runs of small models are faster side by side than one after the other with all threads; an
    accelerator is shared by none.
    """
    if here or len(cases) < 2 or torch.get_default_device().type != "cpu":
        yield from ((case, function(case)) for case in tqdm(cases, desc=name, mininterval=1))
        return
    os.environ["TQDM_DISABLE"] = "1"  # the bars of those processes
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        futures = {pool.submit(function, case): case for case in cases}
        for future in tqdm(as_completed(futures), total=len(futures), desc=name, mininterval=1):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def timed(function: Callable[..., Result], *args: Any) -> tuple[float, Result]:
    """(seconds, result), the default device's work included."""
    synchronize()
    start = time.perf_counter()
    result = function(*args)
    synchronize()
    return time.perf_counter() - start, result


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of each variant, one after the other in every round, so that noise falls on
    all alike.

    On an accelerator what is timed is what it has done, not what it was asked.
    """
    for run in variants.values():
        for _ in range(1 if torch.get_default_device().type == "cpu" else 3):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            synchronize()
            times[name].append((time.perf_counter() - start) / repeats)
    return times


def above(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the time of `name` above that of `base` in the same round."""
    return statistics.median(a - b for a, b in zip(times[name], times[base], strict=True))


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the time of `name` over that of `base` in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def bars(
    title: str, unit: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]
) -> Figure:
    """Groups of bars, one colour per series."""
    figure = Figure(figsize=(max(7.0, 0.8 * len(groups)), 4))
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        axes.bar(
            [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))],
            values,
            width,
            label=name,
        )
    axes.set_xticks(range(len(groups)), groups, rotation=30 if len(groups) > 4 else 0, fontsize=8)
    axes.set(title=title, ylabel=unit)
    axes.legend(fontsize=8)
    return figure


def _text(cell: object) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
