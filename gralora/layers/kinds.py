"""The table of what can be adapted: for each kind of map, the classes that it accepts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gralora.layers.attention import ProjectionMap
from gralora.layers.base import GraloraLayer
from gralora.layers.class_change import made_class
from gralora.layers.convolution import ConvMap, ConvTransposeMap
from gralora.layers.embedding import EmbeddingMap
from gralora.layers.experts import ExpertsMap
from gralora.layers.in_place import InPlaceMap
from gralora.layers.linear import Conv1DMap, GraloraLinear, LinearLayerMap, MatrixMap
from gralora.layers.linear_map import LinearMap

KINDS: list[type[LinearMap]] = [
    *(LinearLayerMap, Conv1DMap, EmbeddingMap, ConvMap, ConvTransposeMap),
    *(ProjectionMap, ExpertsMap),
]

ADAPTABLE = (
    "nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d, their"
    " transposed ones, subclasses of all these, GPT-2's Conv1D of transformers, and 3-D parameters"
    " of fused experts, by their own names"
)

REFUSED: dict[type[nn.Module], str] = {
    torch.jit.ScriptModule: (
        "it is TorchScript, whose weights are out of reach of Python; inject into the plain module,"
        " before it is scripted or traced"
    ),
    nn.EmbeddingBag: (
        "its bags are summed in C++, where no look-up of an adapter can come between; use"
        " nn.Embedding and a sum"
    ),
    nn.Bilinear: "it multiplies two inputs, and has no one input that a pair A, B could take",
    nn.RNNBase: (
        "its weights are read by kernels that run over all time steps at once, whose inputs nobody"
        " sees"
    ),
    nn.RNNCellBase: (
        "its two weights are read by one kernel, and their outputs are never seen apart"
    ),
}
"""Layers that people ask for and that can't be adapted, with the reason."""


def why_refused(module: nn.Module) -> str | None:
    """Why a module that holds weights can't be adapted, where there is more to say than that it
    can't.
    """
    return next((reason for cls, reason in REFUSED.items() if isinstance(module, cls)), None)


class RegisteredLinear(GraloraLinear):
    """A class that `register` has named."""

    @property
    def map(self) -> MatrixMap:
        return RegisteredMap(self)

    def extra_repr(self) -> str:
        return ", ".join(
            part
            for part in (self._base_class.extra_repr(self), self.gralora_adapters.describe())
            if part
        )


class RegisteredMap(MatrixMap):
    """The map of a class that `register` has named. Its sizes are read off its weight (out, in)."""

    layer_class = RegisteredLinear

    @property
    def sizes(self) -> tuple[int, int]:
        n_out, n_in = self.weight.shape
        return n_in, n_out


_registered: dict[type[nn.Module], type[LinearMap]] = {}


def register(cls: type[nn.Module], *, transposed: bool = False) -> None:
    """Adapt modules of class `cls`, which compute x @ Wᵀ + b with a weight of their own but are no
    subclass of `nn.Linear`.

    Args:
        transposed: the weight is (in, out), as GPT-2's Conv1D has it.

    Raises:
        TypeError: `cls` is no class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register takes a class of modules, not {cls!r}.")
    _registered[cls] = Conv1DMap if transposed else RegisteredMap


def kind_of(cls: type[nn.Module]) -> type[LinearMap] | None:
    """The kind of the linear maps that a module of class `cls` holds, or None."""
    found = next((_registered[base] for base in cls.__mro__ if base in _registered), None)
    return found or next((kind for kind in KINDS if kind.accepts(cls)), None)


def maps_of(module: nn.Module) -> Iterator[LinearMap]:
    """The linear maps that `module` itself holds, adapted or not."""
    kind = kind_of(type(module))
    if kind is not None:
        for part in kind.parts_of(module):
            yield kind(module, part)


def adapted_class(cls: type[nn.Module]) -> type[GraloraLayer]:
    """The class that `inject` gives a module of class `cls`: `GraloraLinear` for `nn.Linear`, else
    (its kind, `cls`).

    Made classes are cached; instances of them survive `copy.deepcopy` and `pickle`.

    Raises:
        TypeError: `cls` is no linear-like layer.
    """
    if issubclass(cls, GraloraLayer):
        return cls
    kind = kind_of(cls)
    if kind is None or not issubclass(kind, InPlaceMap):
        raise TypeError(f"{cls.__name__} cannot be adapted as a layer. Adaptable: {ADAPTABLE}.")
    return made_class(kind.layer_class, cls)
