"""What a user does to an adapted model: activate, disable, delete, count."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from gralora.config import LARGEST_WEIGHT, GraloraConfig
from gralora.engines.distributed import no_more_trained, reshard
from gralora.engines.walk import modules
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.class_change import freeze_own
from gralora.layers.pending import set_trained
from gralora.layers.scope import OFF, Rows, Switchable, switched
from gralora.model.index import Index, forget, index, known_adapters, missing, warn_of
from gralora.model.saved import saved_modules
from gralora.model.state import (
    activate,
    all_or_nothing,
    check_among,
    check_known,
    check_unmerged,
    named_adapter_parameters,
    put_back_weight,
)


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
        missing: what it was injected into and is no longer in the model.
    """

    active: float | None
    merged: float | None
    trained: bool
    configs: dict[str, GraloraConfig]
    missing: list[str]


def adapter_status(model: nn.Module, name: str = "default") -> AdapterStatus:
    """Whether an adapter acts, is merged, is trained, with which config on each layer, and what of
    is missing.

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
        active_adapters(model).get(name), merged, trained, configs, missing(model, [name])
    )


def set_adapter(
    model: nn.Module,
    names: str | Collection[str] | Mapping[str, float],
    *,
    trainable: bool | str | Collection[str] | None = None,
) -> None:
    """Make exactly these adapters active, and trainable: one name, several, or {name: weight}.

    The updates of several add up. Merged adapters are unmerged first, exactly. An empty list leaves
    the base model. Gradients of an earlier forward still reach the adapters of that forward, except
    under activation checkpointing, which runs the forward again in the backward: there, call
    backward before `set_adapter`.

    Args:
        trainable: which adapters are trained, independently of which are active: names, or True for
            the active ones and False for none; None is True.

    Raises:
        KeyError: an unknown name; the message lists the known ones. ValueError: two of them train
            copies of the same module; or the model is under `DistributedDataParallel`, and would
            train parameters that were frozen when it was wrapped. The model is then unchanged.
    """
    weights = weights_of(names)
    trained = weights if trainable is None or trainable is True else weights_of(trainable or ())
    found = index(model)
    check_among(found.adapter_names(), *weights, *trained)
    warn_of([part for name in weights for part in found.missing(name)])
    _check_one_copy(found, weights)
    merged = [layer for _, layer in found.layers if layer.gralora_adapters.merged]
    with ExitStack() as stack:
        if merged or found.has_engine:
            stack.enter_context(all_or_nothing(model))
            stack.enter_context(no_more_trained(model))
        for layer in merged:
            put_back_weight(layer)
        activate(found, weights, trained)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base model, bit for bit; afterwards it is as it was. May be
    nested.

    Of nested blocks the innermost applies: a `mixed_batch` within this one uses its adapters.
    `set_adapter` within it sets what is active once it ends. The block holds for the thread or task
    that opened it, as `torch.no_grad` does; only merged weights are replaced in the model itself,
    and so for all threads. Buffers that the model writes are left as they are.
    """
    with ExitStack() as stack:
        for _, layer in gralora_layers(model):
            if layer.gralora_adapters.merged:
                # undone in reverse: of maps that share a parameter, the first puts it back last
                stack.callback(_merge_again, layer, layer.gralora_adapters.merged, _placed(layer))
                put_back_weight(layer)
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

    Which adapters are active does not matter; each is used with weight 1. Rows are grouped by
    adapter, so the base runs once for all. The block holds for the thread or task that opened it,
    as `torch.no_grad` does. A generator that yields inside the block runs inside it whoever resumes
    it, and may leak it to its consumer between its steps.

    Args:
        dim: the axis of the batch in what the layers get; 1 for models that put the sequence first.
        repeat: whose the rows are where a layer gets a multiple of them. "interleave": each name
            holds for that many in a row, as with beams, or tokens laid out row by row. "tile": the
            names over and over, as where a batch is put together of itself (classifier-free
            guidance). None: such a layer raises.

    Raises:
        KeyError: an unknown name. ValueError: an adapter is merged, or, in a forward, a batch does
            not fit or the rows of fused experts are unknown.
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
    for path, layer in gralora_layers(model):
        if layer.gralora_adapters.merged:
            raise ValueError(
                f"{path!r} has an adapter merged into it, for every row alike: unmerge first."
            )
    with switched(_containers(model), Rows(names_per_sample, dim, repeat)):
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
    found = index(model)
    active = {name for _, layer in found.layers for name in layer.gralora_adapters.active}
    active |= {saved.gralora_saved.active or "" for _, saved in found.saved}
    ours = {id(m) for container in found.containers for m in modules(container)}
    reshard(model)
    for module in modules(model):
        if id(module) not in ours:
            freeze_own(module)
    for name in found.adapter_names():
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


def _check_one_copy(found: Index, names: Collection[str]) -> None:
    for path, saved in found.saved:
        both = [name for name in names if name in saved.gralora_saved]
        if len(both) > 1:
            raise ValueError(
                f"adapters {' and '.join(map(repr, both))} both train a copy of {path!r}: only one"
                " can be active."
            )


Placed = dict[str, tuple[nn.Parameter | None, nn.Parameter | None]]


def _placed(layer: GraloraLayer) -> Placed:
    """(the parameter in place, the one that is set aside) for weight and bias."""
    adapters, places = layer.gralora_adapters, layer.map.places
    return {
        aside: (owner._parameters.get(name), getattr(adapters, aside))
        for aside, (owner, name) in places.items()
    }


def _merge_again(layer: GraloraLayer, merged: dict[str, float], placed: Placed) -> None:
    for aside, (owner, name) in layer.map.places.items():
        parameter, base = placed[aside]
        if base is not None:
            owner._parameters[name] = parameter
            setattr(layer.gralora_adapters, aside, base)
    layer.gralora_adapters.merged = merged
