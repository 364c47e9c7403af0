"""`GraloraLayer` and its kinds: a linear layer, and the adapters that hang on it.

An adapted layer *is* the layer it was: `GraloraLinear` is an `nn.Linear` with one child more, `gralora_adapters`,
which holds everything about adaptation. A new kind of layer is a subclass of `GraloraLayer` and one row in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from gralora import autograd
from gralora.adapter import GraloraAdapter
from gralora.config import GraloraConfig
from gralora.inplace import InPlaceModule, change_class, freeze_own, made_class
from gralora.scope import Switchable

CHILD = "gralora_adapters"
HALF = (torch.float16, torch.bfloat16)
FULL = (torch.float32, torch.float64)

Layer = TypeVar("Layer", bound="GraloraLayer")


class GraloraAdapters(Switchable):
    """The adapters of one layer by name, and their state.

    Attributes:
        active: name -> weight of those that act.
        merged: name -> weight of those now within the layer's weight.
        base_weight: the layer's own weight while any is merged, else None.
    """

    active: dict[str, float]
    merged: dict[str, float]
    base_weight: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.active = {}
        self.merged = {}
        self.__dict__["base_weight"] = None  # not registered: it is no parameter of the model while it is put aside

    def __getitem__(self, name: str) -> GraloraAdapter:
        return cast(GraloraAdapter, self._modules[name])

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def add(self, name: str, adapter: GraloraAdapter) -> None:
        self._modules[name] = adapter  # not add_module: names such as "forward" are as good as any

    def remove(self, name: str) -> None:
        del self._modules[name]
        self.active.pop(name, None)

    def applied(self) -> list[tuple[GraloraAdapter, float]]:
        """The adapters that a forward must add now, with their weights."""
        if not self.active or self.disabled:
            return []
        return [(self[name], weight) for name, weight in self.active.items() if name not in self.merged]


class GraloraLayer(InPlaceModule):
    """Mixin of every adapted layer: y = base(x) + Σ over active adapters of weight * scaling * x @ ΔWᵀ.

    Subclasses say how their base stores its weight.
    """

    _prefix = "Gralora"
    gralora_adapters: GraloraAdapters
    transposed: ClassVar[bool]  # weight is (in, out)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        """Whether modules of class `original` can become layers of this kind."""
        raise NotImplementedError

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        """(in, out) of `module`, adapted or not."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in), and whatever else the base layer takes -> (..., out), in the base layer's dtype."""
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        applied = self.gralora_adapters.applied()
        if not applied:
            return cast(Tensor, self.base_forward(*args, **kwargs))
        if not autograd.usable(x, applied[0][0].A):
            y: Tensor = self.base_forward(*args, **kwargs)
            for adapter, weight in applied:
                y = (y + adapter(x, weight)).to(y.dtype)
            return y
        base_weight = self.plain_weight()
        if base_weight is not None:
            adapter, weight = applied.pop(0)
            bias = cast(Tensor | None, self.bias)
            y = autograd.linear_with_adapter(x, base_weight, bias, *adapter.arguments(weight))
        else:
            y = self.base_forward(*args, **kwargs)
        for adapter, weight in applied:
            y = autograd.add_adapter_(y, x, *adapter.arguments(weight))
        return y

    def plain_weight(self) -> Tensor | None:
        """The weight (out, in), if the base is exactly x @ Wᵀ + b with it; None if the base must be called to know."""
        weight = cast(Tensor, self.weight)
        if type(weight) not in (nn.Parameter, Tensor) or "_base_instance_forward" in self.__dict__:
            return None
        if not self.is_plain():
            return None
        return weight.t() if self.transposed else weight

    @classmethod
    def is_plain(cls) -> bool:
        """Whether the base class computes x @ Wᵀ + b and nothing else."""
        raise NotImplementedError

    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """ΔW in the layout of `weight`: of one adapter, or the weighted sum of the active ones."""
        adapters = self.gralora_adapters
        weights = adapters.active if adapter_name is None else {adapter_name: 1.0}
        if not weights or not all(name in adapters for name in weights):
            raise KeyError(
                f"no adapter {adapter_name!r} to read ΔW from; this layer has: {', '.join(adapters) or 'none'}"
            )
        (first, *rest) = (adapters[name].delta_weight() * weight for name, weight in weights.items())
        delta = sum(rest, start=first)
        return rearrange(delta, "o i -> i o") if self.transposed else delta

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.gralora_adapters.merged and f"{prefix}weight" in state_dict:
            errors = args[-1]
            errors.append(f"{prefix}weight holds a merged adapter, which unmerge would overwrite: unmerge, then load.")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        base = self._base_class.extra_repr(self)
        if CHILD not in self._modules:
            return base
        adapters = self.gralora_adapters
        configs = [adapters[name].config for name in adapters]
        shapes = {
            field: " | ".join(dict.fromkeys(str(getattr(c, field)) for c in configs))
            for field in ("r", "gralora_k", "hybrid_r", "alpha")
        }
        parts = [base, *(f"{field}={value}" for field, value in shapes.items() if value)]
        parts.append(f"active={' + '.join(adapters.active) or None}")
        if adapters.merged:
            parts.append(f"merged={' + '.join(adapters.merged)}")
        return ", ".join(part for part in parts if part)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def _attach_container(self) -> None:
        self.gralora_adapters = GraloraAdapters()

    def _drop_in(self, config: GraloraConfig | None, adapter_name: str) -> None:
        """Finish a layer that was built, not injected: freeze the base, add a trainable adapter."""
        check_adapter_name(adapter_name)
        freeze_own(self)
        self._attach_container()
        self.gralora_adapters.add(adapter_name, new_adapter(self, config or GraloraConfig()))
        self.gralora_adapters.active = {adapter_name: 1.0}

    @classmethod
    def _adapting(cls: type[Layer], module: nn.Module, config: GraloraConfig, adapter_name: str) -> Layer:
        if kind_of(type(module)) is not cls:
            raise TypeError(f"{cls.__name__} cannot stand in for a {type(module).__name__}.")
        if isinstance(module, GraloraLayer):
            raise TypeError(f"this {type(module).__name__} is adapted already; use inject for a further adapter.")
        layer = module.__new__(type(module))
        layer.__dict__.update(module.__dict__)
        for name, value in module.__dict__.items():
            if isinstance(value, (dict, set)):  # parameters, buffers, children, hooks: same entries, own registers
                layer.__dict__[name] = value.copy()
        change_class(layer, cls)
        adapted = cast(Layer, layer)
        adapted._drop_in(config, adapter_name)
        return adapted


