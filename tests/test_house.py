"""The house is what the design says: five folders, one above the other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "gralora"
FOLDERS = ["maths", "engines", "layers", "model", "files", "integrations"]  # from the ground up
ANYONE = {"gralora.config", "gralora.torch_internals", "gralora.version"}
DEPENDENCIES = {"gralora", "torch", "einops", "safetensors"}

TREES = {
    ".".join(("gralora", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
}
MODULES = [name for name in TREES if name.count(".") == 2]


def folder(module: str) -> str:
    return module.split(".")[1] if module.count(".") == 2 else ""


def imports(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(module, name in it, name here) of everything that is imported, at the top or within a
    function.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (
                (node.module or "", alias.name, alias.asname or alias.name) for alias in node.names
            )


def library_imports(module: str) -> Iterator[tuple[str, str, str]]:
    """(module of the library, name in it or "", name here)."""
    for source, name, here in imports(TREES[module]):
        if source.split(".")[0] == "gralora":
            inner = f"{source}.{name}"
            yield (inner, "", here) if inner in TREES else (source, name, here)


def test_every_file_is_in_one_of_the_folders_or_beside_them():
    beside = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert beside == {
        *("__init__.py", "__main__.py", "config.py", "py.typed", "torch_internals.py"),
        "version.py",
    }
    assert {
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"
    } == set(FOLDERS)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_from_its_own_folder_and_from_those_below(module):
    allowed = FOLDERS[: FOLDERS.index(folder(module)) + 1]
    wrong = [
        s for s, _, _ in library_imports(module) if s not in ANYONE and folder(s) not in allowed
    ]
    assert not wrong


def test_there_are_no_circles():
    TopologicalSorter(
        {module: {s for s, _, _ in library_imports(module)} for module in TREES}
    ).prepare()


@pytest.mark.parametrize("module", TREES)
def test_no_private_name_is_used_across_folders(module):
    strangers = {
        here: s
        for s, name, here in library_imports(module)
        if not name and folder(s) != folder(module)
    }
    wrong = [
        f"{s}.{n}"
        for s, n, _ in library_imports(module)
        if n.startswith("_") and folder(s) != folder(module)
    ]
    for node in ast.walk(TREES[module]):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.attr.startswith("_")
        ):
            if node.value.id in strangers:
                wrong.append(f"{strangers[node.value.id]}.{node.attr}")
    assert [each for each in wrong if not each.endswith(".__version__")] == []


def test_the_top_level_holds_what_the_design_names():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT.parent, capture_output=True, text=True, check=False
    ).stdout
    top = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    assert top <= {"LICENSE", "README.md", "benchmarks", "gralora", "pyproject.toml", "tests"}


@pytest.mark.parametrize("module", TREES)
def test_nothing_but_the_declared_packages_is_imported_at_the_top(module):
    top = [n for n in TREES[module].body if isinstance(n, (ast.Import, ast.ImportFrom))]
    found = {source.split(".")[0] for node in top for source, _, _ in imports(node)}
    assert not found - DEPENDENCIES - sys.stdlib_module_names


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_says_in_one_docstring_what_lives_there(name):
    tree = TREES[f"gralora.{name}"]
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


def test_this_test_can_fail():
    TREES["gralora.maths.wrong"] = ast.parse(
        "from gralora.files.own import _hash\nfrom gralora.model import state\nstate._x"
    )
    try:
        for test in (
            test_a_file_imports_from_its_own_folder_and_from_those_below,
            test_no_private_name_is_used_across_folders,
        ):
            with pytest.raises(AssertionError):
                test("gralora.maths.wrong")
        TREES["gralora.model.saved"].body.insert(
            0, ast.parse("import gralora.model.inject").body[0]
        )
        with pytest.raises(ValueError, match=r"gralora\.model\.inject"):
            test_there_are_no_circles()
    finally:
        del TREES["gralora.maths.wrong"]
        del TREES["gralora.model.saved"].body[0]
