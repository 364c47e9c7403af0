"""`GraloraConv` and `GraloraConvTranspose`: convolutions in 1, 2 and 3 dimensions.

The same method on channels. The down-projection is a grouped convolution with the layer's own
kernel, the regrouping acts on channels, the up-projection is a grouped 1x1 convolution:

    z = conv(x, A, groups=k)       "b (i j s) p -> b (j i s) p"       y += scaling * conv1x1(z, B,
    groups=k)

As a matrix the weight is (out, in * kernel), which is how A and ΔW are stored and saved: A (k, in *
kernel / k, r). A transposed convolution has its kernel on the way up: z = conv1x1(x, A), y +=
scaling * conv_transpose(z, B), the matrix is (out * kernel, in). A convolution of g groups is g
maps of (out / g, in / g * kernel), each with a pair of its own on a leading axis, as experts have;
all of them run in one grouped convolution of g * k groups.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from gralora.config import GraloraConfig
from gralora.layers.adapter import GraloraAdapter, Shares
from gralora.layers.class_change import held, traced
from gralora.layers.in_place import InPlaceLayer
from gralora.maths import functional
from gralora.maths.functional import Tensors

_CONV: Any = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_ConvNd = nn.modules.conv._ConvNd


class GraloraConv(InPlaceLayer):
    """A convolution with GraLoRA adapters; see the text of this file. Any kernel, stride, padding,
    dilation and groups.

    `adapted_class(nn.Conv2d)` and so on are its classes; it is built from a convolution that
    exists.
    """

    what = "convolution"
    in_all_linear = False
    batch_axis = 0

    @classmethod
    def from_conv(
        cls, conv: nn.Module, config: GraloraConfig | None = None, *, adapter_name: str = "default"
    ) -> GraloraConv:
        """A `GraloraConv` over the very weight and bias of `conv` (shared, and frozen); `conv`
        keeps its class.
        """
        return cls._adapting(conv, config, adapter_name)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, _PLAIN)

    def plain_forward(self, input: Tensor) -> Tensor:
        return self._conv._conv_forward(input, held(self, "weight"), held(self, "bias"))

    @classmethod
    def is_plain(cls) -> bool:
        return any(cls._base_class.forward is each.forward for each in _PLAIN)

    @classmethod
    def matrix(cls, module: nn.Module, part: str, weight: Tensor) -> Tensor:
        groups = cast(_ConvNd, module).groups
        return (
            weight.flatten(1)
            if groups == 1
            else rearrange(weight.flatten(1), "(g o) m -> g o m", g=groups)
        )

    @classmethod
    def in_layout(cls, module: nn.Module, part: str, delta: Tensor) -> Tensor:
        return delta.reshape(cls.shape(module, part))

    @classmethod
    def sizes(cls, module: nn.Module, part: str) -> tuple[int, int]:
        n_in, n_out = cls.cut(module, part)
        return n_in * math.prod(cast(_ConvNd, module).kernel_size), n_out

    @classmethod
    def cut(cls, module: nn.Module, part: str) -> tuple[int, int]:
        conv = cast(_ConvNd, module)
        return conv.in_channels // conv.groups, conv.out_channels // conv.groups

    @classmethod
    def copies(cls, module: nn.Module, part: str) -> int | None:
        groups = cast(_ConvNd, module).groups
        return None if groups == 1 else groups

    @classmethod
    def shape(cls, module: nn.Module, part: str) -> tuple[int, ...]:
        conv = cast(_ConvNd, module)
        return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size

    @classmethod
    def has_rows(cls, module: nn.Module, part: str) -> bool:
        return cast(_ConvNd, module).groups == 1

    def rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A row for every position: what the kernel sees there, and the output channels."""
        spatial = len(self._conv.kernel_size)
        x, y = (t if t.dim() == spatial + 2 else t[None] for t in (x, y))
        n_in = self.sizes(self, "")[0]
        seen = self._down(x, torch.eye(n_in, dtype=x.dtype, device=x.device), 1)
        return rearrange(seen, "b m ... -> (b ...) m"), rearrange(y, "b o ... -> (b ...) o")

    def can_fuse(self, x: Tensor, applied: Shares) -> bool:
        return False

    def update(self, x: Tensor, adapter: GraloraAdapter, share: float) -> Tensor:
        """x (b, in, *positions), or without b -> the same of out channels, in the adapter's
        dtype.
        """
        return cast(Tensor, adapter(x, share, self._convolved))

    def _convolved(self, x: Tensor, tensors: Tensors, scaling: float, dropout: float) -> Tensor:
        A, B, A_general, B_general = tensors
        k, g = A.shape[-3], self._conv.groups
        batched = x.dim() == len(self._conv.kernel_size) + 2
        x = x if batched else x[None]
        z = self._down(
            functional.dropped(x, dropout), rearrange(A, "... i m r -> (... i r) m"), g * k
        )
        z = rearrange(z, "b (g i j s) ... -> b (g j i s) ...", g=g, i=k, j=k)
        y = _pointwise(z, rearrange(B, "... j r o -> (... j o) r"), g * k)
        if A_general is not None and B_general is not None:
            down = self._down(
                functional.dropped(x, dropout), rearrange(A_general, "... h m -> (... h) m"), g
            )
            y = y + _pointwise(down, rearrange(B_general, "... o h -> (... o) h"), g)
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

    def probe(self, generator: torch.Generator) -> Tensor:
        conv = self._conv
        size = (
            max(
                dilation * kernel
                for dilation, kernel in zip(conv.dilation, conv.kernel_size, strict=True)
            )
            + 1
        )
        return torch.randn(
            2, conv.in_channels, *[size] * len(conv.kernel_size), generator=generator
        )


