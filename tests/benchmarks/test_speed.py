"""Every measurement of speed and memory runs, with --quick, and writes what it says."""

import json

import pytest

from benchmarks.speed import chat_model

from .quick import RESULTS, SMOLLM2, check, names, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=SMOLLM2 if name == "chat_model" else ()) for name in names("speed")],
)
def test_benchmark_prints_a_table_and_writes_json_and_picture(name, tmp_path, capsys):
    run(f"speed.{name}", tmp_path, "--quick")
    check(f"speed.{name}", tmp_path, capsys.readouterr().out)


def test_kernel_counts_are_repeatable_and_those_of_the_committed_run(tmp_path):
    committed = json.loads((RESULTS / "kernels.json").read_text())
    ours = {case: counts["gralora"] for case, counts in committed["counts"].items()}
    again = run("speed.kernels", tmp_path, "--quick")["counts"]
    assert {case: counts["gralora"] for case, counts in again.items()} == ours
    for counts in again.values():
        assert counts["gralora"] < counts["LoRA (PEFT)"] < counts["GraLoRA (PEFT)"]


def test_the_chat_model_goes_on_where_it_was_interrupted_unless_it_was_elsewhere(tmp_path):
    case = chat_model.Case("prefill", "1 x 512", 32, 2, "float32")
    done = {case: {**case._asdict(), "over GraLoRA (PEFT)": 0.5, "over LoRA (PEFT)": 0.5}}
    chat_model.write(tmp_path, done, False, quiet=True)
    assert chat_model.there(tmp_path, False) == done
    assert chat_model.there(tmp_path, True) == chat_model.there(tmp_path / "none", False) == {}
    written = json.loads((tmp_path / "speed_chat_model.json").read_text())
    written["machine"]["cpu"] = "another"
    (tmp_path / "speed_chat_model.json").write_text(json.dumps(written))
    assert chat_model.there(tmp_path, False) == {}
