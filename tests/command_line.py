"""The command line in this process, and as a process of its own."""

import subprocess
import sys
from typing import Any

from gralora.__main__ import main


def run(*args: object) -> int:
    """Its exit code."""
    return main([str(arg) for arg in args])


def command(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gralora", *map(str, args)], capture_output=True, text=True, **kwargs
    )
