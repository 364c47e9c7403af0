"""Every recipe runs with the command that it names, and stands in the README."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .engines import needs

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "benchmarks" / "recipes").glob("*.py"))
PACKAGES = {"quantised": ["bitsandbytes"], "offload": ["accelerate"], "compile_and_export": ["onnx", "onnxscript"]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_as_it_says(path, tmp_path):
    for package in PACKAGES.get(path.stem, []):
        needs(package)
    text = path.read_text()
    assert len(text.splitlines()) <= 25
    program, *options, file = ast.get_docstring(ast.parse(text)).splitlines()[-1].split()
    assert ROOT / file == path
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *module, *options, path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_recipe_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in RECIPES if f"benchmarks/recipes/{path.name}" not in readme]
