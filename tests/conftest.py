import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

import gralora

from .models import Block, random_config
from .processes import Processes

settings.register_profile("gralora", deadline=None, print_blob=True, max_examples=60)
settings.load_profile("gralora")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def _no_skip(report: Any) -> Any:
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        report.outcome, report.longrepr = (
            "failed",
            f"under CI nothing may be skipped: {report.longrepr}",
        )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A skip under CI is a failure: there, every optional package is installed."""
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """The same of a whole file."""
    return _no_skip((yield))


def pytest_configure(config: pytest.Config) -> None:
    """Every test has the seed that `_seed` gives it: with DeepSpeed installed, pytest-randomly
    would give torch another.
    """
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps all tests on `processes` in one worker of xdist, so that they are started once; and
    counts no coverage of slow tests: the others reach the limit, and counting costs half as much
    time as the test.
    """
    for item in items:
        if "processes" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("processes"))
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.no_cover)


def pytest_collection_finish() -> None:
    """Collects garbage less often: a full collection visits every object of PyTorch, transformers
    and their compilers, and took up to a third of a test's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forgetful_compiler() -> Iterator[None]:
    """What one test has compiled counts not against the next one's limit: models of all tests share
    the code of `Sequential`.
    """
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two processes joined by gloo, for `processes.run(function, ...)`."""
    group = Processes()
    yield group
    group.stop(kill=False)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model with an adapter whose layers differ, and the file that it is saved in."""
    model = gralora.inject(
        Block(), {"q": random_config(), "v": random_config(r=8, gralora_k=4, hybrid_r=2, alpha=3)}
    )
    gralora.save_adapter(model, tmp_path / "a")
    return model, tmp_path / "a"
