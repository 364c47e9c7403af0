"""What a user does to an adapted model: activate, disable, delete, count."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gralora.config import LARGEST_WEIGHT, GraloraConfig
from gralora.engines.distributed import no_more_trained, reshard
from gralora.engines.walk import modules
from gralora.layers.adapter import GraloraAdapters
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.class_change import freeze_own
from gralora.layers.pending import moment, set_trained
from gralora.layers.scope import OFF, Switchable, rows_of, switched
from gralora.model.record import forget, vanished, warn_of
from gralora.model.saved import BiasSwap, SavedCopies, bias_swaps, saved_modules, slot
from gralora.model.state import (
    activate,
    all_or_nothing,
    check_among,
    check_known,
    check_unmerged,
    known_adapters,
    named_adapter_parameters,
    put_back_weight,
    switch,
)
from gralora.model.statistics import put_back
from gralora.model.survey import survey


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of `model`, active or not."""
    return known_adapters(model)


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters that are active, with their weights, as `set_adapter` takes them; {} within
    `disable_adapter`.
    """
    found: dict[str, float] = {}
    for _, layer in gralora_layers(model):
        if layer.gralora_adapters.mode is not OFF:
            found.update(layer.gralora_adapters.active)
    for _, saved in saved_modules(model):
        if saved.gralora_saved.active is not None and saved.gralora_saved.mode is not OFF:
            found.setdefault(saved.gralora_saved.active, 1.0)
    return found


class AdapterStatus(NamedTuple):
    """What there is to know of one adapter.

    Attributes:
        active: its weight, None if it does not act. merged: the weight with which it is in the
            weights, None if it is not.
        trained: whether its parameters require gradients.
        configs: of every layer by name.
        vanished: what it was injected into and that is there no more.
    """

    active: float | None
    merged: float | None
    trained: bool
    configs: dict[str, GraloraConfig]
    vanished: list[str]


def adapter_status(model: nn.Module, name: str = "default") -> AdapterStatus:
    """Whether an adapter acts, is merged, is trained, with which config on each layer, and what of
    it has vanished.

    Raises:
        KeyError: no such adapter.
    """
    check_known(model, name)
    layers = [
        (path, layer.gralora_adapters)
        for path, layer in gralora_layers(model)
        if name in layer.gralora_adapters
    ]
    merged = next(
        (adapters.merged[name] for _, adapters in layers if name in adapters.merged), None
    )
    trained = any(
        parameter.requires_grad for parameter in named_adapter_parameters(model, name).values()
    )
    configs = {path: adapters[name].config for path, adapters in layers}
    return AdapterStatus(
        active_adapters(model).get(name), merged, trained, configs, vanished(model, [name])
    )


def set_adapter(
    model: nn.Module,
    names: str | Collection[str] | Mapping[str, float],
    *,
    trainable: bool | str | Collection[str] | None = None,
) -> None:
    """Make exactly these adapters active, and trainable: one name, several, or {name: weight}.

    The updates of several add up. Merged adapters are unmerged first, exactly. An empty list leaves
    the base model. Gradients belong to what acted in the forward: a backward that comes after the
    switch still reaches the parameters of then. Only activation checkpointing, which runs the
    forward again, can't: it raises.

    Args:
        trainable: which are trained, whatever acts: names, or True for the active ones and False
            for none; None is True.

    Raises:
        KeyError: an unknown name; those there are, are listed. ValueError: two of them train the
            same bias or saved module; or the model is under `DistributedDataParallel`, and would
            train what it did not when it was wrapped. The model is then unchanged.
    """
    weights = weights_of(names)
    trained = weights if trainable is None or trainable is True else weights_of(trainable or ())
    found = survey(model)
    check_among(found.names(), *weights, *trained)
    warn_of([part for name in weights for part in found.gone(name)])
    if found.only_adapters:
        switch((adapters for _, adapters in found.layers), weights, trained, moment())
        return
    _refuse_shared(model, weights)
    with all_or_nothing(model), no_more_trained(model):
        for _, layer in gralora_layers(model):
            put_back_weight(layer)
        activate(model, weights, trained=trained, now=moment())


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base model, bit for bit; afterwards it is as it was. May be
    nested.

    Of blocks within blocks the innermost counts: a `mixed_batch` within this one acts.
    `set_adapter` within it says what acts once it ends. Other threads are not affected, save by
    what is changed in the model itself for the time of the block: merged weights, biases that an
    adapter trains, and buffers that its training has moved.
    """
    with ExitStack() as stack:
        for _, layer in gralora_layers(model):
            base = layer.gralora_adapters.base_weight
            if base is not None:
                owner, name = layer.map.place
                # undone in reverse: where maps share a parameter, the first of them puts the merged
                # one back
                stack.callback(
                    _merge_again,
                    layer,
                    owner._parameters[name],
                    base,
                    dict(layer.gralora_adapters.merged),
                )
                put_back_weight(layer)
        _put_base_biases(model, stack)
        for module in modules(model):
            moved = put_back(module)
            if moved:
                stack.callback(_move_again, module, moved)
        stack.enter_context(switched(_containers(model), OFF))
        yield


