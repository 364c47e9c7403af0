"""Tokens that are trained whole, in files: some rows of an embedding, and which they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gralora.files.own import AdapterFile, AdapterFileError
from gralora.layers.class_change import join
from gralora.model.tokens import INDICES, ROWS

PEFT_ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's key behind the embedding's name (0.21.2, `TrainableTokensWrapper`); the values are whole
rows there, too.
"""


def token_modules(file: AdapterFile) -> dict[str, tuple[int, ...]]:
    """The embeddings of which `file` holds rows, with their tokens.

    Raises:
        AdapterFileError: the rows and their indices do not belong together.
    """
    found = {}
    for name in file.modules_to_save:
        indices = file.tensors.get(join(name, INDICES))
        if indices is not None:
            found[name] = _checked(name, indices, file.tensors.get(join(name, ROWS)))
    return found


def _checked(name: str, indices: Tensor, rows: Tensor | None) -> tuple[int, ...]:
    given = tuple(indices.tolist()) if indices.dtype is torch.int64 and indices.dim() == 1 else ()
    legal = len(set(given)) == len(given) > 0 and min(given) >= 0
    if (
        not legal
        or rows is None
        or rows.dim() != 2
        or len(rows) != len(given)
        or not rows.is_floating_point()
    ):
        raise AdapterFileError(
            f"the file holds tokens of {name!r}, but no row for each of them, or one of them twice."
        )
    return given


def for_peft(file: AdapterFile) -> tuple[AdapterFile, dict[str, list[int]]]:
    """The file with its token rows under PEFT's keys, and what PEFT's config says of them."""
    found = token_modules(file)
    tensors = dict(file.tensors)
    for name in found:
        del tensors[join(name, INDICES)]
        tensors[join(name, PEFT_ROWS)] = tensors.pop(join(name, ROWS))
    saved = [name for name in file.modules_to_save if name not in found]
    return dataclasses.replace(file, tensors=tensors, modules_to_save=saved), {
        n: list(t) for n, t in found.items()
    }


def from_peft(file: AdapterFile, config: Mapping[str, Any]) -> list[str]:
    """Rename PEFT's token rows, in place; returns the names of their embeddings.

    Raises:
        AdapterFileError: the config does not say which tokens the rows are of.
    """
    said = config.get("trainable_token_indices")
    if said and not any(key.endswith(PEFT_ROWS) for key in file.tensors):
        raise AdapterFileError(
            "trainable_token_indices names tokens, but the folder holds no rows of them."
        )
    names = [
        key.removesuffix(PEFT_ROWS).removesuffix(".")
        for key in file.tensors
        if key.endswith(PEFT_ROWS)
    ]
    for name in names:
        own = said
        if isinstance(said, dict):
            own = next(
                (value for key, value in said.items() if f".{name}".endswith(f".{key}")), None
            )
        if not isinstance(own, list) or not all(
            isinstance(i, int) and not isinstance(i, bool) for i in own
        ):
            raise AdapterFileError(
                f"adapter_config.json does not say which tokens of {name!r} were trained."
            )
        file.tensors[join(name, ROWS)] = file.tensors.pop(join(name, PEFT_ROWS))
        file.tensors[join(name, INDICES)] = torch.tensor(own, dtype=torch.int64)
    token_modules(dataclasses.replace(file, modules_to_save=names))
    return names
