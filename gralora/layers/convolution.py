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
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from gralora.config import GraloraConfig
from gralora.layers.adapter import GraloraAdapter, Shares
from gralora.layers.class_change import held, traced
from gralora.layers.in_place import InPlaceLayer, InPlaceMap
from gralora.maths import functional
from gralora.maths.functional import Tensors
from gralora.torch_internals import ConvNd

_CONV: Any = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class ConvolutionLayer(InPlaceLayer):
    """What both kinds of convolution share: all but where the kernel is."""

    batch_axis = 0
    originals: ClassVar[tuple[type[ConvNd], ...]]

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]

    @classmethod
    def is_plain(cls) -> bool:
        return any(cls._base_class.forward is original.forward for original in cls.originals)

    def can_fuse(self, x: Tensor, applied: Shares) -> bool:
        return False

    def add_to_output(self, y: Tensor, bias: Tensor | None) -> Tensor:
        own = None if bias is None else bias[(..., *[None] * len(self.kernel_size))]
        return super().add_to_output(y, own)

    def update(
        self, x: Tensor, adapter: GraloraAdapter, share: float, output_size: Any = None
    ) -> Tensor:
        """x (b, in, *positions), or without b -> the same of out channels, in the adapter's
        dtype.
        """
        update: Tensor = adapter(x, share, partial(self._convolved, output_size=output_size))
        return update

    def _convolved(
        self, x: Tensor, tensors: Tensors, scaling: float, dropout: float, output_size: Any
    ) -> Tensor:
        A, B, A_general, B_general = tensors
        batched = self._is_batched(x)
        x = x if batched else x[None]
        k = A.shape[-3]
        z = self._down(functional.dropped(x, dropout), _stacked(A))
        z = rearrange(z, "b (g i j s) ... -> b (g j i s) ...", i=k, j=k, s=A.shape[-1] // k)
        y = self._up(z, _stacked(B), output_size)
        if A_general is not None and B_general is not None:
            z = self._down(functional.dropped(x, dropout), _stacked(A_general.mT))
            y = y + self._up(z, _stacked(B_general.mT), output_size)
        y = y * scaling
        return y if batched else y[0]

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        """x (b, n * m, *positions) through A (n, m, r), in n groups; m includes the kernel of a
        `GraloraConv`.
        """
        raise NotImplementedError

    def _up(self, z: Tensor, B: Tensor, output_size: Any) -> Tensor:
        """z (b, n * r, *positions) through B (n, r, o), in n groups; o includes the kernel of a
        `GraloraConvTranspose`.
        """
        raise NotImplementedError

    def _is_batched(self, x: Tensor) -> bool:
        return x.dim() == len(self.kernel_size) + 2

    def probe(self, generator: torch.Generator) -> Tensor:
        reach = zip(self.dilation, self.kernel_size, strict=True)
        size = max(dilation * kernel for dilation, kernel in reach) + 1
        return torch.randn(
            2, self.in_channels, *[size] * len(self.kernel_size), generator=generator
        )


class GraloraConv(ConvolutionLayer):
    """A convolution with GraLoRA adapters; see the text of this file. Any kernel, stride, padding,
    dilation and groups.

    `adapted_class(nn.Conv2d)` and so on are its classes; it is built from a convolution that
    exists.
    """

    originals = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    padding_mode: str

    @classmethod
    def from_conv(
        cls, conv: nn.Module, config: GraloraConfig | None = None, *, adapter_name: str = "default"
    ) -> GraloraConv:
        """A `GraloraConv` over the very weight and bias of `conv` (shared, and frozen); `conv`
        keeps its class.
        """
        return cls._adapting(ConvMap(conv), config, adapter_name)

    @property
    def map(self) -> ConvMap:
        return ConvMap(self)

    def plain_forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, held(self, "weight"), held(self, "bias"))
        return y

    def rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A row for every position: what the kernel sees there, and the output channels."""
        x, y = (t if self._is_batched(t) else t[None] for t in (x, y))
        unit = torch.eye(self.map.sizes[0], dtype=x.dtype, device=x.device)
        seen = self._down(x, unit[None])
        return rearrange(seen, "b m ... -> (b ...) m"), rearrange(y, "b o ... -> (b ...) o")

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        kernel = _with_axes(rearrange(A, "n m r -> (n r) m"), self.kernel_size)
        convolve = _CONV[len(self.kernel_size) - 1]
        z: Tensor = convolve(x, kernel, None, self.stride, padding, self.dilation, len(A))
        return z

    def _up(self, z: Tensor, B: Tensor, output_size: Any) -> Tensor:
        return _pointwise(z, rearrange(B, "n r o -> (n o) r"), len(B))


class GraloraConvTranspose(ConvolutionLayer):
    """A transposed convolution of one group with GraLoRA adapters; see the text of this file."""

    originals = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @classmethod
    def from_conv(
        cls, conv: nn.Module, config: GraloraConfig | None = None, *, adapter_name: str = "default"
    ) -> GraloraConvTranspose:
        """A `GraloraConvTranspose` over the very weight and bias of `conv` (shared, and frozen);
        `conv` keeps its class.
        """
        return cls._adapting(ConvTransposeMap(conv), config, adapter_name)

    @property
    def map(self) -> ConvTransposeMap:
        return ConvTransposeMap(self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x (b, in, *positions), output_size -> (b, out, *positions)."""
        x = args[0] if len(args) == 1 and not kwargs else self.input_of(args, kwargs)
        if isinstance(x, Proxy):
            node: Tensor = traced(self, args, kwargs)
            return node
        plain = self.is_plain() and "_base_instance_forward" not in self.__dict__
        base = partial(self.plain_forward if plain else self.own_forward, *args, **kwargs)
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        update = partial(self.update, output_size=size)
        y: Tensor = self.apply_adapters(x, base, dim=self.batch_axis, update=update)
        return y

    def plain_forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        batched = self._is_batched(input)
        weight, bias = held(self, "weight"), held(self, "bias")
        y = self._transposed(input if batched else input[None], weight, bias, 1, output_size)
        return y if batched else y[0]

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return _pointwise(x, rearrange(A, "n m r -> (n r) m"), len(A))

    def _up(self, z: Tensor, B: Tensor, output_size: Any) -> Tensor:
        kernel = _with_axes(rearrange(B, "n r o -> (n r) o"), self.kernel_size)
        return self._transposed(z, kernel, None, len(B), output_size)

    def _transposed(
        self, z: Tensor, kernel: Tensor, bias: Tensor | None, groups: int, output_size: Any
    ) -> Tensor:
        """The base's transposed convolution with another kernel, and in other groups."""
        own, dimensions = (self.stride, self.padding), len(self.kernel_size)
        padding = self._output_padding(
            z, output_size, *own, self.kernel_size, dimensions, self.dilation
        )
        convolve = _CONV_TRANSPOSE[dimensions - 1]
        y: Tensor = convolve(z, kernel, bias, *own, padding, groups, self.dilation)
        return y


