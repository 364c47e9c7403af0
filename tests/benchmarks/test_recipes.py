"""Every recipe runs as the command that it names runs it."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ..needs import needs

ROOT = Path(__file__).parents[2]
RECIPES = [
    # three interpreters each; the tests of `engines/` run the same on processes that they share
    pytest.param(path, marks=pytest.mark.slow if "\ntorchrun " in path.read_text() else ())
    for path in sorted((ROOT / "benchmarks" / "recipes").glob("*.py"))
]
PACKAGES = {
    "quantised": ["bitsandbytes"],
    "offload": ["accelerate"],
    "compile_and_export": ["onnx", "onnxscript"],
}
PACKAGES |= {f"trl_{kind}": ["trl", "datasets"] for kind in ("sft", "dpo", "grpo")}
PACKAGES |= {
    "lightning_module": ["lightning"],
    "sentence_encoder": ["sentence_transformers", "datasets"],
}
PACKAGES |= {"diffusers_training": ["diffusers"]}
PACKAGES["zero3"] = [
    "deepspeed"
]  # which is built against the torch that is there: pip install --no-build-isolation deepspeed
# torch's own fault, open: gloo's thread frees a tensor while the interpreter ends, and aborts
# (pytorch issue 190489). On a busy machine about one run in twenty does, after the recipe's last
# line; one that did so every time would still fail here.
ABORTED, TRIES = "terminate called without an active exception", 4
# DeepSpeed compiles a kernel for collectives of inference, which training never calls, in a minute
WITHOUT_KERNEL = """
import runpy, sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.filterwarnings("default")  # what other packages warn of is not ours
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_as_it_says(path, tmp_path, monkeypatch):
    for package in PACKAGES.get(path.stem, []):
        needs(package)
    text = path.read_text()
    assert len(text.splitlines()) <= 40  # a screen
    program, *options, file = ast.get_docstring(ast.parse(text)).splitlines()[-1].split()
    assert ROOT / file == path
    if program == "python":
        monkeypatch.chdir(tmp_path)
        runpy.run_path(
            str(path), run_name="__main__"
        )  # as the command does, without importing torch anew
        return
    assert program == "torchrun"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    if path.stem == "zero3":
        environment["DS_ACCELERATOR"] = "cpu"
        (tmp_path / "without_kernel.py").write_text(WITHOUT_KERNEL)
        command.append(tmp_path / "without_kernel.py")
    command.append(path)
    for _ in range(TRIES):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        if not (done.returncode and ABORTED in done.stderr):
            break
    assert done.returncode == 0, done.stderr[-3000:]
