"""Every experiment runs, with --quick, and writes what it says; one that was interrupted goes
on.
"""

import json

import pytest
from torch import nn

from benchmarks.evidence import _methods as methods
from benchmarks.evidence import confirmation, quality, vision
from benchmarks.evidence.chat_model import Run

from .quick import RESULTS, SMOLLM2, check, names, run

EXPERIMENTS = [
    pytest.param(name, marks=SMOLLM2 if name in ("chat_model", "confirmation", "formats") else ())
    for name in names("evidence")
    if name != "quality"
]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_prints_a_table_and_writes_json_and_picture(name, tmp_path, capsys):
    run(f"evidence.{name}", tmp_path, "--quick")
    check(name, tmp_path, capsys.readouterr().out)


@pytest.mark.slow
def test_quality_goes_on_where_it_was_interrupted(tmp_path, capsys):
    first = run("evidence.quality", tmp_path, "--quick")
    key = next(key for key in first["runs"] if key.startswith("LoRA"))
    lost = first["runs"].pop(key)
    (tmp_path / "quality.json").write_text(json.dumps(first))
    result = run("evidence.quality", tmp_path, "--quick")
    again = result["runs"].pop(key)
    assert (
        result["runs"] == first["runs"]
    )  # the seconds that they took too: they were not run again
    assert again["trainable"] == lost["trainable"]
    assert again["validation"]["mse"] == pytest.approx(lost["validation"]["mse"], rel=1e-3)
    assert again["seconds"] != lost["seconds"]
    check("evidence.quality", tmp_path, capsys.readouterr().out)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_quality_draws_what_it_has(count, tmp_path):
    committed = json.loads((RESULTS / "quality.json").read_text())["runs"]
    runs = quality.plan(quick=False)
    quality.write(tmp_path, runs, {run.key: committed[run.key] for run in runs[:count]}, quiet=True)
    cases = {(run.name, run.rank) for run in runs[:count]}
    assert len(json.loads((tmp_path / "quality.json").read_text())["chosen"]) == len(cases)


def test_vision_goes_on_where_it_was_interrupted_unless_it_was_for_other_epochs(tmp_path):
    accuracy = {"accuracy": 0.5, "loss": 1.0}
    result = {"validation": accuracy, "new": accuracy, "old": accuracy, "trainable": 3}
    done = {vision.Run("8 and 9", name, 1e-3, 0): result for name in (methods.LORA, "GraLoRA k=2")}
    vision.write(tmp_path, done, (2, 2), quiet=True)
    assert vision.there(tmp_path, (2, 2)) == done
    assert vision.there(tmp_path, (60, 20)) == vision.there(tmp_path / "none", (2, 2)) == {}


def test_compared_methods_have_equal_parameters_and_the_rate_is_chosen_by_mean_error():
    names = [methods.LORA, "GraLoRA k=2", "GraLoRA k=4", "GraLoRA k=8", "hybrid k=2"]
    models = (nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(8, 2)) for _ in names)
    prepared = [
        methods.prepared(model, name, 8, ["0", "1"], "2")
        for model, name in zip(models, names, strict=True)
    ]
    assert [methods.trained(model) for model in prepared] == [8 * (16 + 32 + 32 + 8) + 18] * len(
        names
    )
    runs = [
        (0.1, {"error": 1.0}),
        (0.2, {"error": 0.0}),
        (0.1, {"error": 3.0}),
        (0.2, {"error": 3.9}),
    ]
    [(case, by_rate, best)] = methods.by_case(
        (("a", *run) for run in runs), lambda run: run["error"]
    )
    assert (best, by_rate[best]) == (0.2, [{"error": 0.0}, {"error": 3.9}])
    assert (case, by_rate[0.1]) == ("a", [{"error": 1.0}, {"error": 3.0}])


def test_what_is_confirmed_is_judged_by_the_rule_once_all_seeds_have_been_run(tmp_path):
    assert methods.verdict([0.02, 0.01, 0.03, 0.02, 0.01, -0.01], 5) == "better"
    assert methods.verdict([-0.02, -0.01, -0.03, -0.02, -0.01, 0.01], 5) == "worse"
    assert methods.verdict([0.02, -0.01, 0.03, 0.02, 0.01, -0.01], 5) == "alike"  # four of six
    assert methods.verdict([0.2, 0.001, 0.001, 0.001, 0.001, 0.001], 5) == "alike"  # one seed alone

    def result(run: Run, right: float) -> dict[str, object]:
        return {**run._asdict(), "test": {"right": right, "loss": 0.3}, "old task": 4.0}

    cases = {("LoRA", 16, 2e-3): 0.8, ("LoRA, rs", 16, 1e-3): 0.9}
    done = {
        (run := Run(*case, seed)): result(run, right)
        for case, right in cases.items()
        for seed in (3, 4)
    }
    lora, other = confirmation.write(tmp_path, done, quiet=True)
    assert (lora["seeds"], other["verdict"], "differences" in lora) == (2, "", False)
    assert other["differences"] == pytest.approx([0.1, 0.1])
    assert confirmation.there(tmp_path, 40) == done and confirmation.there(tmp_path, 2) == {}
    done |= {
        (run := Run(*case, seed)): result(run, right)
        for case, right in cases.items()
        for seed in (5, 6, 7, 8)
    }
    assert [row.get("verdict") for row in confirmation.summary(done)] == [None, "better"]