class GraloraConvTranspose(InPlaceLayer):
    """A transposed convolution of one group with GraLoRA adapters; see the text of this file."""

    what = "transposed convolution"
    in_all_linear = False
    batch_axis = 0

    @classmethod
    def from_conv(
        cls, conv: nn.Module, config: GraloraConfig | None = None, *, adapter_name: str = "default"
    ) -> GraloraConvTranspose:
        """A `GraloraConvTranspose` over the very weight and bias of `conv` (shared, and frozen);
        `conv` keeps its class.
        """
        return cls._adapting(conv, config, adapter_name)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, _TRANSPOSED)

    @classmethod
    def is_plain(cls) -> bool:
        return any(cls._base_class.forward is each.forward for each in _TRANSPOSED)

    @classmethod
    def unfit(cls, module: nn.Module, part: str) -> str | None:
        groups = cast(_ConvNd, module).groups
        return (
            f"is a transposed convolution of {groups} groups; only those of one group can be"
            " adapted"
            if groups > 1
            else None
        )

    @classmethod
    def matrix(cls, module: nn.Module, part: str, weight: Tensor) -> Tensor:
        return weight.flatten(1).mT

    @classmethod
    def in_layout(cls, module: nn.Module, part: str, delta: Tensor) -> Tensor:
        return delta.mT.reshape(cls.shape(module, part))

    @classmethod
    def sizes(cls, module: nn.Module, part: str) -> tuple[int, int]:
        conv = cast(_ConvNd, module)
        return conv.in_channels, conv.out_channels * math.prod(conv.kernel_size)

    @classmethod
    def cut(cls, module: nn.Module, part: str) -> tuple[int, int]:
        conv = cast(_ConvNd, module)
        return conv.in_channels, conv.out_channels

    @classmethod
    def shape(cls, module: nn.Module, part: str) -> tuple[int, ...]:
        conv = cast(_ConvNd, module)
        return conv.in_channels, conv.out_channels, *conv.kernel_size

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x (b, in, *positions), output_size -> (b, out, *positions)."""
        x = args[0] if len(args) == 1 and not kwargs else self.input_of(args, kwargs)
        if isinstance(x, Proxy):
            return cast(Tensor, traced(self, args, kwargs))
        plain = self.is_plain() and "_base_instance_forward" not in self.__dict__
        base = partial(self.plain_forward if plain else self.own_forward, *args, **kwargs)
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        update = partial(self.update, output_size=size)
        return cast(Tensor, self.apply_adapters(x, base, dim=self.batch_axis, update=update))

    def plain_forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        batched = input.dim() == len(cast(_ConvNd, self).kernel_size) + 2
        y = self._convolve(
            input if batched else input[None],
            held(self, "weight"),
            held(self, "bias"),
            1,
            output_size,
        )
        return y if batched else y[0]

    def can_fuse(self, x: Tensor, applied: Shares) -> bool:
        return False

    def update(
        self, x: Tensor, adapter: GraloraAdapter, share: float, output_size: Any = None
    ) -> Tensor:
        """x (b, in, *positions), or without b -> the same of out channels, in the adapter's
        dtype.
        """
        return cast(Tensor, adapter(x, share, partial(self._convolved, output_size=output_size)))

    def _convolved(
        self, x: Tensor, tensors: Tensors, scaling: float, dropout: float, output_size: Any
    ) -> Tensor:
        A, B, A_general, B_general = tensors
        k, conv = len(A), cast(_ConvNd, self)
        batched = x.dim() == len(conv.kernel_size) + 2
        x = x if batched else x[None]
        z = _pointwise(functional.dropped(x, dropout), rearrange(A, "i m r -> (i r) m"), k)
        z = rearrange(z, "b (i j s) ... -> b (j i s) ...", i=k, j=k)
        y = self._convolve(z, rearrange(B, "j r o -> (j r) o"), None, k, output_size)
        if A_general is not None and B_general is not None:
            y = y + self._convolve(
                _pointwise(functional.dropped(x, dropout), A_general, 1),
                B_general.mT,
                None,
                1,
                output_size,
            )
        y = y * scaling
        return y if batched else y[0]

    def _convolve(
        self, z: Tensor, weight: Tensor, bias: Tensor | None, groups: int, output_size: Any
    ) -> Tensor:
        """The base's transposed convolution with another weight (channels of z, outputs of a group
        and kernel).
        """
        conv = cast(Any, self)
        dimensions, kernel = (
            len(conv.kernel_size),
            weight.reshape(len(weight), -1, *conv.kernel_size),
        )
        padding = conv._output_padding(
            z, output_size, conv.stride, conv.padding, conv.kernel_size, dimensions, conv.dilation
        )
        convolve = _CONV_TRANSPOSE[dimensions - 1]
        return cast(
            Tensor,
            convolve(z, kernel, bias, conv.stride, conv.padding, padding, groups, conv.dilation),
        )

    def probe(self, generator: torch.Generator) -> Tensor:
        conv = cast(_ConvNd, self)
        return torch.randn(2, conv.in_channels, *[3] * len(conv.kernel_size), generator=generator)


def _pointwise(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A convolution of kernel 1."""
    dimensions = x.dim() - 2
    return cast(
        Tensor, _CONV[dimensions - 1](x, weight[(..., *[None] * dimensions)], groups=groups)
    )
