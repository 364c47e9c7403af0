"""`GraloraEmbedding`: `nn.Embedding`, a linear map of one-hot rows.

The weight (V, H), a row for every token, is cut as that of the head which it is often tied to: V
outputs, H inputs. So one adapter serves both, and B, which is zero at the start, lies on the side
of the tokens. A token costs a look-up in the one block row of B that holds it and one small product
with A; ΔW is never made.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from gralora.config import GraloraConfig
from gralora.engines.distributed import is_spread
from gralora.layers.adapter import GraloraAdapter, Shares
from gralora.layers.class_change import held, traced
from gralora.layers.effective_weight import EffectiveWeight, Share
from gralora.layers.in_place import InPlaceLayer, InPlaceMap
from gralora.layers.linear import LinearWeight
from gralora.layers.running import forward_runs
from gralora.maths import functional
from gralora.maths.functional import Tensors


class GraloraEmbedding(InPlaceLayer):
    """An embedding with GraLoRA adapters; see the text of this file. `adapted_class(nn.Embedding)`
    is its class.

    A subclass with a forward of its own, such as one that scales, computes what it does with W +
    ΔW. Dropout falls on whole tokens, the inputs. The row of `padding_idx` is not trained.
    """

    num_embeddings: int
    padding_idx: int | None

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        config: GraloraConfig | None = None,
        *,
        adapter_name: str = "default",
    ) -> GraloraEmbedding:
        """A `GraloraEmbedding` over the very weight of `embedding` (shared, and frozen), which
        keeps its class.
        """
        return cls._adapting(EmbeddingMap(embedding), config, adapter_name)

    @property
    def map(self) -> EmbeddingMap:
        return EmbeddingMap(self)

    @classmethod
    def is_plain(cls) -> bool:
        return cls._base_class.forward is nn.Embedding.forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """tokens (...), and whatever else the base layer takes -> (..., H)."""
        tokens = args[0] if len(args) == 1 and not kwargs else self.input_of(args, kwargs)
        if isinstance(tokens, Proxy):
            return cast(Tensor, traced(self, args, kwargs))
        if self.map.packed or is_spread(held(self, "weight")):  # the base alone can look up
            base = partial(self.own_forward, *args, **kwargs)
            y: Tensor = self.apply_adapters(tokens[..., None], base)
            return y
        if self.is_plain() and "_base_instance_forward" not in self.__dict__:
            return self.look_up(held(self, "weight"), tokens, self.padding_idx)
        return cast(Tensor, self.base_forward(*args, **kwargs))  # which reads W + ΔW

    def is_read(self, weight: Tensor) -> bool:
        return torch.compiler.is_compiling() or forward_runs(None)

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        return EmbeddingWeight(self, weight, shares)

    def can_fuse(self, x: Tensor, applied: Shares) -> bool:
        return x.is_floating_point() and super().can_fuse(x, applied)

    def update(self, x: Tensor, adapter: GraloraAdapter, share: float) -> Tensor:
        """x: tokens (..., 1) -> (..., H); or as a head's input, (..., H) -> (..., V)."""
        update: Tensor = adapter(x, share, None if x.is_floating_point() else self._rows)
        return update

    def look_up(self, weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
        # an axis more, so that what is said of the axes of inputs holds for tokens too
        base = partial(F.embedding, tokens, weight, padding_idx)
        return cast(Tensor, self.apply_adapters(tokens[..., None], base))

    def _rows(self, x: Tensor, tensors: Tensors, scaling: float, dropout: float) -> Tensor:
        size, held_rows = self.num_embeddings, tensors[1].shape[0] * tensors[1].shape[2]
        if size != held_rows:
            raise ValueError(
                f"{self} has {size} tokens, and its adapter is for {held_rows}: it has been resized"
                " since. First resize, then inject."
            )
        padding = self.padding_idx
        return functional.gralora_rows(
            x[..., 0], *tensors, scaling=scaling, dropout=dropout, padding=padding
        )

    def probe(self, generator: torch.Generator) -> Tensor | None:
        return None  # whatever its forward does, it does with W + ΔW


class EmbeddingMap(InPlaceMap):
    """The map of an `nn.Embedding`: (tokens, width) as (out, in)."""

    module: nn.Embedding
    layer_class = GraloraEmbedding
    kind = "embedding"
    in_all_linear = False

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, nn.Embedding)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.module.embedding_dim, self.module.num_embeddings

    def reason_unfit(self) -> str | None:
        if self.module.max_norm is not None:
            return (
                f"has max_norm={self.module.max_norm}: its forward rewrites the weight, which an"
                " adapter must not"
            )
        if self.module.scale_grad_by_freq:
            return "has scale_grad_by_freq=True, which an adapter's gradients do not know"
        return super().reason_unfit()


class EmbeddingWeight(LinearWeight):
    """The effective weight of an embedding: that of a head, and of a look-up."""

    layer: GraloraEmbedding

    def embedding(self, tokens: Tensor, padding_idx: int | None) -> Tensor | None:
        return None if self.transposed else self.layer.look_up(self.weight, tokens, padding_idx)
