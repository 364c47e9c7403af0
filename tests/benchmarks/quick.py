"""A benchmark run in this process with --quick, as its command runs it."""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILES = {"speed.chat_model": "speed_chat_model"}  # where it is not the module's own name


# the tests that load SmolLM2, in one process that loads it once
SMOLLM2 = (pytest.mark.slow, pytest.mark.xdist_group("SmolLM2"))


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "benchmarks" / folder).glob("[!_]*.py"))


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    """Run `benchmarks.NAME`; what it wrote."""
    with warnings.catch_warnings():
        for category in (
            DeprecationWarning,
            FutureWarning,
        ):  # of packages that are imported only there
            warnings.simplefilter("ignore", category)
        importlib.import_module(f"benchmarks.{name}").main(["--out", str(out), *options])
    written: dict[str, Any] = json.loads((out / f"{file(name)}.json").read_text())
    return written


def file(name: str) -> str:
    """What `benchmarks.NAME` calls its JSON and its picture."""
    return FILES.get(name, name.rpartition(".")[2])


def check(name: str, out: Path, printed: str) -> dict[str, Any]:
    """What every benchmark leaves: a table, a picture, and JSON that says on what it was
    measured.
    """
    own = file(name)
    result: dict[str, Any] = json.loads((out / f"{own}.json").read_text())
    assert "| ---" in printed
    assert {"cpu", "threads", "versions"} <= set(result["machine"])
    assert (out / f"{own}.png").stat().st_size > 5_000
    return result
