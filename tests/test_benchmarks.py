"""Every benchmark runs, with --quick, and writes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(name, out, *options):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_main_job_learns_reloads_and_merges(tmp_path):
    run("finetune", tmp_path)
    result = json.loads((tmp_path / "finetune.json").read_text())
    assert (tmp_path / "finetune.png").stat().st_size > 10_000
    assert result["after"]["mse"] < 0.6 * result["before"]["mse"]
    assert result["after"]["pearson"] > 0.6
    assert result["reload_max_abs_diff"] == 0
    assert 0 < result["merge_max_abs_diff"] < 1e-4
    assert result["adapter_bytes"] < 0.1 * result["model_bytes"]
    assert result["trainable"] < 0.1 * result["total"]
    assert result["seconds"] > 0
