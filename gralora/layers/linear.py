"""Linear layers: `GraloraLinear` for `nn.Linear` and its subclasses, `GraloraConv1D` for the
transposed one of GPT-2.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gralora.config import GraloraConfig
from gralora.layers.base import CHILD, GraloraLayer
from gralora.layers.class_change import held
from gralora.layers.effective_weight import EffectiveWeight, MatrixWeight, Share
from gralora.layers.in_place import InPlaceLayer
from gralora.maths import autograd


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
        base, plain = partial(F.linear, weight=self.weight, bias=bias), (self.weight, bias)
        return self.layer.run(x, base, (x,), {}, plain=plain)


class LinearLayer(InPlaceLayer):
    """A layer whose weight is a matrix: (out, in), or (in, out) if `stored_transposed`."""

    stored_transposed: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in), and whatever else the base layer takes -> (..., out), in the base layer's
        dtype.
        """
        if len(args) == 1 and not kwargs:
            y = self._alone(args[0])
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def _alone(self, x: Tensor) -> Tensor | None:
        """The forward where one adapter acts on a plain layer without dropout; None where it is not
        so.

        What it asks, it asks on every call, so nothing can be out of date; it only asks in the
        cheapest way.
        """
        if torch.compiler.is_compiling():
            return None
        own = self.__dict__
        found = own["_modules"][CHILD].alone()
        if (
            found is None
            or type(x) is not Tensor
            or "_base_instance_forward" in own
            or not self.is_plain()
        ):
            return None
        tensors, scaling = found
        parameters = own["_parameters"]
        weight = parameters.get("weight")
        if (
            type(weight) is not nn.Parameter
            or type(tensors[0]) is not nn.Parameter
            or "bias" not in parameters
        ):
            return None  # or parametrised
        if not autograd.usable(x, tensors[0]):
            return None
        matrix = weight.t() if self.stored_transposed else weight
        return autograd.linear_with_adapter(x, matrix, parameters["bias"], tensors, scaling, 0.0)

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        weight = held(self, "weight")
        if type(weight) not in (nn.Parameter, Tensor) or "_base_instance_forward" in self.__dict__:
            return None
        if not self.is_plain():
            return None
        return weight.t() if self.stored_transposed else weight, held(self, "bias")

    def plain_forward(self, x: Tensor) -> Tensor:
        weight = held(self, "weight")
        return F.linear(x, weight.t() if self.stored_transposed else weight, held(self, "bias"))

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        return LinearWeight(self, weight, shares, self.stored_transposed)

    @classmethod
    def matrix(cls, module: nn.Module, part: str, weight: Tensor) -> Tensor:
        return rearrange(weight, "i o -> o i") if cls.stored_transposed else weight

    @classmethod
    def in_layout(cls, module: nn.Module, part: str, delta: Tensor) -> Tensor:
        return rearrange(delta, "o i -> i o") if cls.stored_transposed else delta

    @classmethod
    def transposed(cls, module: nn.Module, part: str) -> bool:
        return cls.stored_transposed

    @torch.no_grad()
    def computed_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The map (out, in) that the base computes, without adapters: of a packed weight, what its
        forward makes of unit vectors.

        Args:
            dtype: of these, where the weight does not say.

        Returns:
            the weight itself, or of a packed one its values in float32.
        """
        if not self.packed:
            return self.spot.base_matrix()
        bias, own = self._parameters.get("bias"), cast(Tensor, self._parameters["weight"])
        given = own.dtype if own.is_floating_point() else dtype  # what the layer takes
        if bias is not None:
            self._parameters["bias"] = None
        try:
            unit = torch.eye(self.sizes(self, "")[0], dtype=given, device=own.device)
            return cast(Tensor, self.base_forward(unit)).t().float()
        finally:
            if bias is not None:
                self._parameters["bias"] = bias

    @classmethod
    def has_rows(cls, module: nn.Module, part: str) -> bool:
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
        return cls._adapting(linear, config, adapter_name)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, nn.Linear)

    @classmethod
    def is_plain(cls) -> bool:
        return cls._base_class.forward is nn.Linear.forward

    @classmethod
    def unfit(cls, module: nn.Module, part: str) -> str | None:
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return (
                "is the out_proj of an nn.MultiheadAttention, which reads its weight and never"
                " calls it: no effect. Inject into the attention, or a module that holds it"
            )
        return None

    @classmethod
    def sizes(cls, module: nn.Module, part: str) -> tuple[int, int]:
        return cast(nn.Linear, module).in_features, cast(nn.Linear, module).out_features


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
        return self.sizes(self, "")[0]

    @property
    def out_features(self) -> int:
        """nf, under the name that it has in `nn.Linear`."""
        return self.sizes(self, "")[1]

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
        return cls._adapting(conv, config, adapter_name)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        # transformers' own is known by its name, so that transformers need not be imported
        return any(base is Conv1D or base.__name__ == "Conv1D" for base in original.__mro__)

    @classmethod
    def is_plain(cls) -> bool:
        owner = next(base for base in cls._base_class.__mro__ if "forward" in vars(base))
        return (
            owner is Conv1D
            or f"{owner.__module__}.{owner.__name__}" == "transformers.pytorch_utils.Conv1D"
        )

    @classmethod
    def unfit(cls, module: nn.Module, part: str) -> str | None:
        shape = tuple(held(module, "weight").shape)
        return (
            f"has a weight of shape {shape}, where a Conv1D has (nx, nf)"
            if len(shape) != 2
            else None
        )

    @classmethod
    def sizes(cls, module: nn.Module, part: str) -> tuple[int, int]:
        nx, nf = held(module, "weight").shape
        return nx, nf

    def extra_repr(self) -> str:
        nx, nf = self.sizes(self, "")
        return (
            super().extra_repr()
            if self._base_class is Conv1D
            else f"nf={nf}, nx={nx}, {super().extra_repr()}"
        )
