"""What a test needs: engines, which a machine may lack, and time, which the gate has."""

from types import ModuleType

import pytest


def needs(package: str) -> ModuleType:
    """The package, or a skip that says what to install; under CI a skip is a failure
    (`conftest.py`).
    """
    return pytest.importorskip(
        package, reason=f"{package} is missing: pip install '.[dev]'", exc_type=ImportError
    )


def parts(count: int) -> list[object]:
    """The parts of a long search, as parameters of a test: all but the first are slow."""
    return [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, count))]
