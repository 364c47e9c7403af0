"""`GraloraAdapter`: everything about one adapter on one linear map; `GraloraAdapters`: those of one
map by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from gralora.config import GraloraConfig, legal_k
from gralora.engines.distributed import copy_into, is_spread, spread_like, spread_update, whole
from gralora.engines.offload import HOOK, bring_back
from gralora.layers.class_change import LOADED
from gralora.layers.scope import Mode, Only, Rows, Switchable
from gralora.maths import functional
from gralora.maths.functional import Tensors
from gralora.maths.starts import orthonormal_rows

MERGED = ".merged"
FULL = (torch.float32, torch.float64)
_told: ContextVar[bool] = ContextVar("gralora_told", default=False)
Update = Callable[[Tensor, Tensors, float, float], Tensor]
Shares = tuple[tuple["GraloraAdapter", float], ...]


class GraloraAdapter(nn.Module):
    """One GraLoRA pair, and with `hybrid_r` the plain LoRA pair beside it, for one linear map.

    Shapes: A (k, in / k, r), B (k, r, out / k), A_general (hybrid_r, in), B_general (out,
    hybrid_r); with `copies`, that many of each, on a leading axis. `bias` is what is added to the
    bias of the map, and zero at the start.

    Args:
        bias: the shape of the map's bias, if it is trained.
        copies: how many maps of one shape lie in one weight, as a mixture of experts has them; None
            for a single one.
        dtype: of the parameters.
        init_dtype: initial values are rounded to this type first, as PEFT does with a
            half-precision base.
        reset: False leaves the values unset and draws no random number, for a caller that loads
            them.

    Raises:
        ValueError: `config.gralora_k` does not divide both sizes.
    """

    A: nn.Parameter
    B: nn.Parameter
    A_general: nn.Parameter | None
    B_general: nn.Parameter | None
    bias: nn.Parameter | None
    config: GraloraConfig
    init_dtype: torch.dtype | None
    roomy: bool = False  # `prepare_hotswap` has made it a place for others

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: GraloraConfig,
        *,
        copies: int | None = None,
        bias: tuple[int, ...] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        init_dtype: torch.dtype | None = None,
        reset: bool = True,
    ) -> None:
        super().__init__()
        k, r, hybrid_r = config.gralora_k, config.r, config.hybrid_r
        if in_features % k or out_features % k:
            raise ValueError(
                f"gralora_k={k} does not divide in_features={in_features} and"
                f" out_features={out_features} (r={r}). Legal here:"
                f" {legal_k(in_features, out_features, r)}."
            )

        def empty(*shape: int) -> nn.Parameter:
            shape = shape if copies is None else (copies, *shape)
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.__dict__.update(
            config=config, init_dtype=init_dtype
        )  # past nn.Module's __setattr__, which is slow
        self._parameters["A"] = empty(k, in_features // k, r)
        self._parameters["B"] = empty(k, r, out_features // k)
        self._parameters["A_general"] = empty(hybrid_r, in_features) if hybrid_r else None
        self._parameters["B_general"] = empty(out_features, hybrid_r) if hybrid_r else None
        zeros = None if bias is None else torch.zeros(bias, device=device, dtype=dtype)
        self._parameters["bias"] = None if zeros is None else nn.Parameter(zeros)
        if reset:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A from kaiming_uniform(a=√5), block by block as (r, in / k), B zero, or what else
        `init_weights` says.

        Drawn on the CPU in the default dtype, whatever the adapter's own: one seed gives the same
        values on every device, and PEFT's very values where hybrid_r = 0.
        """
        if self.A.is_meta:
            self.__dict__["raw"] = True
            return
        self.has_values()
        if is_spread(self.A):
            plain = [
                t if t is None else torch.empty(t.shape, device=t.device, dtype=t.dtype)
                for t in self.tensors
            ]
            self._reset(*cast(Tensors, tuple(plain)))
            for own, values in zip(self.tensors, plain):
                if own is not None and values is not None:
                    copy_into(own, values)
            return
        for tensors in each(self.tensors) if self.A.dim() > 3 else [self.tensors]:
            self._reset(*tensors)
        if self.bias is not None:
            self.bias.zero_()

    def spread_like(self, weight: Tensor, transposed: bool) -> None:
        """Spread the parameters over processes, as `weight` is that they adapt."""
        own = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        for name, tensor in spread_like(weight, transposed, self.config.gralora_k, own).items():
            self._parameters[name] = nn.Parameter(tensor)

    def _reset(
        self, A: Tensor, B: Tensor, A_general: Tensor | None, B_general: Tensor | None
    ) -> None:
        (k, m, r), o = A.shape, B.shape[-1]
        start = self.config.init_weights
        if start == "loftq":
            raise ValueError(
                'init_weights="loftq" takes its values from inject(..., reference=...), and there'
                " is none."
            )
        if start == "orthogonal":
            down = orthonormal_rows(r, k, m)
            B.zero_()
        elif start:
            down = self._round(_kaiming(m, k, r, m))
            B.zero_()
        else:
            pairs = [(_kaiming(m, r, m), _kaiming(r, o, r)) for _ in range(k)]
            down = self._round(torch.stack([a for a, _ in pairs]))
            B.copy_(self._round(rearrange([b for _, b in pairs], "k o r -> k r o")))
        A.copy_(rearrange(down, "k r m -> k m r"))
        if A_general is not None and B_general is not None:
            (h, n), out = A_general.shape, B_general.shape[0]
            A_general.copy_(
                orthonormal_rows(h, 1, n)[0]
                if start == "orthogonal"
                else self._round(_kaiming(n, h, n))
            )
            B_general.zero_() if start else B_general.copy_(self._round(_kaiming(h, out, h)))

    def _round(self, values: Tensor) -> Tensor:
        return values if self.init_dtype is None else values.to(self.init_dtype)

    @property
    def tensors(self) -> Tensors:
        """(A, B, A_general, B_general), as the functions of `gralora.maths.functional` take
        them.
        """
        own = self.__dict__[
            "_parameters"
        ]  # past nn.Module's __getattr__, which takes as long as a small kernel
        if "A" in own and "B" in own:
            return own["A"], own["B"], own.get("A_general"), own.get("B_general")
        return self.A, self.B, self.A_general, self.B_general  # parametrised

    def bias_times(self, weight: float) -> Tensor | None:
        """What it adds to the bias of the map, times `weight`; None if it does not train that."""
        bias: Tensor | None = self.__dict__["_parameters"]["bias"]
        return bias if bias is None or weight == 1.0 else bias * weight

    def copy_bias_from(self, other: GraloraAdapter) -> None:
        if self.bias is not None and other.bias is not None:
            self.bias.data.copy_(other.bias.data)

    def arguments(self, weight: float = 1.0) -> tuple[Tensors, float, float]:
        """(tensors, scaling, dropout) that hold for a forward now, the scaling times `weight`."""
        if "raw" in self.__dict__:
            self.check_values()
        return (
            self.tensors,
            weight * self.config.scaling,
            self.config.gralora_dropout if self.training else 0.0,
        )

    def has_values(self) -> None:
        """Note that the parameters have been given values."""
        self.__dict__.pop("raw", None)

    def check_values(self) -> None:
        """Raise RuntimeError if the parameters have never been given values: built on meta, then
        moved as they were.
        """
        if "raw" in self.__dict__:
            if not all(p._version for p in self._parameters.values() if p is not None):
                raise RuntimeError(
                    f"an adapter ({self.extra_repr()}) was built on the meta device, and has been"
                    " given memory but no values. Call reset_parameters() of it, as of every"
                    " module, or load_adapter."
                )
            self.has_values()  # written in place by somebody

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}A" in state_dict and f"{prefix}B" in state_dict:
            self.has_values()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if _told.get():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype in (tensor.dtype, *FULL) else tensor.to(result.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.to`. Said of the adapter itself, a type is any; said of a model, only
        float32 and float64 reach it.
        """
        with told():
            return super().to(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == LOADED and "raw" in self.__dict__ and not self.A.is_meta:
            given = [hasattr(p, LOADED) for p in self._parameters.values() if p is not None]
            self.has_values() if all(given) else self.reset_parameters()
        if (
            name == "forward" and HOOK in self.__dict__
        ):  # accelerate is about to keep the parameters elsewhere
            bring_back(self)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor, weight: float = 1.0, update: Update | None = None) -> Tensor:
        """The update for `x` (..., in), times `weight`: (..., out), in the adapter's dtype (or
        autocast's).

        Args:
            update: computes it, where the map is no matrix, from x, the tensors, the scaling and
                the dropout.
        """
        tensors, scaling, dropout = self.arguments(weight)
        x = x.to(self.A.dtype) if x.is_floating_point() else x
        if update is not None:
            return update(x, tensors, scaling, dropout)
        if type(self.A) is not nn.Parameter and is_spread(self.A):
            return spread_update(x, tensors, scaling, dropout)
        return functional.gralora_update(x, *tensors, scaling=scaling, dropout=dropout)

    def delta_weight(self) -> Tensor:
        """ΔW (out, in), whole, in the adapter's dtype. Without gradients it is filled block by
        block, with no temporary.
        """
        self.check_values()
        scaling, (k, _, o) = self.config.scaling, self.B.shape[-3:]
        if is_spread(self.A):
            tensors = cast(Tensors, tuple(t if t is None else whole(t) for t in self.tensors))
            return functional.delta_weight(*tensors, scaling=scaling)
        if (
            torch.is_grad_enabled()
            or self.A.dtype not in (torch.float32, torch.float64)
            or self.A.dim() > 3
        ):
            return functional.delta_weight(*self.tensors, scaling=scaling)
        delta = self.A.new_zeros(k * o, k * self.A.shape[1])
        for j in range(k):
            functional.add_delta_rows_(
                delta[j * o : (j + 1) * o], j * o, *self.tensors, scaling=scaling
            )
        return delta

    def extra_repr(self) -> str:
        c = self.config
        dropout = f", dropout={c.gralora_dropout}" if c.gralora_dropout else ""
        scale = ", use_rslora=True" if c.use_rslora else ""
        return (
            f"r={c.r}, gralora_k={c.gralora_k}, hybrid_r={c.hybrid_r},"
            f" alpha={c.alpha}{scale}{dropout}"
        )


class GraloraAdapters(Switchable):
    """The adapters of one map by name, and their state.

    Attributes:
        active: name -> weight of the active adapters.
        merged: name -> weight of those that are merged into the map's weight.
        base_weight, base_bias: the parameters without them, set aside while any is merged, else
            None. They are not registered: while set aside they are not parameters of the model.
        to_apply: the adapters that are active and not merged, with their weights. Compiled code
            finds them here and not by name, so an adapter of the same shape needs no recompilation.
    """

    active: dict[str, float]
    merged: dict[str, float]
    base_weight: nn.Parameter | None
    base_bias: nn.Parameter | None
    to_apply: Shares

    def __init__(self) -> None:
        super().__init__()
        self.base_weight = self.base_bias = None
        self.merged = {}
        self.active = {}

    def __getitem__(self, name: str) -> GraloraAdapter:
        return cast(GraloraAdapter, self._modules[name])

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def add(self, name: str, adapter: GraloraAdapter) -> None:
        self._modules[name] = adapter  # add_module refuses names such as "forward"
        self.active = self.active

    def remove(self, name: str) -> None:
        active = {other: weight for other, weight in self.active.items() if other != name}
        del self._modules[name]
        self.active = active

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("active", "merged") or isinstance(value, nn.Module):
            found = self.active_adapters() if "active" in self.__dict__ else ()
            self.__dict__["to_apply"] = found

    def active_adapters(self) -> Shares:
        """The adapters that are active and not merged, with their weights."""
        weights = self.active.items()
        return tuple([(self[name], w) for name, w in weights if name not in self.merged])

    def applied_in(self, mode: Mode | None) -> Shares:
        """The adapters that a forward uses in this mode, with their weights: within `mixed_batch`
        all those that some row has.
        """
        if mode is None:
            return self.to_apply
        if isinstance(mode, Rows):
            names = dict.fromkeys(name for name in mode.names if name is not None)
            return tuple([(self[name], 1.0) for name in names if name in self])
        return ((self[mode.name], 1.0),) if isinstance(mode, Only) and mode.name in self else ()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `GraloraAdapter.to`, of all of them."""
        with told():
            return super().to(*args, **kwargs)

    def with_effect(self) -> list[str]:
        return [
            name
            for name in self
            if any(_is_set(t) for t in (self[name].B, self[name].B_general, self[name].bias))
        ]

    def is_mark(self, key: str) -> bool:
        return key.endswith(MERGED) and key.count(".") == 1

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.merged.items():  # so that nobody counts it twice
            destination[prefix + name + MERGED] = torch.tensor(weight)

    def describe(self) -> str:
        """r, k and so on of all, and which of them are active."""
        configs = [self[name].config for name in self]
        parts = []
        for field in ("r", "gralora_k", "hybrid_r", "alpha", "use_rslora"):
            values = list(dict.fromkeys(str(getattr(c, field)) for c in configs))
            if values and values not in (["0"], ["False"]):
                parts.append(f"{field}={' | '.join(values)}")
        parts.append(f"active={' + '.join(self.active) or None}")
        if self.merged:
            parts.append(f"merged={' + '.join(self.merged)}")
        return ", ".join(parts)


@contextmanager
def told() -> Iterator[None]:
    """Within it a cast is meant for adapters."""
    token = _told.set(True)
    try:
        yield
    finally:
        _told.reset(token)


def _is_set(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and not tensor.is_meta
        and not is_spread(tensor)
        and bool(tensor.detach().any())
    )


def each(tensors: Tensors) -> list[Tensors]:
    """Tensors with a leading axis of copies, taken apart along it."""
    A, B, A_general, B_general = tensors
    general = (
        [(None, None)] * len(A)
        if A_general is None or B_general is None
        else zip(A_general, B_general, strict=True)
    )
    return [(a, b, down, up) for a, b, (down, up) in zip(A, B, general, strict=True)]


def check_adapter_name(name: object) -> None:
    """Raise unless `name` can name an adapter: it becomes part of the parameters' names."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name={name!r} is a {type(name).__name__}: it must be a string.")
    if not name or "." in name:
        raise ValueError(
            f"adapter_name={name!r} is not legal: it must be non-empty and hold no dot."
        )


def _kaiming(fan_in: int, *shape: int) -> Tensor:
    """`nn.init.kaiming_uniform_(a=√5)` for a fan-in that the shape need not show; its arithmetic,
    so its bits.
    """
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound)