@contextmanager
def mixed_batch(
    model: nn.Module,
    names_per_sample: Sequence[str | None],
    *,
    dim: int = 0,
    repeat: str | None = None,
) -> Iterator[None]:
    """Within the block every row of a batch goes through its own adapter: one name per row, None
    for the base.

    Which adapters are active does not matter; each acts with weight 1. Rows are grouped by adapter,
    so the base runs once for all. Other threads are not affected. In a generator that holds the
    block open over its yields, the block holds while the generator runs, whoever resumes it.

    Args:
        dim: the axis of the batch in what the layers get; 1 for models that put the sequence first.
        repeat: whose the rows are where a layer gets a multiple of them. "interleave": each name
            holds for that many in a row, as with beams, or tokens laid out row by row. "tile": the
            names over and over, as where a batch is put together of itself (classifier-free
            guidance). None: such a layer raises.

    Raises:
        KeyError: an unknown name. ValueError: an adapter is merged, trains biases, or is one of
            fused experts, whose rows can't be told apart; or, in a forward, a batch that does not
            fit.
    """
    if isinstance(names_per_sample, str) or not names_per_sample:
        raise ValueError(
            f"names_per_sample={names_per_sample!r} must hold one name, or None, for every row of"
            " the batch."
        )
    if repeat not in (None, "interleave", "tile"):
        raise ValueError(
            f'repeat={repeat!r} is not legal: it must be "interleave", "tile" or None.'
        )
    wanted = dict.fromkeys(name for name in names_per_sample if name is not None)
    check_known(model, *wanted)
    _refuse_mixing(model, wanted)
    with ExitStack() as stack:
        _put_base_biases(model, stack)
        stack.enter_context(
            switched(_containers(model), rows_of(tuple(names_per_sample), dim, repeat))
        )
        yield


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove one adapter, with its biases and saved modules. Layers left without an adapter are as
    their base.

    Raises:
        KeyError: no such adapter. ValueError: it is merged; unmerge first. The model is then
            unchanged.
    """
    check_known(model, name)
    check_unmerged(model, name)
    with all_or_nothing(model):
        for _, layer in gralora_layers(model):
            if name in layer.gralora_adapters:
                layer.gralora_adapters.remove(name)
        for _, saved in saved_modules(model):
            if name in saved.gralora_saved:
                saved.gralora_saved.active = (
                    None if saved.gralora_saved.active == name else saved.gralora_saved.active
                )
                del saved.gralora_saved._modules[name]
        for _, owner, swap in bias_swaps(model):
            if name in swap.names:
                if swap.in_place == name:
                    swap.put(owner, BiasSwap.BASE)
                del swap._parameters[slot(name)]
                swap.names.remove(name)
        forget(model, name)


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters of one adapter, or of all, saved modules and trained biases included: what an
    optimizer takes.
    """
    if adapter_name is not None:
        check_known(model, adapter_name)
    names = known_adapters(model) if adapter_name is None else [adapter_name]
    found = [p for name in names for p in named_adapter_parameters(model, name).values()]
    return list({id(p): p for p in found}.values())


