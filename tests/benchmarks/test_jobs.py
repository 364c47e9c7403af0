"""The main jobs run, with --quick, and do what they say."""

import subprocess
import sys

from .quick import ROOT, check, run


def test_the_encoder_learns_reloads_and_merges(tmp_path, capsys):
    run("jobs.encoder", tmp_path, "--quick")
    result = check("jobs.encoder", tmp_path, capsys.readouterr().out)
    assert result["after"]["mse"] < 0.6 * result["before"]["mse"]
    assert result["after"]["pearson"] > 0.6
    assert result["reload_max_abs_diff"] == 0
    assert 0 < result["merge_max_abs_diff"] < 1e-4
    assert result["adapter_bytes"] < 0.1 * result["model_bytes"]
    assert result["trainable"] < 0.1 * result["total"]
    assert result["seconds"] > 0


def test_a_benchmark_is_a_command():
    command = [sys.executable, "-m", "benchmarks.jobs.encoder", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m benchmarks.jobs.encoder" in done.stdout
