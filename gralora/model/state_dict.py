"""The values of one adapter in memory: out of a model as a state dict, and into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gralora.engines.distributed import copy_into, gathered, whole
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import gralora_layers
from gralora.layers.class_change import join
from gralora.layers.loading import FACTORS
from gralora.model.saved import saved_modules
from gralora.model.state import adapter_keys, check_known, check_unmerged, named_adapter_parameters
from gralora.model.targets import shorten


class LoadResult(NamedTuple):
    """Keys that the adapter has and the state dict lacks, and the reverse. Both empty if strict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The values of one adapter, and nothing of the base: `<module>.gralora_A` and so on.

    Saved modules and trained biases are included under their own names. The tensors share memory
    with the model; where it is sharded they are gathered, whole and plain, on every process, all of
    which must call.

    Raises:
        KeyError: no such adapter.
    """
    check_known(model, adapter_name)
    live = live_tensors(model, adapter_name)
    with gathered(live.values()) as for_now:
        return {
            key: tensor.detach().clone() if for_now else whole(tensor.detach())
            for key, tensor in live.items()
        }


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
    check_known(model, adapter_name)
    check_unmerged(model, adapter_name)
    own = live_tensors(model, adapter_name)
    result = LoadResult(
        [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
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
    shared = {key: tensor for key, tensor in own.items() if key in state_dict}
    _check_fits(shared, state_dict)
    if own and state_dict and not shared:
        raise ValueError(
            f"none of the keys is one of adapter {adapter_name!r}: nothing was loaded. Given:"
            f" {shorten(state_dict)}; wanted: {shorten(own)}. load_state_dict takes the keys of"
            " state_dict()."
        )
    filled = [
        layer.gralora_adapters[adapter_name]
        for path, layer in gralora_layers(model)
        if adapter_name in layer.gralora_adapters
        and set(adapter_keys(path, dict.fromkeys(FACTORS[:2]))) <= shared.keys()
    ]
    _overwrite(shared, state_dict, filled)
    return result


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


@torch.no_grad()
def _overwrite(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], filled: Iterable[GraloraAdapter]
) -> None:
    """Copy every value, or on an exception none. The old ones are kept for so long."""
    before = {key: tensor.clone() for key, tensor in own.items()}
    try:
        for key, tensor in own.items():
            copy_into(tensor, given[key])
        for adapter in filled:
            adapter.has_values()
    except BaseException:
        for key, tensor in own.items():
            tensor.copy_(before[key])
        raise


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