def mark_only_adapters_trainable(model: nn.Module) -> None:
    """Freeze everything but the active adapters and what is trained with them. `unload` undoes
    it.
    """
    ours = (GraloraAdapters, SavedCopies, BiasSwap)
    mine = {id(m) for module in modules(model) if isinstance(module, ours) for m in modules(module)}
    active: set[str] = set()
    reshard(model)
    for _, layer in gralora_layers(model):
        active.update(layer.gralora_adapters.active)
    for _, saved in saved_modules(model):
        active.update([saved.gralora_saved.active] if saved.gralora_saved.active else [])
    for _, owner, swap in bias_swaps(model):
        active.add(swap.in_place)
        swap.get(owner, BiasSwap.BASE).requires_grad_(False)
    for parameter in adapter_parameters(model):
        set_trained(parameter, False)
    for module in modules(model):
        if id(module) not in mine:
            freeze_own(module)
    for name in known_adapters(model):
        for parameter in named_adapter_parameters(model, name).values():
            set_trained(parameter, name in active)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of parameters, tied ones once, those without a shape left out."""
    parameters = [p for p in model.parameters() if not is_lazy(p)]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the counts in PEFT's line."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def _containers(model: nn.Module) -> Iterator[Switchable]:
    return (module for module in modules(model) if isinstance(module, Switchable))


def _put_base_biases(model: nn.Module, stack: ExitStack) -> None:
    for _, owner, swap in bias_swaps(model):
        stack.callback(swap.put, owner, swap.in_place)
        swap.put(owner, BiasSwap.BASE)


def _refuse_mixing(model: nn.Module, names: Collection[str]) -> None:
    for path, layer in gralora_layers(model):
        if layer.gralora_adapters.merged:
            raise ValueError(
                f"{path!r} has an adapter merged into it, for every row alike: unmerge first."
            )
    for key, _, swap in bias_swaps(model):
        both = [name for name in names if name in swap.names]
        if both:
            raise ValueError(
                f"adapter {both[0]!r} trains {key!r}, a bias, which can't be chosen per row."
            )


def weights_of(names: Any) -> dict[str, float]:
    """The forms in which adapters are named, as name -> weight."""
    if isinstance(names, str):
        return {names: 1.0}
    if isinstance(names, Mapping):
        for name, weight in names.items():
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not abs(weight) <= LARGEST_WEIGHT
            ):
                rule = f"it must be a finite number, of at most {LARGEST_WEIGHT:g}"
                raise ValueError(f"the weight of adapter {name!r} is {weight!r}: {rule}.")
        return {name: float(weight) for name, weight in names.items()}
    if isinstance(names, Collection):
        return dict.fromkeys(names, 1.0)
    raise TypeError(
        f"names={names!r} is not legal: it must be a name, a list of names, or a mapping name ->"
        " weight."
    )


def _refuse_shared(model: nn.Module, names: Collection[str]) -> None:
    places: list[tuple[str, list[str]]] = [(key, swap.names) for key, _, swap in bias_swaps(model)]
    places += [(path, list(saved.gralora_saved)) for path, saved in saved_modules(model)]
    for place, users in places:
        both = [name for name in names if name in users]
        if len(both) > 1:
            raise ValueError(
                f"adapters {' and '.join(map(repr, both))} both train {place!r}: only one can be"
                " active."
            )


@torch.no_grad()
def _move_again(module: nn.Module, moved: Mapping[str, Tensor]) -> None:
    for key, value in moved.items():
        cast(Tensor, module._buffers[key]).copy_(value)


def _merge_again(
    layer: GraloraLayer, merged: nn.Parameter | None, base: nn.Parameter, state: dict[str, float]
) -> None:
    owner, name = layer.map.place
    owner._parameters[name] = merged
    layer.gralora_adapters.__dict__["base_weight"] = base
    layer.gralora_adapters.merged = state
