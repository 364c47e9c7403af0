"""What of a model concerns adapters, found in one walk that does not enter them: for what is done
often to many layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import nn

from gralora.engines.distributed import engine_of
from gralora.engines.walk import child_of, children
from gralora.layers.adapter import GraloraAdapter, GraloraAdapters
from gralora.layers.base import GraloraLayer, name_of
from gralora.layers.class_change import join
from gralora.layers.linear_map import CHILD
from gralora.model.saved import BiasSwap, SavedCopies, SavedModule

RECORD = "_gralora_record"
"""On the module that was injected into: adapter name -> names of all that it has there
(`record.py`).
"""


class Survey(NamedTuple):
    """What is adapted in a model, by name.

    Attributes:
        layers, saved, biases: adapted maps, saved modules, and biases that adapters train.
        lost: adapters and copies around which something has rebuilt their module, so that they act
            no more.
        records: what `inject` has written down, by the module that it was given.
        only_adapters: there is nothing but adapters as they are made, none merged, and no engine
            has taken them.
    """

    layers: list[tuple[str, GraloraAdapters]]
    saved: list[tuple[str, SavedCopies]]
    biases: list[tuple[str, BiasSwap]]
    lost: list[GraloraAdapters | SavedCopies]
    records: list[tuple[str, dict[str, Any]]]
    only_adapters: bool

    def names(self) -> list[str]:
        """Of all adapters."""
        found: dict[str, None] = {}
        for _, adapters in self.layers:
            found.update(dict.fromkeys(adapters._modules))
        for _, copies in self.saved:
            found.update(dict.fromkeys(copies._modules))
        for _, swap in self.biases:
            found.update(dict.fromkeys(swap.names))
        for containers in self.lost:
            found.update(dict.fromkeys(containers._modules))
        return list(found)

    def gone(self, adapter_name: str) -> list[str]:
        """What is on record for an adapter, and there no more."""
        there = {path for path, adapters in self.layers if adapter_name in adapters._modules}
        there |= {path for path, copies in self.saved if adapter_name in copies._modules}
        there |= {key for key, swap in self.biases if adapter_name in swap.names}
        recorded = ((path, record.get(adapter_name, ())) for path, record in self.records)
        full = (join(path, part) if part else path for path, parts in recorded for part in parts)
        return [part for part in full if part not in there]


def survey(model: nn.Module) -> Survey:
    found, usual = Survey([], [], [], [], [], False), True
    seen: set[int] = set()
    engines: dict[type, bool] = {}
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        own, below, cls = module.__dict__, module._modules, type(module)
        if RECORD in own:
            found.records.append((name, own[RECORD]))
        if cls not in engines:
            engines[cls] = engine_of(module) is not None
        adapters = cast("GraloraAdapters | None", child_of(module, CHILD))
        if adapters is not None and isinstance(module, GraloraLayer):
            found.layers.append((name_of(name, module) if module.part else name, adapters))
            usual = usual and not adapters.merged
            for adapter in adapters._modules.values():
                usual = usual and type(adapter) is GraloraAdapter
            if len(below) == 1:
                continue
        for entry in children(name, module) if below else ():
            child = entry[1]
            if isinstance(child, SavedCopies) and isinstance(module, SavedModule):
                found.saved.append((name, child))
            elif isinstance(child, BiasSwap):
                found.biases.append((join(name, child.parameter), child))
            elif isinstance(child, (GraloraAdapters, SavedCopies)):
                if child is not adapters or not isinstance(module, GraloraLayer):
                    found.lost.append(child)
            else:
                waiting.append(entry)
    usual = usual and not (found.saved or found.biases or found.lost or any(engines.values()))
    return found._replace(only_adapters=usual)