class GraloraLinear(GraloraLayer, nn.Linear):
    """`nn.Linear` with GraLoRA adapters: y = x @ Wᵀ + b + scaling * x @ ΔWᵀ.

    Built directly, it has a frozen base that initialises and loads as `nn.Linear` does, and one trainable adapter.

    Args:
        in_features, out_features, bias, device: as for `nn.Linear`.
        config: of the adapter; `GraloraConfig()` if None.
        adapter_name: of the adapter.
        dtype: of the base. The adapter's is the same, but float32 where the base is half precision.

    Raises:
        ValueError: `config.gralora_k` does not divide both sizes.
    """

    _base_class = nn.Linear
    transposed = False

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
        cls, linear: nn.Linear, config: GraloraConfig | None = None, *, adapter_name: str = "default"
    ) -> GraloraLinear:
        """A `GraloraLinear` over the very weight and bias of `linear` (shared, and frozen); `linear` keeps its class."""
        return cls._adapting(linear, config or GraloraConfig(), adapter_name)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        return issubclass(original, nn.Linear)

    @classmethod
    def is_plain(cls) -> bool:
        return cls._base_class.forward is nn.Linear.forward

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        return cast(nn.Linear, module).in_features, cast(nn.Linear, module).out_features


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2: y = x @ W + b with W of shape (nx, nf)."""

    def __init__(
        self, nf: int, nx: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
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


class GraloraConv1D(GraloraLayer, Conv1D):
    """GPT-2's `Conv1D` with GraLoRA adapters: y = x @ W + b + scaling * x @ ΔW, W and ΔW of shape (nx, nf).

    Built directly, it has a frozen base that initialises and loads as `transformers`' `Conv1D` does, and one
    trainable adapter. Arguments as for `GraloraLinear`.
    """

    _base_class = Conv1D
    transposed = True

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
        """A `GraloraConv1D` over the very weight and bias of `conv` (shared, and frozen); `conv` keeps its class."""
        return cls._adapting(conv, config or GraloraConfig(), adapter_name)

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        # transformers' own is known by its name, so that transformers need not be imported
        return any(base is Conv1D or base.__name__ == "Conv1D" for base in original.__mro__)

    @classmethod
    def is_plain(cls) -> bool:
        owner = next(base for base in cls._base_class.__mro__ if "forward" in vars(base))
        return owner is Conv1D or f"{owner.__module__}.{owner.__name__}" == "transformers.pytorch_utils.Conv1D"

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        nx, nf = cast(Tensor, module.weight).shape
        return nx, nf

    def extra_repr(self) -> str:
        nx, nf = self.features(self)
        return super().extra_repr() if self._base_class is Conv1D else f"nf={nf}, nx={nx}, {super().extra_repr()}"


KINDS: list[type[GraloraLayer]] = [GraloraLinear, GraloraConv1D]
"""The table of what can be adapted: each kind says itself which classes it accepts."""


def kind_of(cls: type[nn.Module]) -> type[GraloraLayer] | None:
    """The kind of adapted layer that a module of class `cls` can become, or None."""
    return next((kind for kind in KINDS if kind.accepts(cls)), None)


def adapted_class(cls: type[nn.Module]) -> type[GraloraLayer]:
    """The class that `inject` gives a module of class `cls`: `GraloraLinear` for `nn.Linear`, else (its kind, `cls`).

    Made classes are cached; instances of them survive `copy.deepcopy` and `pickle`.

    Raises:
        TypeError: `cls` is no linear-like layer.
    """
    kind = kind_of(cls)
    if kind is None:
        raise TypeError(f"{cls.__name__} cannot be adapted. Adaptable: subclasses of nn.Linear, and Conv1D (GPT-2's).")
    return cls if issubclass(cls, GraloraLayer) else cast(type[GraloraLayer], made_class(kind, cls))


def adapt(module: nn.Module) -> GraloraLayer:
    """Make `module` an adapted layer, in place, without an adapter as yet. No change if it is one."""
    if not isinstance(module, GraloraLayer):
        kind = kind_of(type(module))
        assert kind is not None  # targets.py has refused all others
        change_class(module, kind)
        layer = cast(GraloraLayer, module)
        layer._attach_container()
    return cast(GraloraLayer, module)


def new_adapter(
    module: nn.Module, config: GraloraConfig, dtype: torch.dtype | None = None, *, reset: bool = True
) -> GraloraAdapter:
    """An adapter that fits `module`, adapted or not: on its device, float32 unless its weight is float64."""
    kind = kind_of(type(module))
    assert kind is not None
    weight = cast(Tensor, module.weight)
    default = weight.dtype if weight.dtype in FULL else torch.float32
    init_dtype = weight.dtype if weight.dtype in HALF else None
    adapter = GraloraAdapter(
        *kind.features(module),
        config,
        device=weight.device,
        dtype=dtype or default,
        init_dtype=init_dtype,
        reset=reset,
    )
    return adapter.train(module.training)


def gralora_layers(model: nn.Module) -> Iterator[tuple[str, GraloraLayer]]:
    """Every adapted layer of `model` with its name, once each."""
    for name, module in model.named_modules():
        if isinstance(module, GraloraLayer):
            yield name, module


def check_adapter_name(name: object) -> None:
    """Raise unless `name` can name an adapter: it becomes part of the parameters' names."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name={name!r} is a {type(name).__name__}: it must be a string.")
    if not name or "." in name:
        raise ValueError(f"adapter_name={name!r} is not legal: it must be non-empty and hold no dot.")


def delta_weight(layer: nn.Module, adapter_name: str | None = None) -> Tensor:
    """ΔW of an adapted layer, in the layout of `layer.weight`: of one adapter, or the weighted sum of the active ones.

    Raises:
        TypeError: `layer` is not adapted. KeyError: it has no such adapter.
    """
    if not isinstance(layer, GraloraLayer):
        raise TypeError(f"delta_weight takes an adapted layer, not a {type(layer).__name__}.")
    return layer.delta_weight(adapter_name)
