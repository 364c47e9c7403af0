"""The table of what can be adapted: each kind says itself which classes it accepts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from gralora.layers.attention import Projection
from gralora.layers.base import GraloraLayer, Spot
from gralora.layers.class_change import made_class
from gralora.layers.convolution import GraloraConv
from gralora.layers.experts import ExpertWeights
from gralora.layers.in_place import InPlaceLayer
from gralora.layers.linear import GraloraConv1D, GraloraLinear

KINDS: list[type[GraloraLayer]] = [GraloraLinear, GraloraConv1D, GraloraConv, Projection, ExpertWeights]

ADAPTABLE = (
    "nn.Linear, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d and their subclasses, GPT-2's Conv1D, and 3-D "
    "parameters of fused experts"
)


def kind_of(cls: type[nn.Module]) -> type[GraloraLayer] | None:
    """The kind of the linear maps that a module of class `cls` holds, or None."""
    return next((kind for kind in KINDS if kind.accepts(cls)), None)


def spots(module: nn.Module) -> Iterator[Spot]:
    """The linear maps that `module` itself holds, adapted or not."""
    kind = kind_of(type(module))
    if kind is not None:
        for part in kind.parts(module):
            yield Spot(kind, module, part)


def adapted_class(cls: type[nn.Module]) -> type[GraloraLayer]:
    """The class that `inject` gives a module of class `cls`: `GraloraLinear` for `nn.Linear`, else (its kind, `cls`).

    Made classes are cached; instances of them survive `copy.deepcopy` and `pickle`.

    Raises:
        TypeError: `cls` is no linear-like layer.
    """
    kind = kind_of(cls)
    if kind is None or not issubclass(kind, InPlaceLayer):
        raise TypeError(f"{cls.__name__} cannot be adapted as a layer. Adaptable: {ADAPTABLE}.")
    return cls if issubclass(cls, GraloraLayer) else cast(type[GraloraLayer], made_class(kind, cls))
