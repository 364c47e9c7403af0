"""PEFT's patterns: which value a layer has, by regular expressions of a stranger's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gralora.files.own import AdapterFileError

REGEXES = 32
DEEPEST = 200  # dots in a name


def pattern(
    path: Path, patterns: Any, default: Any, field: str = "alpha_pattern"
) -> Callable[[str], Any]:
    """What a pattern of PEFT's says of a layer: the first that matches the name, or its end after a
    dot.
    """
    patterns = patterns or {}
    if not isinstance(patterns, dict):
        raise AdapterFileError(f"{path}: {field} is no JSON object.")
    # plain names, with "^" before those that must be the whole name, and regular expressions
    plain: dict[str, tuple[int, Any]] = {}
    regexes: list[tuple[re.Pattern[str], bool, tuple[int, Any]]] = []
    for position, (text, value) in enumerate(patterns.items()):
        bare = re.sub(r"\\([.\-])", r"\1", text).removesuffix("$")
        if re.fullmatch(r"\^?[\w.\-]+", bare):
            plain.setdefault(bare, (position, value))
        else:
            regexes.append((trusted(path, text, field), text.startswith("^"), (position, value)))
    if len(regexes) > REGEXES:
        raise AdapterFileError(
            f"{path}: {field} holds {len(regexes)} regular expressions; up to {REGEXES} are read."
        )

    def value_of(name: str) -> Any:
        parts = name.split(".")
        if len(parts) > DEEPEST:
            raise AdapterFileError(
                f"{path}: {name[:80]!r}... is nested too deep for a name of a module."
            )
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        found = [plain[each] for each in (f"^{name}", *ends) if each in plain]
        for regex, whole, rule in regexes:
            if any(regex.fullmatch(end) for end in (ends[:1] if whole else ends)):
                found.append(rule)
        return min(found, key=lambda rule: rule[0])[1] if found else default

    return value_of


def trusted(path: Path, text: str, field: str) -> re.Pattern[str]:
    """A stranger's regular expression, refused if it could take for ever."""
    if len(text) > 500 or re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > 2:
        raise AdapterFileError(
            f"{path}: {field} holds {text[:80]!r}, too complex an expression to be trusted."
        )
    try:
        return re.compile(text.removeprefix("^").removesuffix("$"))
    except re.error as error:
        raise AdapterFileError(f"{path}: {field} holds an illegal expression: {error}.") from error
