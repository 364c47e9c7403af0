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
from gralora.layers.adapter import GraloraAdapter, check_adapter_name
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.class_change import join
from gralora.layers.loading import factor_key
from gralora.layers.pending import set_trained
from gralora.model.index import Containers, Index, known_adapters
from gralora.model.saved import SavedCopies, saved_modules

T = TypeVar("T")


class UnknownAdapterError(KeyError):
    """An adapter was named that the model does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


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

    `<module>.gralora_A` and so on for adapters, `<module>.gralora_bias` for what one adds to the
    bias; copies of modules under their own names. Buffers of copies are not among them.
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
    return found


def adapter_keys(path: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """The keys of one layer's adapter in a file: PEFT's, without its prefix."""
    return {join(path, factor_key(name)): tensor for name, tensor in tensors.items()}


def activate(found: Index, weights: Mapping[str, float], trained: Collection[str]) -> None:
    """Make exactly the adapters in `weights` (name -> weight) active, and train exactly those in
    `trained`; all or nothing.
    """
    before: list[tuple[Containers, Any]] = []
    flags: list[tuple[nn.Parameter, bool]] = []
    try:
        for container in found.containers:
            before.append((container, container.active))
            active = {name: weight for name, weight in weights.items() if name in container}
            if isinstance(container, SavedCopies):
                container.active = next(iter(active), None)
            elif list(active.items()) != list(container.active.items()):
                container.active = active
            for name in container:
                wanted = name in trained
                for parameter in _parameters(container[name]):
                    if parameter.requires_grad is not wanted:
                        flags.append((parameter, not wanted))
                        set_trained(parameter, wanted)
    except BaseException:
        for container, active_before in before:
            container.active = active_before
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise


def _parameters(own: nn.Module) -> Iterable[nn.Parameter]:
    """Those of an adapter, in a fraction of the time that `parameters()` takes, or of a copy."""
    if isinstance(own, GraloraAdapter):
        return [p for p in own._parameters.values() if p is not None]
    return own.parameters()


def put_back_weight(layer: GraloraLayer) -> None:
    """Give a merged layer its own weight and bias back, the same objects, bit for bit.

    Where several maps share one parameter, all of them have to be put back.
    """
    adapters = layer.gralora_adapters
    for aside, (owner, name) in layer.map.places.items():
        base: nn.Parameter | None = getattr(adapters, aside)
        if base is None:
            continue
        now = owner._parameters[name]
        if now is not None and (now.device, now.dtype) != (base.device, base.dtype):
            base.data = base.data.to(now.device, now.dtype)  # moved while merged
        owner._parameters[name] = base
        setattr(adapters, aside, None)
    adapters.merged = {}


@contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[None]:
    """On an exception, restore every module of the models: class, registers, attributes, and
    `requires_grad`.

    Values that are written into tensors in place are not covered.
    """
    for model in models:
        reshard(model)
    changing = dict.fromkeys(m for model in models for m in modules(model))
    before = [(m, m.__class__, m.__dict__.copy(), _contents(m)) for m in changing]
    parameters = [p for m, *_ in before for p in m.parameters(recurse=False)]
    trained = [(parameter, parameter.requires_grad) for parameter in parameters]
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
