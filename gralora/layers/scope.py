"""What holds for the time of a `with` block only, and only in the thread or task that opened it."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import FrameType, MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from gralora.layers.loading import Appendage

OFF: Final = "off"
"""The mode of a container that a block has switched off."""

SIZES = 32
"""For how many sizes of a batch's axis an assignment of rows keeps their order."""


class Rows:
    """The mode of a container whose adapters are chosen per row of the batch.

    Args:
        names: the adapter of every row, None for the base alone.
        dim: the axis of the batch.
        repeat: how the names go on where a layer gets a multiple of the rows: "interleave" (each
            holds for that many in a row) or "tile" (the list over and over); None: that is an
            error.
    """

    def __init__(
        self, names: Iterable[str | None], dim: int = 0, repeat: str | None = None
    ) -> None:
        self.names = tuple(names)
        self.dim = dim
        self.repeat = repeat
        self._sorted: dict[Any, tuple[Tensor, Tensor, list[str | None], list[int]]] = {}

    def axis(self, x: Tensor, dim: int | None = None) -> int:
        """The axis of `x` that holds the batch, checked."""
        dim, count = self.dim if dim is None else dim, len(self.names)
        dim = 0 if x.dim() == 2 and len(x) == count else dim
        there = dim < x.dim() and not (dim and x.dim() == 2)
        if not there or (x.shape[dim] != count if self.repeat is None else x.shape[dim] % count):
            rule = "as many rows as names" if self.repeat is None else "a multiple of that"
            raise ValueError(
                f"mixed_batch was given {count} names, but a layer got an input of shape"
                f" {tuple(x.shape)}, whose axis {dim} is not {rule}: whose the rows are can't be"
                ' known. Say how they repeat, mixed_batch(..., repeat="interleave") for beams and'
                ' for tokens laid out row by row, "tile" for a batch that is put together of'
                " itself, as guidance does; or give a name for every row. dim=1 is for a batch on"
                " axis 1."
            )
        return dim

    def sort(
        self, size: int, known: Collection[str], device: torch.device
    ) -> tuple[Tensor, Tensor, list[str | None], list[int]]:
        """(order, back, names, counts): rows grouped by adapter, those without one last, and the
        way back.

        Args:
            size: of the batch axis.
            known: the adapters that there are; the rows of others go with None.
        """
        key = (size, tuple(known), device)
        found = self._sorted.get(key)
        if found is None:
            groups: dict[str | None, list[int]] = {name: [] for name in self.names if name in known}
            groups[None] = []
            count, each = len(self.names), size // len(self.names)
            for row, name in enumerate(self.names):
                own = (
                    range(row, size, count)
                    if self.repeat == "tile"
                    else range(row * each, (row + 1) * each)
                )
                groups[name if name in known else None].extend(own)
            order = torch.tensor([i for rows in groups.values() for i in rows])
            names, counts = list(groups), [len(rows) for rows in groups.values()]
            found = (order.to(device), order.argsort().to(device), names, counts)
            if len(self._sorted) >= SIZES:  # an assignment outlives its block
                self._sorted.clear()
            self._sorted[key] = found
        return found


@functools.lru_cache(64)
def rows_of(names: tuple[str | None, ...], dim: int, repeat: str | None) -> Rows:
    """One object for one assignment, so that compiled code, which stands on the very object, stays
    valid in a later block.
    """
    return Rows(names, dim, repeat)


class Only:
    """The mode of a container in which one adapter acts, whichever are active."""

    def __init__(self, name: str) -> None:
        self.name = name


Mode = Rows | Only | str


