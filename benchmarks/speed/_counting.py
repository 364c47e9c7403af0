"""Exact counts: kernels that move data, the largest new tensor, bytes that autograd keeps for
backward, and the peak.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NO_DATA_MOVED = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
}


class Kernels(TorchDispatchMode):
    """The names of the aten calls that move data; views, `detach` and bare allocation are left
    out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        view = any(
            a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments
        )
        if not view and name not in NO_DATA_MOVED:
            self.names.append(name)
        written = any(
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
        )
        if isinstance(out, torch.Tensor) and not view and not written:
            self.largest = max(self.largest, out.numel())
        return out


def kernels(step: Callable[[], object]) -> list[str]:
    """What `step` runs, after a first call in which caches fill."""
    step()
    with Kernels() as counter:
        step()
    return counter.names


def kept_for_backward(forward: Callable[[], object], without: list[torch.Tensor]) -> int:
    """Bytes of the storages that `forward` keeps, each once, those of `without` (parameters) left
    out.
    """
    known = {t.untyped_storage().data_ptr() for t in without}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # held, so that no address is used twice
    del out
    return sum(kept.values())


def peak(step: Callable[[], object]) -> int:
    """The most bytes that `step` holds above what was held before it, by the own account of the
    default device's allocator.
    """
    step()
    if torch.get_default_device().type != "cpu":
        torch.accelerator.synchronize()
        held = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        step()
        torch.accelerator.synchronize()
        return int(torch.accelerator.max_memory_allocated()) - int(held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    before = memory[0][1]["Total Allocated"] - memory[0][1]["Bytes"]
    return int(max(args["Total Allocated"] for _, args in memory) - before)
