"""What a state dict says of adapters, and what a loader would pass over in silence.

A checkpoint of the base loads strictly into an adapted model, and leaves the adapters as they are;
where they have an effect by then, a warning says so. One that holds some adapters and lacks others
is strict about these.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from torch import nn

FACTORS = ("A", "B", "A_general", "B_general")
"""The tensors of one adapter, in the order in which the functions of `gralora.maths.functional`
take them.
"""


def factor_key(name: str) -> str:
    """The key of an adapter's tensor in `adapter_state_dict` and in a file, behind its layer's
    name: PEFT's.
    """
    return f"gralora_{name}.weight" if name.endswith("_general") else f"gralora_{name}"


class _Load:
    """One call of `load_state_dict`, known by its list of errors."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        self.holds = False  # the state dict has something for a container of ours
        self.lacking: list[str] = []  # keys of those that it has nothing for
        self.told: set[str] = set()


_current: ContextVar[_Load | None] = ContextVar("gralora_load", default=None)


class Appendage(nn.Module):
    """A container of ours that hangs on a module of the user's."""

    def with_effect(self) -> Iterable[str]:
        """The adapters in it that do something."""
        return ()

    def is_mark(self, key: str) -> bool:
        """Whether a key of our own state dict says that an adapter is merged."""
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        load = _current.get()
        if load is None or load.errors is not errors:
            load = _Load(errors)
            _current.set(load)
        state = self.state_dict(keep_vars=True)  # so that assign=True keeps the objects
        own = {key: value for key, value in state.items() if not self.is_mark(key)}
        marks = [
            key
            for key in state_dict
            if key.startswith(prefix) and self.is_mark(key.removeprefix(prefix))
        ]
        for key in marks:
            state_dict.pop(key)
            errors.append(
                f"{key}: the state dict is that of a merged model, whose weights hold this adapter"
                " already: here it would count twice. Load it into the plain model; or unmerge,"
                " and save again."
            )
        if any(key.startswith(prefix) for key in state_dict):
            load.holds = True
            missing.extend(load.lacking)
            load.lacking.clear()
        elif not load.holds and not marks:
            load.lacking.extend(prefix + key for key in own)
            state_dict.update({prefix + key: value for key, value in own.items()})
            self._tell(load)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _tell(self, load: _Load) -> None:
        names = [name for name in self.with_effect() if name not in load.told]
        load.told.update(names)
        if names:
            warnings.warn(
                f"the state dict holds nothing of adapter {', '.join(map(repr, names))}: what it"
                " has learned or loaded stays as it is. Load an adapter with load_adapter, or with"
                " a state dict of the whole model.",
                UserWarning,
                stacklevel=2,
            )


def refuse_adapter_keys(state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Add an error where the keys of `adapter_state_dict` have come to a `load_state_dict`, which
    would pass them over.
    """
    for key in [
        key for key in (prefix + factor_key(name) for name in FACTORS) if key in state_dict
    ]:
        state_dict.pop(key)
        errors.append(
            f"{key} is a key of adapter_state_dict, not of state_dict: load_adapter_state_dict"
            " takes it."
        )


def overwritten(key: str) -> str:
    """Why a checkpoint may not be loaded into a weight now."""
    return f"{key} holds a merged adapter, which unmerge would overwrite: unmerge, then load."
