"""Linear layers: `GraloraLinear` for `nn.Linear` and its subclasses, `GraloraConv1D` for the
transposed one of GPT-2.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from gralora.config import GraloraConfig
from gralora.layers.base import GraloraLayer
from gralora.layers.class_change import held
from gralora.layers.effective_weight import EffectiveWeight, MatrixWeight, Share
from gralora.layers.in_place import InPlaceLayer, InPlaceMap
from gralora.torch_internals import AttentionOutput


class LinearWeight(MatrixWeight):
    """The effective weight of a layer: a product with it is one of the layer."""

    by_layer = True

    def __init__(
        self, layer: GraloraLayer, weight: Tensor, shares: list[Share], transposed: bool = False
    ) -> None:
        super().__init__(weight, shares, transposed)
        self.layer = layer

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        if self.transposed:
            return None
        base = partial(F.linear, x, self.weight, bias)
        y: Tensor = self.layer.apply_adapters(x, base, plain=(self.weight, bias), with_biases=False)
        return y


class LinearLayer(InPlaceLayer):
    """A layer whose weight is a matrix: (out, in), or (in, out) if `stored_transposed`."""

    stored_transposed: ClassVar[bool] = False

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        weight, bias = held(self, "weight"), held(self, "bias")
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return None
        return weight.t() if self.stored_transposed else weight, bias

    def plain_forward(self, input: Tensor) -> Tensor:
        weight = held(self, "weight")
        return F.linear(input, weight.t() if self.stored_transposed else weight, held(self, "bias"))

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        return LinearWeight(self, weight, shares, self.stored_transposed)

    @torch.no_grad()
    def computed_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The map (out, in) that the base computes, without adapters: of a packed weight, what its
        forward makes of unit vectors.

        Args:
            dtype: of these, where the weight does not say.

        Returns:
            the weight itself, or of a packed one its values in float32.
        """
        if not self.map.packed:
            return self.map.base_matrix()
        bias, own = self._parameters.get("bias"), self.map.weight
        given = own.dtype if own.is_floating_point() else dtype  # what the layer takes
        if bias is not None:
            self._parameters["bias"] = None
        try:
            unit = torch.eye(self.map.sizes[0], dtype=given, device=own.device)
            computed: Tensor = self.base_forward(unit)
            return computed.t().float()
        finally:
            if bias is not None:
                self._parameters["bias"] = bias


class MatrixMap(InPlaceMap):
    """The map of a layer whose weight is a matrix."""

    @property
    def has_rows(self) -> bool:
        return True


class GraloraLinear(LinearLayer, nn.Linear):
    """`nn.Linear` with GraLoRA adapters: y = x @ Wᵀ + b + scaling * x @ ΔWᵀ.

    Built directly, it has a frozen base that initialises and loads as `nn.Linear` does, and one
    trainable adapter.

    Args:
        in_features, out_features, bias, device: as for `nn.Linear`.
        config: of the adapter; `GraloraConfig()` if None.
        adapter_name: of the adapter.
        dtype: of the base. The adapter's is the same, but float32 where the base is half precision.

    Raises:
        ValueError: `config.gralora_k` does not divide both sizes.
    """

    _base_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: GraloraConfig | None = None,
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._drop_in(config, adapter_name)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: GraloraConfig | None = None,
        *,
        adapter_name: str = "default",
    ) -> GraloraLinear:
        """A `GraloraLinear` over the very weight and bias of `linear` (shared, and frozen);
        `linear` keeps its class.
        """
        return cls._adapting(LinearLayerMap(linear), config, adapter_name)

    @property
    def map(self) -> MatrixMap:
        return LinearLayerMap(self)

    @classmethod
    def is_plain(cls) -> bool:
        return cls._base_class.forward is nn.Linear.forward


class LinearLayerMap(MatrixMap):
    """The map of an `nn.Linear`."""

    module: nn.Linear
    layer_class = GraloraLinear

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, nn.Linear)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.module.in_features, self.module.out_features

    def reason_unfit(self) -> str | None:
        if isinstance(self.module, AttentionOutput):
            return (
                "is the out_proj of an nn.MultiheadAttention, which reads its weight and never"
                " calls it: no effect. Inject into the attention, or a module that holds it"
            )
        return super().reason_unfit()


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2: y = x @ W + b with W of shape (nx, nf)."""

    def __init__(
        self,
        nf: int,
        nx: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rearrange(self.weight, "i o -> o i"), self.bias)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


class GraloraConv1D(LinearLayer, Conv1D):
    """GPT-2's `Conv1D` with GraLoRA adapters: y = x @ W + b + scaling * x @ ΔW, W and ΔW of shape
    (nx, nf).

    Built directly, it has a frozen base that initialises and loads as `transformers`' `Conv1D`
    does, and one trainable adapter. Arguments as for `GraloraLinear`.
    """

    _base_class = Conv1D
    stored_transposed = True

    @property
    def in_features(self) -> int:
        """nx, under the name that it has in `nn.Linear`."""
        return self.map.sizes[0]

    @property
    def out_features(self) -> int:
        """nf, under the name that it has in `nn.Linear`."""
        return self.map.sizes[1]

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        config: GraloraConfig | None = None,
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(nf, nx, device, dtype)
        self._drop_in(config, adapter_name)

    @classmethod
    def from_conv1d(
        cls, conv: nn.Module, config: GraloraConfig | None = None, *, adapter_name: str = "default"
    ) -> GraloraConv1D:
        """A `GraloraConv1D` over the very weight and bias of `conv` (shared, and frozen); `conv`
        keeps its class.
        """
        return cls._adapting(Conv1DMap(conv), config, adapter_name)

    @property
    def map(self) -> Conv1DMap:
        return Conv1DMap(self)

    @classmethod
    def is_plain(cls) -> bool:
        return _is_conv1d(next(base for base in cls._base_class.__mro__ if "forward" in vars(base)))

    def extra_repr(self) -> str:
        if self._base_class is Conv1D:
            return super().extra_repr()
        nx, nf = self.map.sizes
        return f"nf={nf}, nx={nx}, {super().extra_repr()}"


class Conv1DMap(MatrixMap):
    """The map of a `Conv1D`, or of a class that is registered as transposed."""

    layer_class = GraloraConv1D

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return any(map(_is_conv1d, original.__mro__))

    @property
    def sizes(self) -> tuple[int, int]:
        nx, nf = self.weight.shape
        return nx, nf

    @property
    def transposed(self) -> bool:
        return True

    def matrix(self, weight: Tensor) -> Tensor:
        return rearrange(weight, "i o -> o i")

    def in_layout(self, delta: Tensor) -> Tensor:
        return rearrange(delta, "o i -> i o")

    def reason_unfit(self) -> str | None:
        reason = super().reason_unfit()
        if reason is None and self.weight.dim() != 2:
            shape = tuple(self.weight.shape)
            return f"has a weight of shape {shape}, where a Conv1D has (nx, nf)"
        return reason


def _is_conv1d(cls: type) -> bool:
    """Whether `cls` is our own `Conv1D`, or that of transformers, which is not imported for it."""
    full_name = f"{cls.__module__}.{cls.__qualname__}"
    return cls is Conv1D or full_name == "transformers.pytorch_utils.Conv1D"
