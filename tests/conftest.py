import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from .processes import Processes

settings.register_profile("gralora", deadline=None, print_blob=True, max_examples=60)
settings.load_profile("gralora")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two processes joined by gloo, for `processes.run(function, ...)`."""
    group = Processes()
    yield group
    group.stop()
