"""What holds for the time of a `with` block only, and only in the thread or task that opened it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from gralora.layers.class_change import Appendage

OFF: Final = "off"
"""The mode of a container that a block has switched off."""


class Rows:
    """The mode of a container whose adapters are chosen per row of the batch.

    Args:
        names: the adapter of every row, None for the base alone.
        dim: the axis of the batch.
    """

    def __init__(self, names: Iterable[str | None], dim: int = 0) -> None:
        self.names = tuple(names)
        self.dim = dim
        self._sorted: dict[Any, tuple[Tensor, Tensor, list[str | None], list[int]]] = {}

    def axis(self, x: Tensor, dim: int | None = None) -> int:
        """The axis of `x` that holds the batch, checked. It may be a multiple: beams, tokens laid out row by row."""
        dim = self.dim if dim is None else dim
        dim = 0 if x.dim() == 2 and len(x) == len(self.names) else dim
        if dim >= x.dim() or x.shape[dim] % len(self.names) or (dim and x.dim() == 2):
            raise ValueError(
                f"mixed_batch was given {len(self.names)} names, but a layer got an input of shape {tuple(x.shape)}, whose "
                f"axis {dim} is no multiple of that. The batch must be axis {dim}; mixed_batch(..., dim=1) moves it."
            )
        return dim

    def sort(
        self, size: int, known: Collection[str], device: torch.device
    ) -> tuple[Tensor, Tensor, list[str | None], list[int]]:
        """(order, back, names, counts): rows grouped by adapter, those without one last, and the way back.

        Args:
            size: of the batch axis.
            known: the adapters that there are; the rows of others go with None.
        """
        key = (size, tuple(known), device)
        if key not in self._sorted:
            groups: dict[str | None, list[int]] = {name: [] for name in self.names if name in known}
            groups[None] = []
            each = size // len(self.names)
            for row, name in enumerate(self.names):
                groups[name if name in known else None].extend(range(row * each, (row + 1) * each))
            order = torch.tensor([i for rows in groups.values() for i in rows])
            names, counts = list(groups), [len(rows) for rows in groups.values()]
            self._sorted[key] = (order.to(device), order.argsort().to(device), names, counts)
        return self._sorted[key]


Mode = Rows | str

_modes: ContextVar[Mapping[int, Mode]] = ContextVar("gralora_modes", default=MappingProxyType({}))
_lock = threading.Lock()


def _keep_fused_paths_off(module: nn.Module, args: Any) -> None:
    """Never called. Its presence tells `nn.TransformerEncoderLayer` that this subtree must be run, not just read."""


class Switchable(Appendage):
    """A container of adapters that a `with` block can switch off, or to rows of the batch.

    `scopes` counts the open blocks of all threads, so that the usual forward, with none open, pays one comparison.
    Compiled code cannot read a context variable, and neither can a thread that autograd starts: there the latest block
    counts.
    """

    scopes: int
    latest: Mode | None

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(scopes=0, latest=None)  # past nn.Module's __setattr__, which costs more than all the rest
        # nn.TransformerEncoderLayer, in eval, reads its children's weights and skips their forwards, unless any module
        # below it has a hook. This module is never called, so the hook costs nothing.
        self.register_forward_pre_hook(_keep_fused_paths_off)

    @property
    def mode(self) -> Mode | None:
        """What an enclosing block of this thread has made of this container: nothing, `OFF`, or `Rows`."""
        if self.scopes == 0:
            return None
        if torch.compiler.is_compiling():
            return self.latest
        modes = _modes.get()
        return self.latest if not modes and _in_a_thread_of_backward() else modes.get(id(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "scopes": 0, "latest": None}  # a copy made within a block is not in the block


@contextmanager
def switched(containers: Iterable[Switchable], mode: Mode) -> Iterator[None]:
    """Put `containers` into `mode` within the block. May be nested; the innermost counts."""
    containers = list(containers)
    before = [container.latest for container in containers]
    token = _modes.set({**_modes.get(), **{id(c): mode for c in containers}})
    _count(containers, 1, [mode] * len(containers))
    try:
        yield
    finally:
        _count(containers, -1, before)
        _modes.reset(token)


def _in_a_thread_of_backward() -> bool:
    """Whether autograd started this thread, as it does for every GPU: checkpointed forwards are run again in it."""
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and isinstance(threading.current_thread(), threading._DummyThread)


def _count(containers: list[Switchable], step: int, modes: list[Any]) -> None:
    with _lock:
        for container, mode in zip(containers, modes, strict=True):
            container.scopes += step
            container.latest = mode
