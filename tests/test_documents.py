"""The examples of the documents run word for word, their links lead somewhere, and what they say of
commands is what is there.
"""

import re
from pathlib import Path

import pytest

import gralora

ROOT = Path(__file__).parents[1]
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "benchmarks/README.md")
}
BLOCKS = [
    (name, block)
    for name, text in TEXTS.items()
    for block in re.findall(r"```python\n(.*?)```", text, re.S)
]


def title(block: tuple[str, str]) -> str:
    return re.sub(r"\W+", " ", block[1].splitlines()[-1])[:40].strip()


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.filterwarnings("ignore:adapter.safetensors was trained on another base")
@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_example_runs_word_for_word(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block[1], block[0], "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", TEXTS)
def test_every_relative_link_leads_somewhere(name):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            broken.append(link)
    assert not broken


def test_every_file_that_is_named_exists():
    for name, text in TEXTS.items():
        named = re.findall(r"`((?:gralora|tests|benchmarks)/[\w/]+(?:\.\w+)?/?)`", text)
        assert not [
            path for path in named if not (ROOT / path).exists() and path != "benchmarks/out"
        ], name


def test_the_readme_is_read_to_the_end():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 300
    assert not [
        block for name, block in BLOCKS if name == "README.md" and len(block.splitlines()) > 15
    ]


def test_every_public_name_stands_in_the_readme():
    absent = [
        name
        for name in gralora.__all__
        if name != "__version__" and f"`{name}" not in TEXTS["README.md"]
    ]
    assert not absent


def test_every_benchmark_has_its_command_in_the_documents():
    folders = [ROOT / "benchmarks" / name for name in ("jobs", "evidence", "speed")]
    names = [
        f"benchmarks.{path.parent.name}.{path.stem}"
        for folder in folders
        for path in folder.glob("[!_]*.py")
    ]
    assert len(names) > 10
    assert not [name for name in names if f"python -m {name}" not in TEXTS["benchmarks/README.md"]]
    commands = re.findall(r"python -m (benchmarks[\w.]*)", "".join(TEXTS.values()))
    assert not set(commands) - set(names)


def test_every_recipe_stands_in_the_readme():
    names = [path.name for path in (ROOT / "benchmarks" / "recipes").glob("*.py")]
    assert not [name for name in names if f"{name}`" not in TEXTS["README.md"]]
