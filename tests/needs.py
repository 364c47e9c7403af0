"""Engines that a test needs and a machine may lack."""

from types import ModuleType

import pytest


def needs(package: str) -> ModuleType:
    """The package, or a skip that says what to install; under CI a skip is a failure
    (`conftest.py`).
    """
    return pytest.importorskip(
        package, reason=f"{package} is missing: pip install '.[dev]'", exc_type=ImportError
    )
