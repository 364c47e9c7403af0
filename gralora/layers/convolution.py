"""`GraloraConv`: convolutions in 1, 2 and 3 dimensions.

The same method on channels. The down-projection is a grouped convolution with the layer's own kernel, the regrouping acts
on channels, the up-projection is a grouped 1x1 convolution:

    z = conv(x, A, groups=k)       "b (i j s) p -> b (j i s) p"       y += scaling * conv1x1(z, B, groups=k)

As a matrix the weight is (out, in * kernel), which is how A and ΔW are stored and saved: A (k, in * kernel / k, r).
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from gralora.config import GraloraConfig
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import held
from gralora.layers.in_place import InPlaceLayer
from gralora.maths import functional
from gralora.maths.functional import Tensors

_CONV: Any = (F.conv1d, F.conv2d, F.conv3d)
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_ConvNd = nn.modules.conv._ConvNd


class GraloraConv(InPlaceLayer):
    """A convolution with GraLoRA adapters; see the text of this file. Any kernel, stride, padding and dilation, one group.

    `adapted_class(nn.Conv2d)` and so on are its classes; it is built from a convolution that exists.
    """

    what = "convolution"
    in_all_linear = False
    batch_axis = 0

    @classmethod
    def from_conv(
        cls, conv: nn.Module, config: GraloraConfig | None = None, *, adapter_name: str = "default"
    ) -> GraloraConv:
        """A `GraloraConv` over the very weight and bias of `conv` (shared, and frozen); `conv` keeps its class."""
        return cls._adapting(conv, config, adapter_name)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, (*_PLAIN, *_TRANSPOSED))

    def plain_forward(self, x: Tensor) -> Tensor:
        return self._conv._conv_forward(x, held(self, "weight"), held(self, "bias"))

    @classmethod
    def is_plain(cls) -> bool:
        return any(cls._base_class.forward is each.forward for each in _PLAIN)

    @classmethod
    def unfit(cls, module: nn.Module, part: str) -> str | None:
        conv = cast(_ConvNd, module)
        if isinstance(conv, _TRANSPOSED):
            return f"is a transposed convolution ({type(conv).__name__}), which cannot be adapted"
        if conv.groups != 1:
            return f"is a convolution of {conv.groups} groups; only those of one group can be adapted"
        return None

    @classmethod
    def matrix(cls, module: nn.Module, part: str, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @classmethod
    def in_layout(cls, module: nn.Module, part: str, delta: Tensor) -> Tensor:
        return delta.reshape(cls.shape(module, part))

    @classmethod
    def sizes(cls, module: nn.Module, part: str) -> tuple[int, int]:
        conv = cast(_ConvNd, module)
        return conv.in_channels * math.prod(conv.kernel_size), conv.out_channels

    @classmethod
    def cut(cls, module: nn.Module, part: str) -> tuple[int, int]:
        conv = cast(_ConvNd, module)
        return conv.in_channels, conv.out_channels

    @classmethod
    def shape(cls, module: nn.Module, part: str) -> tuple[int, ...]:
        conv = cast(_ConvNd, module)
        return conv.out_channels, conv.in_channels, *conv.kernel_size

    def fast(self, x: Tensor, A: Tensor) -> bool:
        return False

    def update(self, x: Tensor, adapter: GraloraAdapter, share: float) -> Tensor:
        """x (b, in, *positions), or without b -> the same of out channels, in the adapter's dtype."""
        return cast(Tensor, adapter(x, share, self._convolved))

    def _convolved(self, x: Tensor, tensors: Tensors, scaling: float, dropout: float) -> Tensor:
        A, B, A_general, B_general = tensors
        k = len(A)
        batched = x.dim() == len(self._conv.kernel_size) + 2
        x = x if batched else x[None]
        z = self._down(functional.dropped(x, dropout), rearrange(A, "i m r -> (i r) m"), k)
        z = rearrange(z, "b (i j s) ... -> b (j i s) ...", i=k, j=k)
        y = self._up(z, rearrange(B, "j r o -> (j o) r"), k)
        if A_general is not None and B_general is not None:
            y = y + self._up(self._down(functional.dropped(x, dropout), A_general, 1), B_general, 1)
        y = y * scaling
        return y if batched else y[0]

    @property
    def _conv(self) -> _ConvNd:
        return cast(_ConvNd, self)

    def _down(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        conv = self._conv
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        kernel = weight.reshape(len(weight), -1, *conv.kernel_size)
        convolve = _CONV[len(conv.kernel_size) - 1]
        return cast(Tensor, convolve(x, kernel, None, conv.stride, padding, conv.dilation, groups))

    def _up(self, z: Tensor, weight: Tensor, groups: int) -> Tensor:
        dimensions = len(self._conv.kernel_size)
        return cast(Tensor, _CONV[dimensions - 1](z, weight[(..., *[None] * dimensions)], groups=groups))

    def probe(self, generator: torch.Generator) -> Tensor:
        conv = self._conv
        size = max(dilation * kernel for dilation, kernel in zip(conv.dilation, conv.kernel_size, strict=True)) + 1
        return torch.randn(2, conv.in_channels, *[size] * len(conv.kernel_size), generator=generator)
