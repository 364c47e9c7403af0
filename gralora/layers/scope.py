"""Modes: what an open `with` block (`disable_adapter`, `mixed_batch`) changes, and for whom.

A block holds for the thread or asyncio task that opened it, as `torch.no_grad` does, since it is
kept in a context variable. Four places have no context of their own:

- Compiled code cannot read a context variable: the block that was opened last applies.
- The threads in which autograd runs the backward of a GPU: the block of the only thread that has
  one open.
- A replica of `DataParallel` runs in the mode in which it was made.
- A thread that was started while another thread had a block open has no block, and may be meant to
  be inside that one: a forward there raises.

A generator that yields inside a block leaks it to its consumer, as with `torch.no_grad`, but the
code of the generator itself always runs inside its own block, whoever resumes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, nn

from gralora.layers.loading import Appendage
from gralora.layers.running import calling_generator, innermost_running
from gralora.torch_internals import in_backward

OFF: Final = "off"
"""The mode in which no adapter is used."""


class Rows:
    """The mode in which every row of the batch has an adapter of its own.

    Args:
        names: the adapter of every row, None for the base alone.
        dim: the axis of the batch.
        repeat: how the names continue where a layer gets a multiple of the rows: "interleave" (each
            name holds for that many rows in a row) or "tile" (the list over and over); None: that
            is an error.
    """

    def __init__(
        self, names: Iterable[str | None], dim: int = 0, repeat: str | None = None
    ) -> None:
        self.names = tuple(names)
        self.dim = dim
        self.repeat = repeat
        self._orders: dict[Any, tuple[Tensor, Tensor]] = {}

    def axis(self, x: Tensor, dim: int | None = None) -> int:
        """The axis of `x` that holds the batch, checked."""
        dim, count = self.dim if dim is None else dim, len(self.names)
        dim = 0 if x.dim() == 2 and len(x) == count else dim
        exists = dim < x.dim() and not (dim and x.dim() == 2)
        if not exists or (x.shape[dim] != count if self.repeat is None else x.shape[dim] % count):
            rule = "as many rows as names" if self.repeat is None else "a multiple of that"
            raise ValueError(
                f"mixed_batch got {count} names, but a layer got an input of shape"
                f" {tuple(x.shape)}, whose axis {dim} does not have {rule}. Specify how the rows"
                ' repeat: mixed_batch(..., repeat="interleave") for beams and for tokens laid out'
                ' row by row, repeat="tile" for a batch that is concatenated with itself, as'
                " guidance does; or give a name for every row. dim=1 is for a batch on axis 1."
            )
        return dim

    def groups(self, size: int, known: Collection[str]) -> dict[str | None, list[int]]:
        """The rows of every adapter, those without one under None, which comes last.

        Args:
            size: of the batch axis.
            known: the adapters that exist; the rows of others are under None.
        """
        rows: dict[str | None, list[int]] = {name: [] for name in self.names if name in known}
        rows[None] = []
        count, each = len(self.names), size // len(self.names)
        for row, name in enumerate(self.names):
            own = (
                range(row, size, count)
                if self.repeat == "tile"
                else range(row * each, (row + 1) * each)
            )
            rows[name if name in known else None].extend(own)
        return rows

    def sort(
        self, size: int, known: Collection[str], device: torch.device
    ) -> tuple[Tensor, Tensor, list[str | None], list[int]]:
        """(order, back, names, counts): the permutation that groups rows by adapter, its inverse,
        and how many rows each adapter has. Arguments as for `groups`.
        """
        groups = self.groups(size, known)
        names, counts = list(groups), [len(rows) for rows in groups.values()]
        if torch.compiler.is_compiling():
            return (*_permutation(groups, device), names, counts)
        key = (size, tuple(known), device)
        if key not in self._orders:
            with torch.inference_mode(False):  # the same block may also run with gradients
                found = _permutation(groups, device)
            if type(found[0]) is not Tensor:  # fake, as under export
                return (*found, names, counts)
            self._orders[key] = found
        return (*self._orders[key], names, counts)

    def run_by_adapter(
        self,
        x: Tensor,
        dim: int,
        known: Collection[str],
        run: Callable[[str | None, Tensor], Tensor],
    ) -> Tensor:
        """run(name, rows) for every adapter that has rows of `x`, put back in the order of `x`."""
        order, back, names, counts = self.sort(x.shape[dim], known, x.device)
        parts = zip(names, torch.split(order, counts), strict=True)
        return torch.cat([run(n, rows) for n, rows in parts if len(rows)], dim).index_select(
            dim, back
        )


def _permutation(
    groups: dict[str | None, list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    order = [row for rows in groups.values() for row in rows]
    back = [0] * len(order)
    for place, row in enumerate(order):
        back[row] = place
    return torch.tensor(order, device=device), torch.tensor(back, device=device)


class Only:
    """The mode in which one adapter is used, whichever are active."""

    def __init__(self, name: str) -> None:
        self.name = name


Mode = Rows | Only | str


class Block:
    """An open `with` block.

    Attributes:
        threads: those that were running when it was opened.
        generator: the frame of the generator that holds it open over its yields, if one does.
        inside: the blocks of running generators within which it was opened.
    """

    def __init__(self, mode: Mode, around: Sequence[Block]) -> None:
        self.mode: Mode = mode
        self.open = True
        self.opener = threading.current_thread()
        self.threads = {*threading.enumerate(), self.opener}
        self.generator: FrameType | None = calling_generator()
        self.inside = tuple(_running_generators(around))

    def close(self) -> None:
        """Release what it refers to: a copied context keeps the block itself."""
        self.open, self.threads, self.generator, self.inside = False, set(), None, ()


_entered: ContextVar[tuple[Block, ...]] = ContextVar("gralora_blocks", default=())
_lock = threading.Lock()


def _keep_fused_paths_off(module: nn.Module, args: Any) -> None:
    """Never called. Its presence makes `nn.TransformerEncoderLayer` call this subtree in eval."""


class Switchable(Appendage):
    """A container of adapters whose mode `with` blocks set.

    `blocks` holds the open blocks of all threads, so a forward with none open pays one comparison.
    """

    blocks: tuple[Block, ...]
    replica_mode: Mode | None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = ()
        # nn.TransformerEncoderLayer, in eval, reads its children's weights and skips their
        # forwards, unless any module below it has a hook. This module is never called, so the hook
        # costs nothing.
        self.register_forward_pre_hook(_keep_fused_paths_off)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            super().__setattr__(name, value)
        else:  # an adapter may have any name, that of an attribute of ours too
            object.__setattr__(self, name, value)

    @property
    def mode(self) -> Mode | None:
        """The mode that an enclosing block of this thread or task has set, if any."""
        return _mode_in(self.blocks) if self.blocks else self.replica_mode

    def _replicate_for_data_parallel(self) -> Any:
        mode = self.mode
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.blocks, replica.replica_mode = (), mode
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # a copy made within a block is not in the block
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "blocks": ()}


@contextmanager
def switched(containers: Iterable[Switchable], mode: Mode) -> Iterator[None]:
    """Put `containers` into `mode` within the block. May be nested; the innermost applies."""
    containers = list(containers)
    around = dict.fromkeys(block for container in containers for block in container.blocks)
    block = Block(mode, list(around))
    with _lock:
        for container in containers:
            container.blocks = (*container.blocks, block)
    _entered.set((*(other for other in _entered.get() if other.open), block))
    try:
        yield
    finally:
        with _lock:
            for container in containers:
                container.blocks = tuple(each for each in container.blocks if each is not block)
        block.close()
        _entered.set(tuple(other for other in _entered.get() if other is not block))


def _mode_in(blocks: tuple[Block, ...]) -> Mode | None:
    """The mode of a container with these open blocks, where this is called."""
    if torch.compiler.is_compiling():
        return blocks[-1].mode
    entered = [block for block in _entered.get() if block in blocks]
    running = _running_generators(blocks)
    if running:
        entered = [running[0], *(block for block in entered if running[0] in block.inside)]
    if entered:
        return entered[-1].mode
    thread = threading.current_thread()
    if _in_a_thread_of_backward(thread) and len({block.opener for block in blocks}) == 1:
        return blocks[-1].mode
    if any(thread not in block.threads for block in blocks if block.open):
        raise RuntimeError(
            "this thread was started while another thread had a block open on this model"
            " (disable_adapter or mixed_batch). A block holds only for the thread or task that"
            " opened it, so which adapters this forward is meant to use is ambiguous. Open the"
            " block inside this thread, around the forward."
        )
    return None


def _running_generators(blocks: Sequence[Block]) -> list[Block]:
    """Those of `blocks` that are held by a generator which is running here, the innermost first.

    Args:
        blocks: in the order in which they were opened.
    """
    frames = {id(block.generator) for block in blocks if block.generator is not None}
    running = innermost_running(frames) if frames else []
    return [b for frame in running for b in reversed(blocks) if id(b.generator) == frame]


def _in_a_thread_of_backward(thread: threading.Thread) -> bool:
    """Whether autograd started this thread, as it does for every GPU, and runs its backward."""
    return in_backward() and isinstance(thread, threading._DummyThread)
