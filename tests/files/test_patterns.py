"""Patterns of PEFT's; what they do to a folder is in `test_peft`, what strangers put in them in
`test_hostile`.
"""

from pathlib import Path

import pytest

import gralora
from gralora.files.patterns import pattern


def test_the_first_that_matches_counts_whole_names_and_ends():
    value = pattern(Path("x"), {r"^a\.b": 1, "b": 2, r"layers\.\d+\.q": 3}, 9)
    assert [value(name) for name in ("a.b", "c.b", "m.layers.3.q", "q")] == [1, 2, 3, 9]
    assert pattern(Path("x"), None, 9)("a") == 9


@pytest.mark.parametrize(
    "patterns", [[1], {"(a+)+b": 1}, {"a" * 600: 1, "b(": 2}, {f"{i}.*x": 1 for i in range(40)}]
)
def test_what_cannot_be_trusted_is_refused_and_the_field_named(patterns):
    with pytest.raises(gralora.AdapterFileError, match="rank_pattern"):
        pattern(Path("x"), patterns, 1, "rank_pattern")
