"""What holds for the time of a `with` block only, and only in the thread or task that opened it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from gralora.inplace import Appendage

_disabled: ContextVar[frozenset[int]] = ContextVar("gralora_disabled", default=frozenset())
_lock = threading.Lock()


def _keep_fused_paths_off(module: nn.Module, args: Any) -> None:
    """Never called. Its presence tells `nn.TransformerEncoderLayer` that this subtree must be run, not just read."""


class Switchable(Appendage):
    """A container of adapters that a `with` block can switch off.

    `scopes` counts the open blocks of all threads, so that the usual forward, with none open, pays one comparison.
    Compiled code cannot read a context variable: there a block counts for every thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scopes = 0
        # nn.TransformerEncoderLayer, in eval, reads its children's weights and skips their forwards, unless any module
        # below it has a hook. This module is never called, so the hook costs nothing.
        self.register_forward_pre_hook(_keep_fused_paths_off)

    @property
    def disabled(self) -> bool:
        """Whether an enclosing block of this thread has switched this container off."""
        return self.scopes > 0 and (torch.compiler.is_compiling() or id(self) in _disabled.get())


@contextmanager
def switched_off(containers: Iterable[Switchable]) -> Iterator[None]:
    """Switch `containers` off within the block. May be nested."""
    containers = list(containers)
    token = _disabled.set(_disabled.get() | {id(c) for c in containers})
    _count(containers, 1)
    try:
        yield
    finally:
        _count(containers, -1)
        _disabled.reset(token)


def _count(containers: list[Switchable], step: int) -> None:
    with _lock:
        for container in containers:
            container.scopes += step
