"""The state of an adapted model: which adapters it has, which act, and how a failed change is
undone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from gralora.engines.distributed import reshard
from gralora.engines.walk import modules
from gralora.layers.adapter import GraloraAdapters, check_adapter_name
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.class_change import join
from gralora.layers.loading import factor_key
from gralora.layers.pending import set_trained
from gralora.model.saved import bias_swaps, saved_modules
from gralora.model.survey import survey

T = TypeVar("T")

SHARED = "_gralora_shared"
"""An attribute of parameters whose memory another model has too: nothing may be merged into it in
place.
"""


class UnknownAdapterError(KeyError):
    """An adapter was named that the model does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


def known_adapters(model: nn.Module) -> list[str]:
    """The names of all adapters of `model`."""
    return survey(model).names()


def check_known(model: nn.Module, *names: str) -> None:
    """Raise UnknownAdapterError, listing those there are, unless the model has every one of
    `names`.
    """
    check_among(known_adapters(model), *names)


def check_among(known: Collection[str], *names: str) -> None:
    """The same, of adapters that are known."""
    for name in names:
        if name not in known:
            raise UnknownAdapterError(
                f"no adapter {name!r} in this model; it has: {', '.join(known) or 'none'}."
            )


def check_new(model: nn.Module, name: str) -> None:
    """Raise unless `name` can name a further adapter of the model."""
    check_adapter_name(name)
    if name in known_adapters(model):
        raise ValueError(
            f"adapter {name!r} is in this model already; delete it first, or choose another name."
        )


def check_unmerged(model: nn.Module, name: str) -> None:
    """Raise ValueError if the adapter `name` is within some layer's weight, where a change to it
    would have no effect.
    """
    for path, layer in gralora_layers(model):
        if name in layer.gralora_adapters.merged:
            raise ValueError(
                f"adapter {name!r} is merged (in {path!r}, for one) and can't be changed: unmerge"
                " first."
            )


def named_adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All that is trained with the adapter `name`, under the keys of a file.

    `<module>.gralora_A` and so on for adapters; saved modules and biases under their own names.
    Buffers of saved modules are not among them.
    """
    reshard(model)
    found: dict[str, nn.Parameter] = {}
    for path, layer in gralora_layers(model):
        if name in layer.gralora_adapters:
            found.update(adapter_keys(path, dict(layer.gralora_adapters[name].named_parameters())))
    for path, saved in saved_modules(model):
        if name in saved.gralora_saved:
            found.update(
                {join(path, key): p for key, p in saved.gralora_saved[name].named_parameters()}
            )
    for key, owner, swap in bias_swaps(model):
        if name in swap.names:
            found[key] = swap.get(owner, name)
    return found


def adapter_keys(path: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """The keys of one layer's adapter in a file: PEFT's, without its prefix."""
    return {join(path, factor_key(name)): tensor for name, tensor in tensors.items()}


def activate(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    trained: Collection[str] | None = None,
    now: int = 0,
) -> None:
    """Make exactly the adapters in `weights` (name -> weight) act, and exactly those in `trained`
    be trained; None: the same.

    Args:
        now: the `moment` of the switch, where forwards may wait for their backward.
    """
    trained = weights if trained is None else trained

    def train(name: str, parameters: Iterable[nn.Parameter | None]) -> None:
        for parameter in parameters:
            if parameter is not None:
                set_trained(parameter, name in trained)

    for _, layer in gralora_layers(model):
        adapters = layer.gralora_adapters
        active = {name: weight for name, weight in weights.items() if name in adapters}
        if active != adapters.active:
            adapters.active, adapters.__dict__["changed"] = active, now
        for name in adapters:
            train(name, adapters[name]._parameters.values())
    for _, saved in saved_modules(model):
        copies = saved.gralora_saved
        copies.active = next((name for name in weights if name in copies), None)
        for name in copies:
            train(name, copies[name].parameters())
    for _, owner, swap in bias_swaps(model):
        swap.put(owner, next((name for name in weights if name in swap.names), swap.BASE))
        for name in swap.names:
            train(name, [swap.get(owner, name)])


def switch(
    containers: Iterable[GraloraAdapters],
    weights: Mapping[str, float],
    trained: Collection[str],
    now: int,
) -> None:
    """`activate` where there is nothing but adapters, all or nothing: a few microseconds for a
    layer.
    """
    found = [adapters.__dict__ for adapters in containers]
    wrong = [
        (parameter, name in trained)
        for own in found
        for name, adapter in own["_modules"].items()
        for parameter in adapter.__dict__["_parameters"].values()
        if parameter is not None and parameter.requires_grad is not (name in trained)
    ]
    before: list[tuple[Any, ...]] = []
    flags: list[tuple[nn.Parameter, bool]] = []
    asked = list(weights.items())
    sole = asked[0] if len(asked) == 1 else None
    try:
        for own in found:
            modules = own["_modules"]
            acting = tuple([(modules[name], weight) for name, weight in asked if name in modules])
            if acting != own["acting"]:
                before.append((own, own["active"], own["acting"], own.get("sole"), own["changed"]))
                mine = (
                    asked
                    if len(acting) == len(asked)
                    else [each for each in asked if each[0] in modules]
                )
                own["active"], own["acting"], own["changed"] = dict(mine), acting, now
                own["sole"] = sole if mine is asked else mine[0] if len(mine) == 1 else None
        for parameter, wanted in wrong:
            flags.append((parameter, not wanted))
            set_trained(parameter, wanted)
    except BaseException:
        for own, *fields in before:
            own.update(zip(("active", "acting", "sole", "changed"), fields, strict=True))
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise


def put_back_weight(layer: GraloraLayer) -> None:
    """Give a merged layer its own weight back, the very object, bit for bit.

    Where several maps share one parameter, all of them have to be put back.
    """
    adapters = layer.gralora_adapters
    base = adapters.base_weight
    if base is not None:
        owner, name = layer.map.place
        now = owner._parameters[name]
        if now is not None and (now.device, now.dtype) != (
            base.device,
            base.dtype,
        ):  # moved while merged
            base.data = base.data.to(now.device, now.dtype)
        owner._parameters[name] = base
        adapters.__dict__["base_weight"] = None
    adapters.merged = {}


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """On an exception, put every module of `model` back as it was: class, registers, attributes,
    requires_grad.

    Values written into tensors in place are not covered.
    """
    reshard(model)
    before = [
        (module, module.__class__, module.__dict__.copy(), _contents(module))
        for module in modules(model)
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, register in attributes.items():
                if isinstance(register, list):
                    register[:] = contents.get(name, ())
                elif isinstance(register, (dict, set)):
                    register.clear()
                    register.update(contents.get(name, ()))
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    """What is in each attribute of a module that can hold something, empty ones left out."""
    return {
        name: value.copy()
        for name, value in module.__dict__.items()
        if isinstance(value, (dict, set, list)) and value
    }
