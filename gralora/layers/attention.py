"""`nn.MultiheadAttention`: its q, k and v projections and `out_proj`, each with adapters of its
own.

The attention reads the weights of its projections and calls no layer, so it gets a forward of ours,
which projects with the adapters beside the weights. While none acts, it runs its own.
"""

from __future__ import annotations

import math
from collections.abc import Container
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from gralora.engines.distributed import is_spread
from gralora.layers.adapter import GraloraAdapters
from gralora.layers.class_change import InPlaceModule, change_class, held, restore_class, traced
from gralora.layers.effective_weight import EffectiveWeight, MatrixWeight, Share
from gralora.layers.lazy_weight import is_dense
from gralora.layers.linear_map import PREFIX
from gralora.layers.parts import PartHost, PartLayer, PartMap

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
PACKED = PARTS[:3]
WEIGHTS = ("in_proj_weight", *(f"{part}_weight" for part in PACKED))
READER = "_gralora_reader"


class Projection(PartLayer):
    """One of the four projections of an `nn.MultiheadAttention`, a child of it."""

    @property
    def map(self) -> ProjectionMap:
        return ProjectionMap(self.host, self.part)

    def detach(self) -> None:
        super().detach()
        if self.part == "out_proj":
            out_proj = self.map.module.out_proj
            if isinstance(out_proj, ReadProjection):
                out_proj.__dict__.pop(READER, None)
                restore_class(out_proj)

    @property
    def acts(self) -> bool:
        """Whether some adapter changes what this projection computes now."""
        adapters = self.gralora_adapters
        return bool(adapters.applied_in(adapters.mode))

    def forward(self, x: Tensor, dim: int | None) -> Tensor:
        """x (..., in) -> (..., out); the batch is on axis `dim`."""
        base = partial(F.linear, x, *self._weight_and_bias())
        y: Tensor = self.apply_adapters(x, base, plain=self.plain(), dim=dim)
        return y

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        weight, bias = self._weight_and_bias()
        return (weight, bias) if type(weight) in (nn.Parameter, Tensor) else None

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        return MatrixWeight(weight, shares)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        own = self.map
        bias: Tensor | None = held(*own.bias_place)
        return own.matrix(own.weight), None if bias is None else own.bias_part(bias)


class ProjectionMap(PartMap):
    """The map of one projection of an `nn.MultiheadAttention`."""

    module: nn.MultiheadAttention
    kind = "attention"

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, nn.MultiheadAttention)

    @classmethod
    def parts_of(cls, module: nn.Module) -> tuple[str, ...]:
        return PARTS

    @property
    def place(self) -> tuple[nn.Module, str]:
        if self.part == "out_proj":
            return self.module.out_proj, "weight"
        return self.module, "in_proj_weight" if self._packed else f"{self.part}_weight"

    @property
    def bias_place(self) -> tuple[nn.Module, str]:
        if self.part == "out_proj":
            return self.module.out_proj, "bias"
        return self.module, "in_proj_bias"

    @property
    def sizes(self) -> tuple[int, int]:
        inputs = {"k_proj": self.module.kdim, "v_proj": self.module.vdim}
        return inputs.get(self.part, self.module.embed_dim), self.module.embed_dim

    @property
    def has_rows(self) -> bool:
        return True

    def matrix(self, weight: Tensor) -> Tensor:
        return third(weight, self.part) if self._packed else weight

    def reason_unfit(self) -> str | None:
        own = getattr(type(self.module), "_base_class", type(self.module)).forward
        if own is not nn.MultiheadAttention.forward:
            return (
                "is a projection of an nn.MultiheadAttention with a forward of its own, which reads"
                " the weight and never calls it: no effect"
            )
        adapted = isinstance(self.module, GraloraMultiheadAttention)
        if "forward" in self.module.__dict__ and not adapted:
            return (
                "is a projection of an attention whose forward was replaced (by accelerate?):"
                " inject first"
            )
        return super().reason_unfit()

    def attach(self) -> GraloraAdapters:
        if not isinstance(self.module, GraloraMultiheadAttention):
            change_class(self.module, GraloraMultiheadAttention)
            for part in PARTS:
                self.module.add_module(PREFIX + part, Projection(self.module, part))
            change_class(self.module.out_proj, ReadProjection).__dict__[READER] = self.module
        layer = self.module.get_submodule(PREFIX + self.part)
        assert isinstance(layer, Projection)
        return layer.gralora_adapters

    def bias_part(self, bias: Tensor) -> Tensor:
        return bias if self.part == "out_proj" else third(bias, self.part)

    @property
    def _packed(self) -> bool:
        """Whether the weight is the third of `in_proj_weight`."""
        return self.part != "out_proj" and held(self.module, "in_proj_weight") is not None


