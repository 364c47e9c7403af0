"""Every benchmark runs, with --quick, and writes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from benchmarks import _methods as methods
from benchmarks import quality

ROOT = Path(__file__).parents[1]


def run(name, out, *options):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_main_job_learns_reloads_and_merges(tmp_path):
    run("finetune", tmp_path, "--quick")
    result = json.loads((tmp_path / "finetune.json").read_text())
    assert (tmp_path / "finetune.png").stat().st_size > 10_000
    assert result["after"]["mse"] < 0.6 * result["before"]["mse"]
    assert result["after"]["pearson"] > 0.6
    assert result["reload_max_abs_diff"] == 0
    assert 0 < result["merge_max_abs_diff"] < 1e-4
    assert result["adapter_bytes"] < 0.1 * result["model_bytes"]
    assert result["trainable"] < 0.1 * result["total"]
    assert result["seconds"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "layer",
        "kernels",
        "memory",
        "step",
        "merge",
        "inject",
        "save_load",
        "merge_on_disk",
        "mixed_batch",
        "meta",
        "quality",
        "expressivity",
        "entanglement",
        "language_model",
        "vision",
    ],
)
def test_benchmark_prints_a_table_and_writes_json_and_picture(name, tmp_path):
    printed = run(name, tmp_path, "--quick")
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert "| ---" in printed
    assert {"cpu", "threads", "versions"} <= set(result["machine"])
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000


def test_quality_goes_on_where_it_was_interrupted(tmp_path):
    committed = json.loads((ROOT / "benchmarks/results/quality.json").read_text())
    key = "LoRA, r=8, lr=0.001, seed=2"
    lost = committed["runs"].pop(key)
    (tmp_path / "quality.json").write_text(json.dumps(committed))
    run("quality", tmp_path)
    result = json.loads((tmp_path / "quality.json").read_text())
    again = result["runs"].pop(key)
    assert result["runs"] == committed["runs"]
    assert again["trainable"] == lost["trainable"]
    assert again["validation"]["mse"] == pytest.approx(lost["validation"]["mse"], rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_quality_draws_what_it_has(count, tmp_path):
    committed = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["runs"]
    runs = quality.plan(quick=False)
    quality.write(tmp_path, runs, {run.key: committed[run.key] for run in runs[:count]}, quiet=True)
    cases = {(run.name, run.rank) for run in runs[:count]}
    assert len(json.loads((tmp_path / "quality.json").read_text())["chosen"]) == len(cases)


def test_what_the_evidence_compares_trains_equally_many_parameters_and_the_rate_is_chosen_by_the_mean_error():
    names = [methods.LORA, "GraLoRA k=2", "GraLoRA k=4", "GraLoRA k=8", "hybrid k=2"]
    models = (nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(8, 2)) for _ in names)
    prepared = [methods.prepared(model, name, 8, ["0", "1"], "2") for model, name in zip(models, names, strict=True)]
    assert [methods.trained(model) for model in prepared] == [8 * (16 + 32 + 32 + 8) + 18] * len(names)
    runs = [(0.1, {"error": 1.0}), (0.2, {"error": 0.0}), (0.1, {"error": 3.0}), (0.2, {"error": 3.9})]
    [(case, by_rate, best)] = methods.by_case((("a", *run) for run in runs), lambda run: run["error"])
    assert (best, by_rate[best]) == (0.2, [{"error": 0.0}, {"error": 3.9}])
    assert (case, by_rate[0.1]) == ("a", [{"error": 1.0}, {"error": 3.0}])


def test_kernel_counts_are_repeatable_and_those_of_the_committed_run(tmp_path):
    run("kernels", tmp_path, "--quick")
    committed = json.loads((ROOT / "benchmarks/results/kernels.json").read_text())
    ours = {case: counts["gralora"] for case, counts in committed["counts"].items()}
    again = json.loads((tmp_path / "kernels.json").read_text())["counts"]
    assert {case: counts["gralora"] for case, counts in again.items()} == ours
    for counts in again.values():
        assert counts["gralora"] < counts["LoRA (PEFT)"] < counts["GraLoRA (PEFT)"]
