"""`inject` and `unload`: adapters into any model, and out of it without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from gralora.config import GraloraConfig, as_config
from gralora.engines.distributed import check_unwrapped
from gralora.engines.offload import is_offloaded
from gralora.engines.walk import modules
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.class_change import freeze_own, restore_class, thaw_own
from gralora.layers.parts import PartHost
from gralora.model.defaults import peft_layers, settled, task_heads, untrained
from gralora.model.index import LEFT_OUT, forget, index, known_adapters, record
from gralora.model.loftq import Reference, start_near
from gralora.model.partial_copies import SavedBiases
from gralora.model.saved import (
    SAVED_CHILD,
    add_copy,
    check_units,
    copies_of,
    is_bias,
    saved_modules,
    units,
)
from gralora.model.state import (
    activate,
    all_or_nothing,
    check_new,
    named_adapter_parameters,
    put_back_weight,
)
from gralora.model.statistics import freeze_norms, restore_norms
from gralora.model.targets import Names, Target, Targets, nearest, resolve
from gralora.model.tokens import TiedRows, TokenRows, tied_to, wanted_tokens

NESTED = "_gralora_use_nested_tensor"


@dataclass
class Plan:
    """What one adapter puts where; everything in it has been checked."""

    targets: list[Target]
    saved: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, tuple[nn.Module, list[str]]] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    reset: bool = True
    tied: bool = True
    tokens: dict[str, tuple[nn.Module, tuple[int, ...]]] = field(default_factory=dict)


def inject(
    model: nn.Module,
    targets: Targets = None,
    config: Any = None,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    reference: Reference = None,
    errors: dict[str, tuple[float, float]] | None = None,
) -> nn.Module:
    """Give layers of `model` a GraLoRA adapter, in place, and return `model`.

    Every target becomes a `GraloraLinear` or `GraloraConv1D` in place. The model's output is
    unchanged until the adapter is trained. The first adapter is active, and then only it (plus what
    `bias` and `modules_to_save` name) requires gradients; a further one is inactive and frozen
    until `set_adapter`.

    Args:
        targets: which layers. A regular expression for the whole qualified name, or a function
            (name, module) -> bool: filters, so what they take and holds no weight is passed over; a
            list of names or dotted suffixes; "all-linear" (every layer but the output head); a
            mapping from any of these to its own config (the first match wins); None for
            `config.target_modules`, then a default by `model.config.model_type`. Fused experts, a
            3-D parameter, are adapted where a target matches the parameter's name, and for a
            pattern or function not its module's.
        config: a `GraloraConfig`; PEFT's own, or a dict of fields, is taken as well;
            `GraloraConfig()` if None.
        dtype: of the adapter's parameters. By default the base weight's, but float32 for half
            precision and quantised.
        reference: for `init_weights="loftq"`: the model before it was quantised, a mapping of its
            parameters' names to tensors, or the path of its checkpoint, a .safetensors file or a
            folder.
        errors: for the same: a dict to be filled with ‖reference - base‖ / ‖reference‖ of each
            layer, without the adapter and with it.

    Raises:
        ValueError: a target cannot be adapted, nothing matches, or the name is in use. The model is
            then unchanged.
    """
    check_new(model, adapter_name)
    theirs = peft_layers(model)
    if theirs:
        raise ValueError(
            f"this model holds PEFT's own layers ({theirs[0]!r}), whose adapters would stay frozen"
            " in silence. First unload() or merge_and_unload() them; load_adapter reads what PEFT"
            " has saved."
        )
    names, config = Names(model), as_config(config)
    if config is not None:
        config = settled(model, config)
    found = resolve(model, targets, config, names)
    configs = list(dict.fromkeys([*(t.config for t in found), *([config] if config else [])]))
    plan = Plan(found, _saved_units(model, configs, names))
    plan.tokens = _tokens(model, configs, names)
    plan.biases = _biases(plan, configs, names)
    if dtype is not None:
        plan.dtypes = {t.name: dtype for t in found}
    _warn_of_heads(model, plan)
    loftq = {t.name for t in found if t.config.init_weights == "loftq"}
    if bool(loftq) != (reference is not None):
        lacking = (
            'init_weights="loftq" needs a reference: the model, or its checkpoint, before it was'
            " quantised."
        )
        raise ValueError(
            lacking
            if loftq
            else 'reference is for init_weights="loftq", which no config of these targets has.'
        )
    with all_or_nothing(model):
        install(model, plan, adapter_name)
        near = (
            {path: layer for path, layer in gralora_layers(model) if path in loftq} if loftq else {}
        )
        start_near(model, near, adapter_name, reference, errors) if near else None
    if names.left_out:
        model.__dict__[LEFT_OUT] = tuple(names.left_out)
    return model


def install(
    model: nn.Module,
    plan: Plan,
    adapter_name: str,
    *,
    trainable: bool | None = None,
) -> None:
    """Carry out a plan, within the caller's `all_or_nothing`.

    The model's first adapter becomes active and, unless `trainable` says otherwise, is trained; a
    further one is neither.
    """
    check_unwrapped(model)
    first = not known_adapters(model)
    trainable = first if trainable is None else trainable
    check_units(model, plan.saved, [t.map.module for t in plan.targets])
    rows = _token_rows(model, plan)
    adapters = _adapters(plan)
    copies = copies_of(plan.saved.values(), tied=plan.tied)
    biases = [SavedBiases(owner, names) for owner, names in plan.biases.values()]
    if first:
        for module in modules(model):
            freeze_own(module)
    for target, adapter in zip(plan.targets, adapters, strict=True):
        target.map.attach().add(adapter_name, adapter)
    for unit, replica in zip(plan.saved.values(), copies, strict=True):
        add_copy(unit, adapter_name, replica)
    for unit, own in rows:
        add_copy(unit, adapter_name, own)
    for (owner, _), bias in zip(plan.biases.values(), biases, strict=True):
        add_copy(owner, adapter_name, bias)
    _keep_nested_tensors_out(model)
    freeze_norms(model)
    record(
        model,
        adapter_name,
        [*(t.name for t in plan.targets), *plan.saved, *plan.tokens, *plan.biases],
    )
    if first:
        activate(index(model), {adapter_name: 1.0}, [adapter_name] if trainable else ())
    else:
        for trained in named_adapter_parameters(model, adapter_name).values():
            trained.requires_grad_(trainable)


def _warn_of_heads(model: nn.Module, plan: Plan) -> None:
    """Tell of a new head that would stay frozen, and as it was drawn."""
    taken = {t.name for t in plan.targets} | set(plan.saved)
    for name in task_heads(model):
        inside = any(each == name or each.startswith(f"{name}.") for each in taken)
        if not inside and untrained(model, name):
            warnings.warn(
                f"{name!r}, the head of this {type(model).__name__}, looks as if nobody had trained"
                " it, and stays frozen. "
                f'modules_to_save=[{name!r}], or "auto", trains it with the adapter.',
                UserWarning,
                stacklevel=3,
            )


def _adapters(plan: Plan) -> list[GraloraAdapter]:
    """One for each target; one for several where they share a weight and `ensure_weight_tying` is
    set.
    """
    shared: dict[tuple[int, tuple[int, int]], GraloraAdapter] = {}
    result = []
    for target in plan.targets:
        key = id(target.map.weight), target.map.sizes
        own = shared.get(key) if target.config.ensure_weight_tying else None
        if own is None:
            reset = (
                plan.reset and target.config.init_weights != "loftq"
            )  # which comes of the reference
            own = target.map.new_adapter(target.config, plan.dtypes.get(target.name), reset=reset)
        shared[key] = own
        result.append(own)
    return result


def _tokens(
    model: nn.Module, configs: list[GraloraConfig], names: Names
) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    known = {name: module for _, its, module in names for name in its}
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for wanted in dict.fromkeys(
        c.trainable_token_indices for c in configs if c.trainable_token_indices is not None
    ):
        for name, tokens in wanted_tokens(model, wanted, known).items():
            found[name] = known[name], tokens
    unique = {id(module): name for name, (module, _) in reversed(found.items())}
    return {name: found[name] for name in found if name in unique.values()}


def _token_rows(model: nn.Module, plan: Plan) -> list[tuple[nn.Module, TokenRows]]:
    """The rows of every embedding whose tokens are trained, and of what is tied to it."""
    adapted = {id(t.map.module): t.name for t in plan.targets}
    adapted.update({id(layer): path for path, layer in gralora_layers(model)})
    whole = {id(m) for unit in plan.saved.values() for m in modules(unit)}
    result: list[tuple[nn.Module, TokenRows]] = []
    for name, (embedding, tokens) in plan.tokens.items():
        weight = cast(Tensor, embedding._parameters["weight"])
        if weight.is_meta or is_offloaded(embedding, "weight"):
            raise ValueError(
                f"the weight of {name!r} is on the meta device, or offloaded: there are no rows to"
                " train."
            )
        leader = TokenRows(weight, torch.tensor(tokens, device=weight.device))
        result.append((embedding, leader))
        result += [(tied, TiedRows(leader)) for tied in tied_to(model, embedding)]
    for module, _ in result:
        if id(module) in adapted or id(module) in whole:
            raise ValueError(
                f"tokens of {adapted.get(id(module), 'an embedding')!r} are in"
                " trainable_token_indices, and the layer is adapted or in modules_to_save as well:"
                " one of them."
            )
    return result


def unload(model: nn.Module) -> nn.Module:
    """Take every adapter out: classes, parameters, `requires_grad` and outputs are again those
    before `inject`.

    Merged adapters are unmerged, saved modules and biases are the base's own. Use
    `merge_and_unload` to keep the effect.
    """
    with all_or_nothing(model):
        for _, saved in list(saved_modules(model)):
            del saved._modules[SAVED_CHILD]
            restore_class(saved)
        layers = [layer for _, layer in gralora_layers(model)]
        for layer in layers:
            put_back_weight(layer)
        for layer in layers:
            layer.detach()
        restore_norms(model)
        forget(model)
        model.__dict__.pop(LEFT_OUT, None)
        for module in modules(model):
            thaw_own(module)
            if NESTED in module.__dict__:
                module.use_nested_tensor = module.__dict__.pop(NESTED)
    return model


def _keep_nested_tensors_out(model: nn.Module) -> None:
    # Nested tensors can be read by the fused path alone, and an adapted layer switches that off.
    for module in modules(model):
        if isinstance(module, nn.TransformerEncoder) and getattr(
            module, "use_nested_tensor", False
        ):
            if any(
                isinstance(m, GraloraLayer) or SAVED_CHILD in m._modules for m in modules(module)
            ):
                module.__dict__[NESTED] = module.use_nested_tensor
                module.use_nested_tensor = False


def _saved_units(
    model: nn.Module, configs: list[GraloraConfig], names: Names
) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for wanted in dict.fromkeys(
        name for config in configs for name in config.modules_to_save or ()
    ):
        modules = names.find([wanted])
        if not modules:
            known = [its[0] for _, its, _ in names]
            raise ValueError(
                f"modules_to_save names {wanted!r}, which this model lacks. Nearest:"
                f" {nearest(wanted, known)}."
            )
        for name, module in modules:
            found.update(units(module, name))
    unique = {id(unit): name for name, unit in reversed(found.items())}
    return {name: unit for name, unit in found.items() if unique[id(unit)] == name}


def _biases(
    plan: Plan, configs: list[GraloraConfig], names: Names
) -> dict[str, tuple[nn.Module, list[str]]]:
    """The modules whose biases are trained in a copy, with their names: with bias="all", those
    outside of the adapted maps and saved modules.
    """
    maps = [t.map for t in plan.targets if t.config.bias != "none"]
    for each in maps:
        check_bias_is_here(each.bias_place, names)
    if not any(config.bias == "all" for config in configs):
        return {}
    adapted = {id(owner) for each in maps for owner in (each.module, each.bias_place[0])}
    covered = {(id(owner), name) for owner, name in (each.bias_place for each in maps)}
    saved = {id(m) for unit in plan.saved.values() for m in modules(unit)}
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    for key, its_names, module in names:
        owned = [name for name in list(module._parameters) if is_bias(name)]
        own = [n for n in owned if (key, n) not in covered and module._parameters[n] is not None]
        if not own or key in saved:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"the bias of {its_names[0]!r} is in TorchScript, where it can't be trained:"
                " bias='gralora_only' leaves it."
            )
        if key in adapted or isinstance(module, (GraloraLayer, PartHost)):
            raise ValueError(
                f"bias='all' includes {own[0]!r} of {its_names[0]!r}, a module that is adapted in"
                " part or by another adapter, so its biases have no copy. Adapt all of it, or use"
                " bias='gralora_only'."
            )
        check_bias_is_here((module, own[0]), names)
        found[its_names[0]] = module, own
    return found


def check_bias_is_here(place: tuple[nn.Module, str], names: Names) -> None:
    """Raise ValueError if a bias is offloaded."""
    if is_offloaded(*place):
        raise ValueError(
            f"the bias of {names.names[id(place[0])][0]!r} is offloaded, and can't be trained."
            " First inject, then offload."
        )
