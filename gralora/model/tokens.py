"""Tokens that are trained whole, while the rest of their embedding stays frozen:
`trainable_token_indices`.

To the model it is a saved module (`saved.py`) whose copy holds some rows alone. A head that is tied
to the embedding follows it: there the same rows are outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gralora.engines.distributed import is_spread
from gralora.engines.walk import modules
from gralora.layers.class_change import InPlaceModule
from gralora.layers.effective_weight import EffectiveWeight
from gralora.layers.lazy_weight import read_as
from gralora.layers.running import forward_runs
from gralora.model.partial_copies import PartialCopy

ROWS, INDICES = "trainable_tokens", "token_indices"
"""Behind the embedding's name, the keys of `adapter_state_dict` and of a file."""


class TokenRows(PartialCopy):
    """Rows of one embedding that an adapter trains: `trainable_tokens` (n, H) stands in for its
    rows `token_indices` (n).
    """

    trainable_tokens: nn.Parameter
    token_indices: Tensor

    def __init__(self, weight: Tensor, indices: Tensor) -> None:
        super().__init__()
        self.trainable_tokens = nn.Parameter(weight.detach()[indices].clone())
        self.register_buffer(INDICES, indices)

    def call(self, owner: InPlaceModule, *args: Any, **kwargs: Any) -> Any:
        weight, forward = cast(Tensor, owner._parameters["weight"]), owner._base_class.forward
        if len(args) == 1 and not kwargs:
            if forward is nn.Embedding.forward:
                return self.look_up(weight, args[0], cast(nn.Embedding, owner).padding_idx)
            if forward is nn.Linear.forward:
                return self.product(weight, args[0], cast(nn.Linear, owner).bias)
        return super().call(owner, *args, **kwargs)

    def read(self, name: str, value: Tensor) -> Tensor:
        """The weight as code outside the module sees it: with these rows while a forward runs."""
        inside = torch.compiler.is_compiling() or forward_runs(None)
        return read_as(RowsWeight(value, self)) if name == "weight" and inside else value

    @property
    def rows(self) -> nn.Parameter:
        return self.trainable_tokens

    @property
    def indices(self) -> Tensor:
        return self.token_indices

    def put_into(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The weight (V, H) with `rows` in it."""
        return weight.index_copy(0, self.indices, rows.to(weight.dtype))

    def look_up(self, weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
        """tokens (...) -> (..., H)."""
        order = self.indices.argsort()
        place = torch.searchsorted(self.indices[order], tokens).clamp_max(len(order) - 1)
        mine = order[place]
        own = F.embedding(mine, self.rows).to(weight.dtype)
        if padding_idx is not None:
            own = torch.where((tokens == padding_idx)[..., None], own.detach(), own)
        return torch.where(
            (self.indices[mine] == tokens)[..., None], own, F.embedding(tokens, weight, padding_idx)
        )

    def product(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., H) -> (..., V), as of a head."""
        own = F.linear(x, self.rows.to(x.dtype), None if bias is None else bias[self.indices])
        y = F.linear(x, weight, bias)
        return y.index_copy(-1, self.indices, own.to(y.dtype))


class RowsWeight(EffectiveWeight):
    """The weight (V, H) of an embedding, or of a head that is tied to it, with trained rows."""

    def __init__(self, weight: Tensor, copies: TokenRows) -> None:
        super().__init__(weight)
        self.copies = copies

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.weight, self.copies.rows

    def evaluate(self, weight: Tensor, *tensors: Tensor) -> Tensor:
        return self.copies.put_into(weight, *tensors)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.copies.product(self.weight, x, bias)

    def embedding(self, tokens: Tensor, padding_idx: int | None) -> Tensor:
        return self.copies.look_up(self.weight, tokens, padding_idx)


class TiedRows(TokenRows):
    """The same rows in a module that is tied to the embedding; it holds no tensor of its own."""

    def __init__(self, leader: TokenRows) -> None:
        PartialCopy.__init__(self)
        self.__dict__["leader"] = leader

    @property
    def rows(self) -> nn.Parameter:
        return cast(TokenRows, self.__dict__["leader"]).trainable_tokens

    @property
    def indices(self) -> Tensor:
        return cast(TokenRows, self.__dict__["leader"]).token_indices


Wanted = tuple[int, ...] | tuple[tuple[str, tuple[int, ...]], ...]


def wanted_tokens(
    model: nn.Module, wanted: Wanted, names: Mapping[str, nn.Module]
) -> dict[str, tuple[int, ...]]:
    """The embeddings that `trainable_token_indices` means, by name, with their tokens.

    Args:
        names: of all modules.

    Raises:
        ValueError: no embedding is meant, or not one alone; a token is out of range; the weight
            can't be reached.
    """
    embeddings = {name: m for name, m in names.items() if isinstance(m, nn.Embedding)}
    known = ", ".join(map(repr, embeddings)) or "none"
    if all(isinstance(index, int) for index in wanted):
        found = {_input_embedding(model, embeddings, known): cast(tuple[int, ...], wanted)}
    else:
        found = {}
        for key, tokens in cast(tuple[tuple[str, tuple[int, ...]], ...], wanted):
            own = [name for name in names if name == key or name.endswith(f".{key}")]
            if not own:
                raise ValueError(
                    f"trainable_token_indices names {key!r}, which this model lacks. Its"
                    f" embeddings: {known}."
                )
            found.update(dict.fromkeys(own, tokens))
    for name, tokens in found.items():
        check_tokens(name, names[name], tokens, known)
    return found


def check_tokens(name: str, module: nn.Module, tokens: tuple[int, ...], known: str) -> None:
    """Raise ValueError unless these are rows of an embedding that can be trained."""
    if not isinstance(module, nn.Embedding):
        raise ValueError(
            f"trainable_token_indices names {name!r}, a {type(module).__name__}. Legal are"
            f" embeddings ({known}); a head that is tied to one follows it."
        )
    if module.max_norm is not None:
        raise ValueError(
            f"{name!r} has max_norm={module.max_norm}: its forward rewrites the weight."
        )
    weight = module._parameters.get("weight")
    if (
        weight is None
        or type(weight) is not nn.Parameter
        or is_spread(weight)
        or not weight.is_floating_point()
    ):
        raise ValueError(
            f"the weight of {name!r} is quantised, parametrised or spread: single tokens can't be"
            " trained."
        )
    bad = [index for index in tokens if not 0 <= index < module.num_embeddings]
    if bad:
        raise ValueError(
            f"token {bad[0]} is out of range: {name!r} has tokens 0 to {module.num_embeddings - 1}."
        )


def tied_to(model: nn.Module, embedding: nn.Module) -> Iterator[nn.Module]:
    """Other modules that hold the very weight of an embedding."""
    weight = embedding._parameters["weight"]
    for module in modules(model):
        if module is not embedding and module._parameters.get("weight") is weight:
            yield module


def _input_embedding(model: nn.Module, embeddings: Mapping[str, nn.Module], known: str) -> str:
    try:
        of_model: object = (
            cast(Any, model).get_input_embeddings()
            if hasattr(model, "get_input_embeddings")
            else None
        )
    except (NotImplementedError, AttributeError):
        of_model = None
    found = [name for name, module in embeddings.items() if module is of_model] or list(embeddings)
    if len(found) != 1:
        raise ValueError(
            "trainable_token_indices is a list, and which embedding it means can't be known; there"
            f" are: {known}. Give a mapping from names to lists."
        )
    return found[0]