class Block:
    """A `with` block that is open: what it makes of its containers, and whose it is.

    Usually it holds for the thread or task that opened it. One that a generator holds open over its
    yields holds for the code within it, that is while the generator runs, whoever resumes it and in
    whatever context.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode, self.open = mode, True
        self.frame = _owner(sys._getframe(1))
        self.of_generator = bool(self.frame.f_code.co_flags & _GENERATORS)


_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_DRIVERS = {"contextlib", "_pytest.fixtures"}
"""Modules that run a generator up to its yield so that what it has opened holds for others."""

_blocks: ContextVar[Mapping[int, tuple[Block, ...]]] = ContextVar(
    "gralora_blocks", default=MappingProxyType({})
)
_lock = threading.Lock()


def _owner(frame: FrameType) -> FrameType:
    """The frame whose `with` it is, behind those of `contextlib` and the generators that it
    runs.
    """
    while frame.f_back is not None:
        above = frame.f_back.f_globals.get("__name__") in _DRIVERS
        if frame.f_globals.get("__name__") not in _DRIVERS and not (
            above and frame.f_code.co_flags & _GENERATORS
        ):
            break
        frame = frame.f_back
    return frame


def _keep_fused_paths_off(module: nn.Module, args: Any) -> None:
    """Never called. Its presence tells `nn.TransformerEncoderLayer` that this subtree must be run,
    not just read.
    """


class Switchable(Appendage):
    """A container of adapters that a `with` block can switch off, or to rows of the batch.

    `scopes` counts the open blocks of all threads, so that the usual forward, with none open, pays
    one comparison. Compiled code cannot read a context variable, and neither can a thread that
    autograd or `DataParallel` starts: there the latest block counts.
    """

    scopes: int
    latest: Mode | None
    blocks: tuple[Block, ...] = ()  # also of what was pickled before there were any
    framed: bool = False  # some of them are a generator's

    def __init__(self) -> None:
        super().__init__()
        # past nn.Module's __setattr__, which costs more than all the rest
        self.__dict__.update(scopes=0, latest=None, blocks=(), framed=False)
        # nn.TransformerEncoderLayer, in eval, reads its children's weights and skips their
        # forwards, unless any module below it has a hook. This module is never called, so the hook
        # costs nothing.
        self.register_forward_pre_hook(_keep_fused_paths_off)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Module, nn.Parameter)) or name.startswith("__"):
            super().__setattr__(name, value)
        else:
            self.__dict__[name] = value  # an adapter may have any name, that of a field of ours too

    @property
    def mode(self) -> Mode | None:
        """What an enclosing block of this thread has made of this container: nothing, `OFF`, or
        `Rows`.
        """
        if self.scopes == 0:
            return None
        if torch.compiler.is_compiling() or "_is_replica" in self.__dict__:
            return self.latest
        if self.framed:
            by_frame = {id(block.frame): block.mode for block in self.blocks}
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                if id(frame) in by_frame:
                    return by_frame[id(frame)]
                frame = frame.f_back
        blocks = _blocks.get()
        if not blocks and _in_a_thread_of_backward():
            return self.latest
        for block in reversed(blocks.get(id(self), ())):
            if block.open:  # else it ended in another context than it began in
                return block.mode
        return None

    def __getstate__(self) -> dict[str, Any]:
        # a copy made within a block is not in the block
        return {**self.__dict__, "scopes": 0, "latest": None, "blocks": (), "framed": False}


@contextmanager
def switched(containers: Iterable[Switchable], mode: Mode) -> Iterator[None]:
    """Put `containers` into `mode` within the block. May be nested; the innermost counts."""
    containers, block, outer = list(containers), Block(mode), _blocks.get()
    before = [container.latest for container in containers]
    token = None
    if not block.of_generator:
        token = _blocks.set(
            {**outer, **{id(c): (*outer.get(id(c), ()), block) for c in containers}}
        )
    _count(containers, block, 1, [mode] * len(containers))
    try:
        yield
    finally:
        block.open = False
        _count(containers, block, -1, before)
        if token is not None:
            with suppress(
                ValueError
            ):  # where it ends in another context; there the block is seen to be closed
                _blocks.reset(token)


def _in_a_thread_of_backward() -> bool:
    """Whether autograd started this thread, as it does for every GPU: checkpointed forwards are run
    again in it.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and isinstance(threading.current_thread(), threading._DummyThread)


def _count(containers: list[Switchable], block: Block, step: int, modes: list[Any]) -> None:
    with _lock:
        for container, mode in zip(containers, modes, strict=True):
            blocks = (
                (*container.blocks, block)
                if step > 0
                else tuple(b for b in container.blocks if b is not block)
            )
            framed = any(each.of_generator for each in blocks)
            container.__dict__.update(
                scopes=container.scopes + step, latest=mode, blocks=blocks, framed=framed
            )
