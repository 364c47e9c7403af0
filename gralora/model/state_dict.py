"""The values of one adapter in memory: out of a model as a state dict, and into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gralora.engines.distributed import copy_into, gathered, whole
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import gralora_layers
from gralora.layers.class_change import join
from gralora.layers.loading import FACTORS, factor_key
from gralora.model.biases import adapted_biases, base_bias, bias_differences, bias_values
from gralora.model.saved import saved_modules
from gralora.model.state import adapter_keys, check_known, check_unmerged, named_adapter_parameters
from gralora.model.targets import shorten

BIAS = factor_key("bias")


class LoadResult(NamedTuple):
    """Keys that the adapter has and the state dict lacks, and the reverse. Both empty if strict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The values of one adapter, and nothing of the base: `<module>.gralora_A` and so on.

    Copies of modules and trained biases are included under their own names, a bias as base + Δb.
    All other tensors share memory with the model; where it is sharded they are gathered, as plain
    tensors, on every process, all of which must call.

    Raises:
        KeyError: no such adapter.
    """
    check_known(model, adapter_name)
    live, biases = live_tensors(model, adapter_name), adapted_biases(model, adapter_name)
    bases = [base_bias(layer) for layers in biases.values() for layer in layers]
    with gathered([*live.values(), *bases]) as for_now:
        found = {
            key: tensor.detach().clone() if for_now else whole(tensor.detach())
            for key, tensor in live.items()
            if not key.endswith(BIAS)
        }
        return {**found, **bias_values(biases, adapter_name)}


def load_adapter_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    *,
    strict: bool = True,
) -> LoadResult:
    """Copy values into an adapter that the model has. Nothing is allocated; the dtype of the
    adapter stays.

    Raises:
        KeyError: no such adapter; or, if `strict`, keys are missing or unexpected. ValueError: a
            shape differs, or the adapter is merged. Nothing has then been copied.
    """
    load = prepared_load(model, state_dict, adapter_name, strict=strict)
    write_values([load])
    return load.result


class Load(NamedTuple):
    """What one load will copy, checked.

    Attributes:
        values: (a tensor of the model, its new value).
        filled: adapters all of whose values are among them.
    """

    result: LoadResult
    values: list[tuple[Tensor, Tensor]]
    filled: list[GraloraAdapter]


def prepared_load(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, *, strict: bool = True
) -> Load:
    """Check a state dict against the adapter that it is for; nothing is changed.

    Raises: as `load_adapter_state_dict`.
    """
    check_known(model, adapter_name)
    check_unmerged(model, adapter_name)
    biases = adapted_biases(model, adapter_name)
    live = live_tensors(model, adapter_name)
    own = {key: tensor for key, tensor in live.items() if not key.endswith(BIAS)}
    expected = [*own, *biases]
    result = LoadResult(
        [k for k in expected if k not in state_dict], [k for k in state_dict if k not in expected]
    )
    if strict and any(result):
        parts = [
            f"{what}: {shorten(keys)}"
            for what, keys in zip(("missing", "unexpected"), result, strict=True)
            if keys
        ]
        raise KeyError(
            f"the state dict does not fit adapter {adapter_name!r}; {'; '.join(parts)}."
            " strict=False passes them."
        )
    if expected and state_dict and len(result.missing_keys) == len(expected):
        raise ValueError(
            f"none of the keys is one of adapter {adapter_name!r}: nothing was loaded. Given:"
            f" {shorten(state_dict)}; wanted: {shorten(expected)}. load_state_dict takes the keys"
            " of state_dict()."
        )
    shared = {key: tensor for key, tensor in own.items() if key in state_dict}
    _check_fits(shared, state_dict)
    values = [(tensor, state_dict[key]) for key, tensor in shared.items()]
    values += bias_differences(biases, adapter_name, state_dict)
    filled = [
        layer.gralora_adapters[adapter_name]
        for path, layer in gralora_layers(model)
        if adapter_name in layer.gralora_adapters
        and set(adapter_keys(path, dict.fromkeys(FACTORS[:2]))) <= shared.keys()
    ]
    return Load(result, values, filled)


@torch.no_grad()
def write_values(loads: Sequence[Load]) -> None:
    """Copy the values of every load, or on an exception of none. The old ones are kept so long."""
    before = [(own, own.clone()) for load in loads for own, _ in load.values]
    try:
        for load in loads:
            for own, value in load.values:
                copy_into(own, value)
            for adapter in load.filled:
                adapter.has_values()
    except BaseException:
        for own, value in before:
            own.copy_(value)
        raise


def _check_fits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the keys, unless every value in `own` can be overwritten by that of
    its key in `given`.
    """
    wrong = [
        f"{key} is {tuple(given[key].shape)} there and {tuple(own[key].shape)} here"
        for key in own
        if given[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"shapes differ, nothing was loaded: {shorten(wrong)}")
    kinds = [
        f"{key} is {given[key].dtype} there and {own[key].dtype} here"
        for key in own
        if given[key].is_floating_point() != own[key].is_floating_point() or given[key].is_complex()
    ]
    if kinds:
        raise ValueError(f"types differ, nothing was loaded: {shorten(kinds)}")
    away = [key for key in own if own[key].is_meta]
    if away:
        raise ValueError(
            f"nothing to load into, on the meta device: {shorten(away)}. First to_empty, then load."
        )
    torn_pair = torn(own, given)
    if torn_pair:
        raise ValueError(
            f"{' and '.join(torn_pair)} are one tensor here, and differ there: nothing was loaded."
        )


def live_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The parameters of an adapter, and the buffers of its copies, by name."""
    tensors: dict[str, Tensor] = dict(named_adapter_parameters(model, adapter_name))
    for path, saved in saved_modules(model):
        if adapter_name in saved.gralora_saved:
            own = saved.gralora_saved[adapter_name].state_dict()
            tensors.update(
                {
                    join(path, key): tensor
                    for key, tensor in own.items()
                    if join(path, key) not in tensors
                }
            )
    return tensors


def torn(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two keys that are one tensor in `own` and two different ones in `given`, as PEFT saves a tied
    head.
    """
    first: dict[int, str] = {}
    for key, tensor in own.items():
        other = first.setdefault(id(tensor), key)
        if (
            other in given
            and key in given
            and other != key
            and not torch.equal(given[other], given[key])
        ):
            return other, key
    return None
