"""Two processes joined by gloo, started once per test session: what the tests of distributed
engines run on.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

WORLD = 2
PATIENCE = 60  # seconds for one call


class Processes:
    """A group of `WORLD` processes. `run` has each of them call a function at module level, and
    returns their results.
    """

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """[function(rank, *args) for every rank]; whatever fails in one fails here, and the next
        call starts anew.
        """
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                done, result = (
                    pipe.recv()
                    if pipe.poll(PATIENCE)
                    else (False, f"no answer in {PATIENCE} seconds")
                )
            except EOFError:
                done, result = False, "the process died"
            results.append(result)
            if not done:
                failures.append(f"rank {rank}: {result}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def stop(self, *, kill: bool = True) -> None:
        for pipe in self._pipes:
            # at which a worker that is not stuck ends, and writes what coverage has counted
            pipe.close()
        for worker in self._workers:
            if not kill:
                worker.join(30)
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(WORLD):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, str(store), there), daemon=True)
            worker.start()
            there.close()
            self._workers.append(worker)
            self._pipes.append(here)


def _serve(rank: int, store: str, pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            torch.distributed.destroy_process_group()
            return
        torch.manual_seed(0)
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