class ConvolutionMap(InPlaceMap):
    """The map of a convolution: its channels, and its kernel on one side of them."""

    module: ConvNd
    layer_class: ClassVar[type[ConvolutionLayer]]
    in_all_linear = False

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, cls.layer_class.originals)

    @property
    def divided_sizes(self) -> tuple[int, int]:
        groups = self.module.groups
        return self.module.in_channels // groups, self.module.out_channels // groups


class ConvMap(ConvolutionMap):
    """(out, in * kernel) of each group."""

    layer_class = GraloraConv
    kind = "convolution"

    @property
    def sizes(self) -> tuple[int, int]:
        n_in, n_out = self.divided_sizes
        return n_in * math.prod(self.module.kernel_size), n_out

    @property
    def copies(self) -> int | None:
        return None if self.module.groups == 1 else self.module.groups

    @property
    def shape(self) -> tuple[int, ...]:
        return self.module.out_channels, self.divided_sizes[0], *self.module.kernel_size

    @property
    def has_rows(self) -> bool:
        return self.module.groups == 1

    def matrix(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return rows if self.copies is None else rearrange(rows, "(g o) m -> g o m", g=self.copies)

    def in_layout(self, delta: Tensor) -> Tensor:
        return delta.reshape(self.shape)


class ConvTransposeMap(ConvolutionMap):
    """(out * kernel, in)."""

    layer_class = GraloraConvTranspose
    kind = "transposed convolution"

    @property
    def sizes(self) -> tuple[int, int]:
        n_in, n_out = self.divided_sizes
        return n_in, n_out * math.prod(self.module.kernel_size)

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.divided_sizes, *self.module.kernel_size

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).mT

    def in_layout(self, delta: Tensor) -> Tensor:
        return delta.mT.reshape(self.shape)

    def reason_unfit(self) -> str | None:
        if self.module.groups > 1:
            return (
                f"is a transposed convolution of {self.module.groups} groups; only those of one"
                " group can be adapted"
            )
        return super().reason_unfit()


def _stacked(tensor: Tensor) -> Tensor:
    """(..., a, b) -> (n, a, b)."""
    return tensor.reshape(-1, *tensor.shape[-2:])


def _with_axes(matrix: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
    """(a, channels * kernel) -> (a, channels, *kernel)."""
    return matrix.reshape(len(matrix), -1, *kernel_size)


def _pointwise(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A convolution of kernel 1."""
    dimensions = x.dim() - 2
    y: Tensor = _CONV[dimensions - 1](x, weight[(..., *[None] * dimensions)], groups=groups)
    return y