class ReadProjection(InPlaceModule):
    """Mixin of the `out_proj` of an attention: who reads its weight from outside reads what
    acts.
    """

    _prefix = "Read"

    @property
    def effective_names(self) -> Container[str]:
        return ("weight", "bias")

    def effective_parameter(self, name: str, value: Tensor) -> Tensor:
        attention = self.__dict__.get(READER)
        if attention is None or name not in self.effective_names:
            return value
        projection: Projection = attention.get_submodule(PREFIX + "out_proj")
        return projection.read(value) if name == "weight" else projection.read_bias(value)


class GraloraMultiheadAttention(PartHost):
    """Mixin of an `nn.MultiheadAttention` whose projections can have adapters."""

    gralora_q_proj: Projection
    gralora_k_proj: Projection
    gralora_v_proj: Projection
    gralora_out_proj: Projection

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ReadProjection):
            value.__dict__[READER] = self

    @property
    def effective_names(self) -> Container[str]:
        return (*WEIGHTS, "in_proj_bias")

    def effective_parameter(self, name: str, value: Tensor) -> Tensor:
        if name not in self.effective_names or not (is_dense(value) or is_spread(value)):
            return value
        packed = name in (WEIGHTS[0], "in_proj_bias")
        parts = PACKED if packed else (name.removesuffix("_weight"),)
        readers = [self._reader(part) for part in parts]
        in_use = [reader for reader in readers if reader is not None]
        if not in_use:
            return value
        if not packed or is_spread(value):  # a sharded weight is not divided
            return in_use[0].read(value)
        read = Projection.read_bias if name == "in_proj_bias" else Projection.read
        thirds = [third(value, part) for part in PACKED]
        found = [
            own if reader is None else read(reader, own)
            for own, reader in zip(thirds, readers, strict=True)
        ]
        unread = all(part is own for part, own in zip(found, thirds, strict=True))
        return value if unread else torch.cat(found)

    def _reader(self, part: str) -> Projection | None:
        """The projection, if an adapter changes what it computes."""
        projection = self._modules.get(PREFIX + part)
        return projection if isinstance(projection, Projection) and projection.acts else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if isinstance(query, Proxy):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            node: tuple[Tensor, Tensor | None] = traced(self, (query, key, value, *masks), {})
            return node
        projections = (
            *(self.gralora_q_proj, self.gralora_k_proj, self.gralora_v_proj),
            self.gralora_out_proj,
        )
        if not any(projection.acts for projection in projections):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            base: tuple[Tensor, Tensor | None] = self.base_forward(query, key, value, *masks)
            return base
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask, which must be given with it."
            )
        attention = self.gralora_q_proj.map.module
        batched = query.dim() == 3
        first = attention.batch_first or not batched
        dim = 0 if first else 1
        inputs = (query, key, value) if batched else (query[None], key[None], value[None])
        q, k, v = (project(x, dim) for project, x in zip(projections, inputs, strict=False))
        q, k, v = (x if first else x.transpose(0, 1) for x in (q, k, v))
        padding = (
            key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None]
        )
        hinted = (
            is_causal and padding is None and not need_weights
        )  # then the hint stands for the mask, as in PyTorch
        mask = None if hinted else _mask(attention, q, padding, attn_mask)
        out, weights = _attend(attention, q, k, v, mask, need_weights, hinted)
        out = projections[3](out if first else out.transpose(0, 1), dim)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        return out, weights


def third(packed: Tensor, part: str) -> Tensor:
    """The part's share of what is packed for q, k and v along the first axis."""
    return packed.view(3, -1, *packed.shape[1:])[PARTS.index(part)]


def _heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b l (h d) -> b h l d", h=heads)


def _mask(
    attention: nn.MultiheadAttention, q: Tensor, padding: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcast to (batch, heads, queries, keys)."""
    total: Tensor | None = None
    if mask is not None:
        mask = _added(mask, q)
        total = (
            rearrange(mask, "(b h) l s -> b h l s", h=attention.num_heads)
            if mask.dim() == 3
            else mask[None, None]
        )
    if padding is not None:
        padding = rearrange(_added(padding, q), "b s -> b 1 1 s")
        total = padding if total is None else total + padding
    more = (
        attention.bias_k is not None
    ) + attention.add_zero_attn  # keys of the attention's own, seen by all
    return F.pad(total, (0, more)) if total is not None and more else total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
    return mask.to(like.dtype)


def _attend(
    attention: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    need_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """q, k, v (b, l, embed) -> (b, l, embed), and the weights (b, heads, l, s) if they are
    needed.
    """
    if attention.bias_k is not None and attention.bias_v is not None:
        k, v = (
            torch.cat([x, repeat(bias, "1 1 e -> b 1 e", b=len(x)).to(x.dtype)], dim=1)
            for x, bias in ((k, attention.bias_k), (v, attention.bias_v))
        )
    if attention.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (_heads(x, attention.num_heads) for x in (q, k, v))
    dropout = attention.dropout if attention.training else 0.0
    weights: Tensor | None = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / attention.head_dim)) @ k.mT
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    return rearrange(out, "b h l d -> b l (h d)"), weights
