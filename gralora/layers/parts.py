"""Maps that are no layers of their own, but parts of a module: the projections of an attention,
fused expert weights.

Each is a child of its module, named `gralora_` and the part; the module changes class, so that it
uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from gralora.engines.walk import named_modules
from gralora.layers.adapter import GraloraAdapters
from gralora.layers.base import GraloraLayer
from gralora.layers.class_change import InPlaceModule, join, one_line, restore_class
from gralora.layers.linear_map import PREFIX, LinearMap
from gralora.layers.loading import overwritten, refuse_adapter_keys


class PartLayer(GraloraLayer):
    """One map of a module that holds several."""

    def __init__(self, module: nn.Module, part: str) -> None:
        super().__init__()
        self.__dict__["_host"] = module  # above us in the tree, so no child
        self.part = part
        self.training = module.training
        self._attach_container()

    @property
    def host(self) -> nn.Module:
        """The module that holds the map."""
        host: nn.Module = self.__dict__["_host"]
        return host

    def detach(self) -> None:
        del self.host._modules[PREFIX + self.part]
        if isinstance(self.host, PartHost) and not list(self.host.part_layers()):
            restore_class(self.host)

    def __repr__(self) -> str:
        copies, (n_in, n_out) = self.map.copies, self.map.sizes
        many = "" if copies is None else f"experts={copies}, "
        return one_line(
            self,
            f"{many}in_features={n_in}, out_features={n_out}, {self.gralora_adapters.describe()}",
        )


class PartMap(LinearMap):
    """One map of a module that holds several."""

    @property
    def adapters(self) -> GraloraAdapters | None:
        layer = getattr(self.module, PREFIX + self.part, None)
        return layer.gralora_adapters if isinstance(layer, PartLayer) else None


class PartHost(InPlaceModule):
    """Mixin of a module whose parts can have adapters."""

    _prefix = "Gralora"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, PartLayer):  # the parts of a replica are the replica's
            value.__dict__["_host"] = self

    def part_layers(self) -> Iterator[PartLayer]:
        return (child for child in self._modules.values() if isinstance(child, PartLayer))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for layer in self.part_layers():
            refuse_adapter_keys(state_dict, f"{prefix}{layer.part}.", args[-1])
            if not layer.gralora_adapters.merged:
                continue
            owner, name = layer.map.place
            key = prefix + join(
                next(path for path, module in named_modules(self) if module is owner), name
            )
            if key in state_dict:
                args[-1].append(overwritten(key))
                state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
