"""`GraloraLayer`: one linear map of a model, and the adapters that hang on it.

An adapted layer *is* the layer it was: a `GraloraLinear` is an `nn.Linear` with one child more,
`gralora_adapters`, which holds everything about adaptation. Maps that are no layers of their own
(the projections within an `nn.MultiheadAttention`, fused expert weights) are children of their
module, named after the map.

A new kind is a subclass of `GraloraLayer` in a file of its own, and one row of the table in
`kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from gralora.config import GraloraConfig
from gralora.engines.distributed import is_spread
from gralora.engines.offload import device_of
from gralora.engines.walk import named_modules
from gralora.layers.adapter import FULL, GraloraAdapter, GraloraAdapters, is_hooked
from gralora.layers.class_change import join
from gralora.layers.effective_weight import EffectiveWeight, Share, UnreadableWeight
from gralora.layers.lazy_weight import is_dense, read_as
from gralora.layers.running import forward_runs
from gralora.layers.scope import Rows
from gralora.maths import autograd, functional

PREFIX = "gralora_"
CHILD = "gralora_adapters"
HALF = (torch.float16, torch.bfloat16)


class Spot(NamedTuple):
    """One linear map of a model, adapted or not: its kind, the module it is in, and which of that
    module's maps it is.
    """

    kind: type[GraloraLayer]
    module: nn.Module
    part: str = ""

    @property
    def weight(self) -> Tensor:
        """The parameter that holds the map, as it is now; what stands for it where it is
        parametrised.
        """
        owner, name = self.kind.weight_at(self.module, self.part)
        parameter = owner._parameters.get(name)
        return cast(Tensor, getattr(owner, name)) if parameter is None else parameter

    @property
    def adapted(self) -> GraloraLayer | None:
        """The adapted map, if it is one."""
        return self.kind.adapted(self.module, self.part)

    @property
    def base_weight(self) -> Tensor:
        """The parameter that holds the map, without this map's adapters in it, merged or not."""
        adapted = self.adapted
        aside = None if adapted is None else adapted.gralora_adapters.base_weight
        return self.weight if aside is None else aside

    def base_matrix(self) -> Tensor:
        """The map (..., out, in) without any adapter in it."""
        return self.kind.matrix(self.module, self.part, self.base_weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the map, with the axes of a kernel behind, or of copies before."""
        return self.kind.shape(self.module, self.part)

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out) of the map as a matrix."""
        return self.kind.sizes(self.module, self.part)

    @property
    def cut(self) -> tuple[int, int]:
        """(in, out) that k must divide."""
        return self.kind.cut(self.module, self.part)

    @property
    def copies(self) -> int | None:
        """How many maps of one shape lie in the weight; None for a single one."""
        return self.kind.copies(self.module, self.part)

    def new_adapter(
        self, config: GraloraConfig, dtype: torch.dtype | None = None, *, reset: bool = True
    ) -> GraloraAdapter:
        """An adapter that fits: on the weight's device, float32 unless the weight is float64."""
        weight = self.weight
        default = weight.dtype if weight.dtype in FULL else torch.float32
        init_dtype = weight.dtype if weight.dtype in HALF else None
        adapter = GraloraAdapter(
            *self.sizes,
            config,
            copies=self.copies,
            device=device_of(self.kind.weight_at(self.module, self.part)[0], weight),
            dtype=dtype or default,
            init_dtype=init_dtype,
            reset=reset,
        )
        if is_spread(weight):
            adapter.spread_like(weight, self.kind.transposed(self.module, self.part))
        return adapter if self.module.training else adapter.eval()


class GraloraLayer(nn.Module):
    """Base of every adapted map: y = base(x) + Σ over active adapters of weight * scaling * x @
    ΔWᵀ.

    The class methods describe a map, adapted or not, by its module and its name there ("" where the
    module is the map).
    """

    gralora_adapters: GraloraAdapters
    part: str = ""
    what: ClassVar[str] = "linear"  # as files call it
    in_all_linear: ClassVar[bool] = True

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        """Whether modules of class `original` hold maps of this kind."""
        raise NotImplementedError

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        """The names of the maps that `module` holds."""
        return ("",)

    @classmethod
    def unfit(cls, module: nn.Module, part: str) -> str | None:
        """Why this map cannot be adapted, whatever the config; None if it can."""
        return None

    @classmethod
    def weight_at(cls, module: nn.Module, part: str) -> tuple[nn.Module, str]:
        """(owner, name) of the parameter that holds the map."""
        return module, "weight"

    @classmethod
    def bias_at(cls, module: nn.Module, part: str) -> tuple[nn.Module, str]:
        """(owner, name) of the bias that belongs to the map, whether or not there is one."""
        return module, "bias"

    @classmethod
    def matrix(cls, module: nn.Module, part: str, weight: Tensor) -> Tensor:
        """The map (out, in), or (copies, out, in), as a view of the parameter that holds it."""
        raise NotImplementedError

    @classmethod
    def in_layout(cls, module: nn.Module, part: str, delta: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the parameter: the reverse of `matrix`."""
        raise NotImplementedError

    @classmethod
    def sizes(cls, module: nn.Module, part: str) -> tuple[int, int]:
        """(in, out) of the map as a matrix."""
        raise NotImplementedError

    @classmethod
    def cut(cls, module: nn.Module, part: str) -> tuple[int, int]:
        """(in, out) that k must divide, where they are not those of the matrix."""
        return cls.sizes(module, part)

    @classmethod
    def shape(cls, module: nn.Module, part: str) -> tuple[int, ...]:
        """(out, in) of the map, with the axes of a kernel behind, or of copies before."""
        (n_in, n_out), copies = cls.sizes(module, part), cls.copies(module, part)
        return (n_out, n_in) if copies is None else (copies, n_out, n_in)

    @classmethod
    def copies(cls, module: nn.Module, part: str) -> int | None:
        """How many maps of one shape lie in the weight; None for a single one."""
        return None

    @classmethod
    def transposed(cls, module: nn.Module, part: str) -> bool:
        """Whether the weight is stored (in, out)."""
        return False

    @classmethod
    def has_rows(cls, module: nn.Module, part: str) -> bool:
        """Whether what the map gets and gives are rows of one matrix product, as `rows` tells."""
        return False

    def rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """An input (..., in) and an output of the map as the rows (t, in), (t, out) that its matrix
        takes and gives.
        """
        return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])

    @classmethod
    def adapted(cls, module: nn.Module, part: str) -> GraloraLayer | None:
        """The map as `attach` has made it, None if it has not."""
        return module if isinstance(module, GraloraLayer) else None

    @classmethod
    def attach(cls, module: nn.Module, part: str) -> GraloraLayer:
        """Make the map an adapted one, in place, without an adapter as yet. No change if it is
        one.
        """
        raise NotImplementedError

    def detach(self) -> None:
        """Undo `attach`."""
        raise NotImplementedError

    @property
    def packed(self) -> bool:
        """Whether the weight is quantised, or in a format that its layer alone can read."""
        owner, name = self.place
        weight = owner._parameters.get(name)
        if weight is None or is_spread(weight):
            return False
        return not is_dense(weight) or weight.dtype not in (*FULL, *HALF)

    @property
    def host(self) -> nn.Module:
        """The module that holds the map."""
        return self

    @property
    def place(self) -> tuple[nn.Module, str]:
        """(owner, name) of the parameter that holds the map."""
        return self.weight_at(self.host, self.part)

    @property
    def spot(self) -> Spot:
        return Spot(type(self), self.host, self.part)

    def run(
        self,
        x: Tensor,
        base: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dim: int | None = None,
        plain: tuple[Tensor, Tensor | None] | None = None,
        update: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """base(*args, **kwargs) plus what the adapters add to it for the input `x`, in the dtype of
        the base.

        Args:
            dim: the axis of the batch in `x`, where the map knows it.
            plain: as `plain()` gives it, where the caller knows it.
            update: as `self.update`, where that depends on more than x.
        """
        adapters = cast(GraloraAdapters, self._modules[CHILD])
        mode = adapters.mode if adapters.scopes else None
        if isinstance(mode, Rows):
            y = base(*args, **kwargs)
            if not isinstance(y, Tensor):
                return self.reading(args, kwargs)
            return self._run_rows(x, y, mode, dim, update or self.update)
        applied = adapters.applied()
        if not applied:
            return base(*args, **kwargs)
        if not self.fast(x, applied[0][0].tensors[0]) or any(
            is_hooked(adapter) for adapter, _ in applied
        ):
            update = update or self.update
            y = base(*args, **kwargs)
            if not isinstance(y, Tensor):
                return self.reading(args, kwargs)
            for adapter, share in applied:
                y = (y + functional.within(x, partial(update, adapter=adapter, share=share))).to(
                    y.dtype
                )
            return y
        plain = plain or self.plain()
        if plain is not None:
            adapter, share = applied.pop(0)
            y = autograd.linear_with_adapter(x, plain[0], plain[1], *adapter.arguments(share))
        else:
            y = base(*args, **kwargs)
            if not isinstance(y, Tensor):
                return self.reading(args, kwargs)
        for adapter, share in applied:
            y = autograd.add_adapter_(y, x, *adapter.arguments(share))
        return y

    def reading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base's forward where it returns more than one tensor, to which nothing can be
        added.
        """
        name = getattr(type(self), "_base_class", type(self)).__name__
        raise TypeError(
            f"the forward of {name} returns no tensor, so no update can be added to it. Leave the"
            " layer out, with exclude_modules."
        )

    def fast(self, x: Tensor, A: Tensor) -> bool:
        """Whether `gralora.maths.autograd` serves here."""
        return autograd.usable(x, A)

    def plain(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight (out, in), bias), if the base is exactly x @ Wᵀ + b with these; None if it must
        be called to know.
        """
        return None

    def update(self, x: Tensor, adapter: GraloraAdapter, share: float) -> Tensor:
        """What `adapter` adds for the input `x`, times `share`."""
        return cast(Tensor, adapter(x, share))

    def _run_rows(
        self, x: Tensor, y: Tensor, rows: Rows, dim: int | None, update_of: Callable[..., Tensor]
    ) -> Tensor:
        if is_spread(x):
            raise ValueError(
                "mixed_batch does not reach layers whose weights are spread over processes."
            )
        adapters = self.gralora_adapters
        dim = rows.axis(x, dim)
        order, _, names, counts = rows.sort(x.shape[dim], list(adapters), x.device)
        adapted = order[: len(order) - counts[-1]]
        if not len(adapted):
            return y
        sorted_x, chosen = (
            x.index_select(dim, adapted),
            [adapters[cast(str, name)] for name in names[:-1]],
        )
        groups = [adapter.arguments() for adapter in chosen]
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or dim != 0
        plain = (
            plain
            or any(dropout for *_, dropout in groups)
            or len({adapter.A.dtype for adapter in chosen}) > 1
        )
        plain = plain or any(map(is_hooked, chosen))
        if plain or not self.fast(x, chosen[0].A):
            parts = torch.split(sorted_x, counts[:-1], dim)
            update = torch.cat(
                [update_of(part, a, 1.0) for a, part in zip(chosen, parts, strict=True)], dim
            )
        else:
            update = autograd.updates_of_groups(
                sorted_x, counts[:-1], [group[:2] for group in groups]
            )
        return y.index_add(dim, adapted, update.to(y.dtype))

    def read(self, weight: Tensor) -> Tensor:
        """The weight as code outside the map sees it: W + ΔW of the active adapters while a forward
        runs, else the parameter; always the parameter if its layer alone can read it.

        Args:
            weight: the parameter that holds the map.
        """
        adapters = cast("GraloraAdapters | None", self._modules.get(CHILD))
        if adapters is None or not (adapters.active or adapters.scopes):
            return weight
        sharded = is_spread(weight)
        if not (sharded or is_dense(weight)) or not self.is_read(weight):
            return weight
        mode = adapters.mode
        if isinstance(mode, Rows):
            applied = [
                (adapters[name], 1.0)
                for name in dict.fromkeys(mode.names)
                if name is not None and name in adapters
            ]
        else:
            applied = adapters.applied()
        if not applied:
            return weight
        effective = self.effective_weight(
            weight, [adapter.arguments(share) for adapter, share in applied]
        )
        if isinstance(mode, Rows):
            effective = UnreadableWeight(
                effective,
                f"the weight of {self} is read whole, and can't be another one for every row of the"
                " batch.",
            )
        elif sharded:
            effective = UnreadableWeight(
                effective,
                f"the weight of {self} is sharded over processes, and another module needs the"
                " values of W + ΔW, which no process holds. Call the layer instead.",
            )
        return read_as(effective)

    def effective_weight(self, weight: Tensor, shares: list[Share]) -> EffectiveWeight:
        """W + ΔW with these adapters, for code that reads the weight."""
        return LayerWeight(self, weight, shares)

    def is_read(self, weight: Tensor) -> bool:
        """Whether the code that reads the weight now computes with it, outside the map itself."""
        return torch.compiler.is_compiling() or forward_runs(self.host)

    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """ΔW in the layout of the weight: of one adapter, or the weighted sum of the active
        ones.
        """
        adapters = self.gralora_adapters
        weights = adapters.active if adapter_name is None else {adapter_name: 1.0}
        if not weights or not all(name in adapters for name in weights):
            raise KeyError(
                f"no adapter {adapter_name!r} to read ΔW from; this layer has:"
                f" {', '.join(adapters) or 'none'}"
            )
        return self.weighted_delta([(adapters[name], weight) for name, weight in weights.items()])

    def weighted_delta(self, shares: Iterable[tuple[GraloraAdapter, float]]) -> Tensor:
        """Σ weight * ΔW of some of the adapters, at least one, in the layout of the weight."""
        first, *rest = (adapter.delta_weight() * weight for adapter, weight in shares)
        return self.in_layout(self.host, self.part, sum(rest, start=first))

    def _attach_container(self) -> None:
        self.gralora_adapters = GraloraAdapters()
        self.gralora_adapters.training = self.training


class LayerWeight(EffectiveWeight):
    """The effective weight of a layer, in the layout that the layer says."""

    def __init__(self, layer: GraloraLayer, weight: Tensor, shares: list[Share]) -> None:
        super().__init__(weight, shares)
        self.layer = layer

    def in_layout(self, delta: Tensor) -> Tensor:
        return self.layer.in_layout(self.layer.host, self.layer.part, delta)


def name_of(path: str, layer: GraloraLayer) -> str:
    """The name of a map by where its layer lies: a part's own is not that of the child that it
    is.
    """
    above, _, own = path.rpartition(".")
    return join(above, own.removeprefix(PREFIX)) if layer.part else path


def gralora_layers(model: nn.Module) -> Iterator[tuple[str, GraloraLayer]]:
    """Every adapted map of `model` with its name, once each."""
    for name, module in named_modules(model):
        if isinstance(module, GraloraLayer):
            yield name_of(name, module), module


def delta_weight(layer: nn.Module, adapter_name: str | None = None) -> Tensor:
    """ΔW of an adapted layer, in the layout of `layer.weight`: of one adapter, or the weighted sum
    of the active ones.

    Raises:
        TypeError: `layer` is not adapted. KeyError: it has no such adapter.
    """
    if not isinstance(layer, GraloraLayer):
        raise TypeError(f"delta_weight takes an adapted layer, not a {type(layer).__name__}.")
    return layer.delta_weight(adapter_name)
