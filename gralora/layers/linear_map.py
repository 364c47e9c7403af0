"""`LinearMap`: one linear map of a model, adapted or not.

A map is a weight that is used as a matrix (out, in). Most maps are a layer of their own
(`in_place`); an `nn.MultiheadAttention` holds four, and a module of fused experts one for each of
its 3-D parameters (`parts`). Each kind of map is a subclass, in the file of its layer; `kinds` is
their table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gralora.config import GraloraConfig
from gralora.engines.distributed import is_spread
from gralora.engines.offload import device_of
from gralora.layers.adapter import FULL, GraloraAdapter, GraloraAdapters
from gralora.layers.class_change import held

PREFIX = "gralora_"
CHILD = "gralora_adapters"
HALF = (torch.float16, torch.bfloat16)


class LinearMap:
    """One linear map of a model, adapted or not.

    It holds no state: two objects for the same module and part are interchangeable.

    Attributes:
        module: the module that holds the map.
        part: the name of the map in `module`; "" where the module is the map.
        kind: the name of the kind in files.
        in_all_linear: whether "all-linear" includes maps of this kind.
        by_own_name: whether a target must name the map itself; that of its module is not enough.
    """

    module: nn.Module
    kind: str = "linear"
    in_all_linear: bool = True
    by_own_name: bool = False

    def __init__(self, module: nn.Module, part: str = "") -> None:
        self.module = module
        self.part = part

    @classmethod
    def accepts(cls, original: type[nn.Module]) -> bool:
        """Whether modules of class `original` hold maps of this kind."""
        raise NotImplementedError

    @classmethod
    def parts_of(cls, module: nn.Module) -> tuple[str, ...]:
        """The names of the maps that `module` holds."""
        return ("",)

    @property
    def place(self) -> tuple[nn.Module, str]:
        """(owner, name) of the parameter that holds the map."""
        return self.module, "weight"

    @property
    def bias_place(self) -> tuple[nn.Module, str]:
        """(owner, name) of the bias of the map, whether or not there is one."""
        return self.module, "bias"

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out) of the map as a matrix."""
        raise NotImplementedError

    @property
    def divided_sizes(self) -> tuple[int, int]:
        """(in, out) that k must divide. They differ from `sizes` where a kernel is in the way."""
        return self.sizes

    @property
    def copies(self) -> int | None:
        """The number of maps of one shape in the weight; None for a single one."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the map, with a leading axis of copies, or trailing axes of a kernel."""
        n_in, n_out = self.sizes
        return (n_out, n_in) if self.copies is None else (self.copies, n_out, n_in)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return False

    @property
    def has_rows(self) -> bool:
        """Whether the input and output are the rows of one matrix product (`GraloraLayer.rows`)."""
        return False

    def matrix(self, weight: Tensor) -> Tensor:
        """A parameter of the map's layout as (out, in), or (copies, out, in): a view."""
        return weight

    def in_layout(self, delta: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the parameter: the reverse of `matrix`."""
        return delta

    @property
    def weight(self) -> Tensor:
        """The parameter that holds the map, or the tensor that a parametrization computes."""
        weight: Tensor = held(*self.place)
        return weight

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the map, of one that is not parametrized."""
        owner, name = self.place
        parameter = owner._parameters[name]
        assert parameter is not None
        return parameter

    @property
    def base_weight(self) -> Tensor:
        """The weight without this map's adapters, also while they are merged."""
        adapters = self.adapters
        aside = None if adapters is None else adapters.base_weight
        return self.weight if aside is None else aside

    @property
    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """Where the weight and the bias are, by the name under which `GraloraAdapters` sets the
        base's aside while an adapter is merged.
        """
        return {"base_weight": self.place, "base_bias": self.bias_place}

    @property
    def base_bias(self) -> Tensor | None:
        """The bias without this map's adapters, also while they are merged; None if it has none."""
        aside = None if self.adapters is None else self.adapters.base_bias
        owner, name = self.bias_place
        return owner._parameters.get(name) if aside is None else aside

    def bias_part(self, bias: Tensor) -> Tensor:
        """The map's part of a bias that several maps share: a view."""
        return bias

    def base_matrix(self) -> Tensor:
        """The base weight as (..., out, in)."""
        return self.matrix(self.base_weight)

    @property
    def packed(self) -> bool:
        """Whether the weight is quantised, or in a format that its layer alone can read."""
        owner, name = self.place
        weight = owner._parameters.get(name)
        # subclasses of Parameter and Tensor carry formats that only they know
        plain = type(weight) is nn.Parameter and weight.dtype in (*FULL, *HALF)
        return weight is not None and not is_spread(weight) and not plain

    @property
    def lazy(self) -> bool:
        """Whether the weight has no shape yet."""
        owner, name = self.place
        parameter = owner._parameters.get(name)
        return parameter is not None and is_lazy(parameter)

    def reason_unfit(self) -> str | None:
        """Why the map cannot be adapted, whatever the config; None if it can."""
        if self.lazy:
            return "has no shape yet (a lazy module); run one forward pass first"
        weight: object = held(*self.place)
        if not isinstance(weight, Tensor):
            return "has no weight"
        if weight.is_complex():
            return "has a complex weight"
        if is_spread(weight) and self.kind != "linear" and self.adapters is None:
            return "has its weight spread over processes, which only linear layers can have"
        return None

    @property
    def adapters(self) -> GraloraAdapters | None:
        """The adapters of the map; None until `attach`."""
        raise NotImplementedError

    def attach(self) -> GraloraAdapters:
        """Make the map an adapted one, in place, and return its adapters. Does nothing if it is."""
        raise NotImplementedError

    def new_adapter(
        self, config: GraloraConfig, dtype: torch.dtype | None = None, *, reset: bool = True
    ) -> GraloraAdapter:
        """An adapter that fits: on the weight's device, float32 unless the weight is float64."""
        weight, bias = self.weight, self.base_bias
        default = weight.dtype if weight.dtype in FULL else torch.float32
        init_dtype = weight.dtype if weight.dtype in HALF else None
        adapter = GraloraAdapter(
            *self.sizes,
            config,
            copies=self.copies,
            bias=None if bias is None or config.bias == "none" else self.bias_part(bias).shape,
            device=device_of(self.place[0], weight),
            dtype=dtype or default,
            init_dtype=init_dtype,
            reset=reset,
        )
        if is_spread(weight):
            adapter.spread_like(weight, self.transposed)
        return adapter if self.module.training else adapter.eval()
