"""The README's examples run word for word, and what it says of commands is what is there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.sub(r"\W+", " ", block.splitlines()[-1])[:40].strip())
def test_example_runs_word_for_word(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_every_public_name_stands_in_the_readme():
    import gralora

    absent = [name for name in gralora.__all__ if name != "__version__" and f"`{name}" not in README]
    assert not absent


def test_every_benchmark_has_its_command_in_the_readme():
    names = [path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("[!_]*.py")]
    absent = [name for name in names if name != "common" and f"benchmarks.{name}" not in README]
    assert not absent
