"""Every measurement of speed and memory runs, with --quick, and writes what it says."""

import json

import pytest

from .quick import RESULTS, check, names, run


@pytest.mark.parametrize("name", names("speed"))
def test_benchmark_prints_a_table_and_writes_json_and_picture(name, tmp_path, capsys):
    run(f"speed.{name}", tmp_path, "--quick")
    check(name, tmp_path, capsys.readouterr().out)


def test_kernel_counts_are_repeatable_and_those_of_the_committed_run(tmp_path):
    committed = json.loads((RESULTS / "kernels.json").read_text())
    ours = {case: counts["gralora"] for case, counts in committed["counts"].items()}
    again = run("speed.kernels", tmp_path, "--quick")["counts"]
    assert {case: counts["gralora"] for case, counts in again.items()} == ours
    for counts in again.values():
        assert counts["gralora"] < counts["LoRA (PEFT)"] < counts["GraLoRA (PEFT)"]
