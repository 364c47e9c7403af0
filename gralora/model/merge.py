"""Adapters into the weights, and exactly out again."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gralora.config import divisors
from gralora.engines.distributed import is_spread
from gralora.engines.walk import modules
from gralora.layers.adapter import each
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.in_place import InPlaceLayer
from gralora.layers.linear import LinearLayer
from gralora.maths import functional
from gralora.maths.functional import Tensors
from gralora.model.control import set_adapter, weights_of
from gralora.model.index import known_adapters, warn_of_missing
from gralora.model.inject import unload
from gralora.model.saved import SAVED_CHILD, saved_modules
from gralora.model.state import all_or_nothing, check_known, put_back_weight
from gralora.model.targets import output_tied
from gralora.model.tokens import TokenRows

AT_ONCE = (
    2**22
)  # numbers: large enough for fast products, small enough for what is held beside the weight


def merge(
    model: nn.Module,
    adapter_names: str | Collection[str] | Mapping[str, float] | None = None,
    *,
    safe: bool = True,
) -> None:
    """Write adapters into the weights: W + Σ weight * ΔW. A merged layer costs exactly what the
    base layer costs.

    The layer's own weight is put aside, so `unmerge` gives it back bit for bit, in every dtype.
    Merging again changes nothing; merging a, then b, equals merging both. Adapters that are active
    but not merged go on acting beside it.

    Args:
        adapter_names: one or several; {name: weight}; None for the active ones. Where no weight is
            given, it is the one with which the adapter is active, or 1.
        safe: refuse if a merged weight would not be finite, or if a layer with a forward of its own
            computes something else with the merged weight than with the adapter beside it.

    Raises:
        KeyError: unknown name. TypeError: a weight is quantised or otherwise no plain tensor.
            ValueError: see `safe`. The model is then unchanged.
    """
    names = None if adapter_names is None else weights_of(adapter_names)
    check_known(model, *(names or ()))
    warn_of_missing(model, known_adapters(model) if names is None else names)
    given = isinstance(adapter_names, Mapping)
    plan: list[tuple[GraloraLayer, dict[str, float]]] = []
    bases: dict[Place, nn.Parameter] = {}  # maps that share a parameter have one base
    for path, layer in gralora_layers(model):
        adapters = layer.gralora_adapters
        for aside, (owner, name) in layer.map.places.items():
            if (base := getattr(adapters, aside)) is not None:
                bases[id(owner), name] = base
        wanted = (
            adapters.active
            if names is None
            else {n: share for n, share in names.items() if n in adapters}
        )
        if names is not None and not given:
            wanted = {name: adapters.active.get(name, 1.0) for name in wanted}
        weights = {**adapters.merged, **wanted} if given else {**wanted, **adapters.merged}
        if weights != adapters.merged:
            _check_mergeable(path, layer)
            # sums in one order
            plan.append((layer, {name: weights[name] for name in adapters if name in weights}))
    merged = _merged_parameters(plan, safe)
    if safe:
        for layer, weights in plan:
            _check_same_function(layer, weights, merged)
    with all_or_nothing(model):
        for layer, weights in plan:
            for aside, place in layer.map.places.items():
                _set_aside(layer, aside, place, merged, bases)
            layer.gralora_adapters.merged = weights


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its own weight back, the very object, bit for bit."""
    with all_or_nothing(model):
        for _, layer in gralora_layers(model):
            put_back_weight(layer)


def merge_and_unload(
    model: nn.Module,
    *,
    adapter_names: str | Collection[str] | Mapping[str, float] | None = None,
    dequantize: torch.dtype | None = None,
) -> nn.Module:
    """The plain model with adapters written into it: no adapter, no class of ours, weights W + Σ
    weight * ΔW.

    Saved modules and biases of the active adapters stay. No second copy of the model is made, so
    what interrupts the writing itself (no memory left, Ctrl-C) leaves some layers merged;
    everything that can be refused is refused before.

    Args:
        adapter_names: one or several; {name: weight}; None for the active ones.
        dequantize: a floating type. Each adapted layer whose weight is quantised then becomes an
            `nn.Linear` of this type that holds the dequantised W + Σ weight * ΔW; W is what the
            layer's own forward makes of unit vectors.

    Raises:
        TypeError, ValueError: as `merge`; the model is then unchanged.
    """
    if adapter_names is not None:
        set_adapter(model, adapter_names, trainable=False)
    else:
        warn_of_missing(model, known_adapters(model))
    layers = [
        (path, layer, {**layer.gralora_adapters.merged, **layer.gralora_adapters.active})
        for path, layer in gralora_layers(model)
    ]
    were_tied = output_tied(model)
    packed = [row for row in layers if dequantize is not None and row[1].map.packed]
    layers = [row for row in layers if row not in packed]
    plain = [
        _dequantized(layer, weights, cast(torch.dtype, dequantize)) for _, layer, weights in packed
    ]
    for path, layer, weights in layers:
        if weights:
            _check_mergeable(path, layer)
            _check_same_function(layer, weights, _merged_parameters([(layer, weights)], safe=True))
    unmerge(model)
    _write_all(model, [(layer, weights) for _, layer, weights in layers if weights])
    for (_, layer, _), linear in zip(packed, plain, strict=True):
        _become(model, layer, linear)
    _keep_active_copies(model)
    unload(model)
    if were_tied and not output_tied(model):
        warnings.warn(
            "the head of this model was tied to its embedding, and is no longer: merged, the two"
            " differ. config.tie_word_embeddings still says that they are tied, and a saved model"
            " would load so: set it to False first.",
            UserWarning,
            stacklevel=2,
        )
    return model


def _write_all(
    model: nn.Module, layers: Sequence[tuple[GraloraLayer, Mapping[str, float]]]
) -> None:
    """Merge for good, one parameter at a time. Each gets new memory, since other models may share
    the old.
    """
    owners = Counter(id(p) for module in modules(model) for p in module._parameters.values())
    together = _sharing(layers, owners)
    for layer, weights in layers:
        if id(layer) in together:  # another layer has written the weight that both hold
            continue
        new = _merged_parameters([(layer, weights)], safe=False)
        for owner, name in layer.map.places.values():
            merged, now = new.get((id(owner), name)), owner._parameters.get(name)
            if merged is None or now is None:
                continue
            if owners[id(now)] > 1 and id(now) not in together:  # the others keep the base's
                merged.requires_grad_(now.requires_grad)
                owner._parameters[name] = merged
            else:
                now.data = merged.data


@torch.no_grad()
def _dequantized(
    layer: GraloraLayer, weights: Mapping[str, float], dtype: torch.dtype
) -> nn.Linear:
    """A plain layer of the same map, with the adapters in its weight."""
    if not isinstance(layer, LinearLayer):
        raise TypeError(f"{type(layer).__name__} can't be dequantized: only linear layers can.")
    weight, bias, (n_in, n_out) = (
        layer.computed_matrix(dtype),
        layer._parameters.get("bias"),
        layer.map.sizes,
    )
    for name, share in weights.items():
        weight = weight + share * layer.gralora_adapters[name].delta_weight().float()
    if not weight.to(dtype).isfinite().all():
        raise ValueError(
            f"merging {', '.join(weights)} would give weights that are not finite in {dtype}."
        )
    linear = nn.Linear(n_in, n_out, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def _become(model: nn.Module, layer: nn.Module, linear: nn.Linear) -> None:
    """Turn `layer` into `linear` in place; the object and its hooks stay.

    Where Python can't give the object that class (quanto's, `class_change.made_class`), `linear`
    takes its place and its hooks.
    """
    hooks = {name: value for name, value in layer.__dict__.items() if "_hooks" in name}
    state = {**linear.__dict__, **hooks, "training": layer.training}
    taker = layer
    try:
        layer.__class__ = nn.Linear
    except TypeError:
        taker = linear
        for owner in modules(model):
            owner._modules.update(
                {name: linear for name, child in owner._modules.items() if child is layer}
            )
    taker.__dict__.clear()
    taker.__dict__.update(state)


def _sharing(
    layers: Sequence[tuple[GraloraLayer, Mapping[str, float]]], owners: Mapping[int, int]
) -> set[int]:
    """Ids of weights all of whose owners share their adapters, and of the layers there but the
    first.
    """
    found: dict[tuple[object, ...], list[GraloraLayer]] = {}
    for layer, weights in layers:
        owner, name = layer.map.place
        acting = tuple((id(layer.gralora_adapters[n]), share) for n, share in weights.items())
        found.setdefault((id(owner._parameters[name]), acting), []).append(layer)
    whole = {key[0]: own for key, own in found.items() if 1 < len(own) == owners[cast(int, key[0])]}
    return {cast(int, key) for key in whole} | {
        id(layer) for own in whole.values() for layer in own[1:]
    }


def _keep_active_copies(model: nn.Module) -> None:
    written: set[int] = set()
    for _, saved in list(saved_modules(model)):
        copies = saved.gralora_saved
        if copies.active is None:
            continue
        replica = copies[copies.active]
        if isinstance(replica, TokenRows):  # once where several modules hold the weight
            weight = saved.get_parameter("weight")
            if id(weight) not in written:
                weight.data = replica.put_into(weight.data, replica.rows.data)
            written.add(id(weight))
            continue
        frozen = {
            name for name, p in saved._parameters.items() if p is not None and not p.requires_grad
        }
        saved._parameters.update(replica._parameters)
        saved._buffers.update(replica._buffers)
        saved._modules.update({n: m for n, m in replica._modules.items() if n != SAVED_CHILD})
        for name in frozen:  # `unload` makes trainable what was trainable before
            saved.get_parameter(name).requires_grad_(False)


def _check_mergeable(path: str, layer: GraloraLayer) -> None:
    owner, name = layer.map.place
    weight = owner._parameters.get(name)
    if weight is None:
        raise TypeError(
            f"{path!r} computes its weight (parametrised, pruned or normed), so nothing can be"
            " merged into it. First make it a parameter, with torch.nn.utils.parametrize's"
            " remove_parametrizations, prune.remove or remove_weight_norm."
        )
    if is_spread(weight):
        raise TypeError(
            f"the weight of {path!r} is spread over processes, where nothing is merged. Ways out:"
            " save_adapter, and merge it into the plain model, or into the checkpoint on disk"
            " (`gralora merge`)."
        )
    if layer.map.packed:
        raise TypeError(
            f"the weight of {path!r} is a {type(weight).__name__} of {weight.dtype}, quantised or"
            " in a format of its own: merging would be wrong. Ways out: leave the adapter"
            " unmerged, merge into a model with plain weights, or merge_and_unload(model,"
            " dequantize=torch.bfloat16), which makes a plain layer of it."
        )
    if weight.is_meta:
        raise TypeError(
            f"the weight of {path!r} is on the meta device (offloaded, or never loaded): nothing to"
            " merge into."
        )


Place = tuple[int, str]
"""(id of the owner, name) of a parameter."""


def _set_aside(
    layer: GraloraLayer,
    aside: str,
    place: tuple[nn.Module, str],
    merged: Mapping[Place, nn.Parameter],
    bases: dict[Place, nn.Parameter],
) -> None:
    """Put a merged parameter in its place, and the base's aside."""
    owner, name = place
    new, now = merged.get((id(owner), name)), owner._parameters.get(name)
    if new is None or now is None:
        return
    if getattr(layer.gralora_adapters, aside) is None:
        setattr(layer.gralora_adapters, aside, bases.setdefault((id(owner), name), now))
    owner._parameters[name] = new


@torch.no_grad()
def _merged_parameters(
    plan: Sequence[tuple[GraloraLayer, Mapping[str, float]]], safe: bool
) -> dict[Place, nn.Parameter]:
    """The new parameter for every place in which some map of `plan` lies; what else lies there
    stays as it is.
    """
    new: dict[Place, nn.Parameter] = {}
    for layer, weights in plan:
        adapters, (owner, name) = layer.gralora_adapters, layer.map.place
        place, now, base = (id(owner), name), owner._parameters[name], layer.map.base_weight
        if place not in new and now is not None:
            whole = layer.map.base_matrix().numel() == now.numel()  # nothing else lies there
            values = torch.empty_like(now) if whole else now.detach().clone()
            new[place] = nn.Parameter(values, requires_grad=False)
        _write_merged(layer, base.detach(), new[place].detach(), weights, safe)
        biases = [b for n, w in weights.items() if (b := adapters[n].bias_times(w)) is not None]
        owner, name = layer.map.bias_place
        bias = owner._parameters.get(name)
        if biases and bias is not None:
            own = layer.map.bias_part(
                adapters.base_bias if adapters.base_bias is not None else bias
            )
            merged = new.setdefault(
                (id(owner), name), nn.Parameter(bias.detach().clone(), requires_grad=False)
            )
            layer.map.bias_part(merged).copy_(sum(biases, start=own))
    return new


def _write_merged(
    layer: GraloraLayer,
    base: Tensor,
    new: Tensor,
    weights: Mapping[str, float],
    safe: bool,
) -> None:
    """The map's part of `new` from its part of `base`, both in the layout of the parameter."""
    chosen = [(layer.gralora_adapters[name], weight) for name, weight in weights.items()]
    updates = [(adapter.tensors, weight * adapter.config.scaling) for adapter, weight in chosen]
    source, target = layer.map.matrix(base), layer.map.matrix(new)
    write_merged(source, target, updates, safe=safe, what=", ".join(weights))
    if target.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
        new.copy_(layer.map.in_layout(target))  # a kernel in channels-last order


@torch.no_grad()
def write_merged(
    source: Tensor,
    target: Tensor,
    updates: Sequence[tuple[Tensors, float]],
    *,
    safe: bool,
    what: str,
) -> None:
    """target = source + Σ scaling * ΔW, all (out, in) of any strides, one row of blocks at a time.
    Sums in float32 at least.

    With a leading axis of copies, each is merged for itself.

    Args:
        target: may be `source`.
        updates: (the adapter's tensors, its scaling) of each.
        safe: refuse a result that is not finite; `what` names it.
    """
    if source.dim() > 2:
        apart = [[(own, scaling) for own in each(tensors)] for tensors, scaling in updates]
        for one, other, *own in zip(source, target, *apart, strict=True):
            write_merged(one, other, own, safe=safe, what=what)
        return
    dtype = torch.promote_types(source.dtype, torch.float32)
    for (A, *_), _ in updates:
        dtype = torch.promote_types(dtype, A.dtype)
    factors = [
        (tuple(t if t is None else t.to(dtype) for t in tensors), scaling)
        for tensors, scaling in updates
    ]
    # rows within one output block of every adapter
    block = math.gcd(*(tensors[1].shape[-1] for tensors, _ in updates))
    step = max(d for d in divisors(block) if d == 1 or d * target.shape[1] <= AT_ONCE)
    for start in range(0, target.shape[0], step):
        rows = target[start : start + step]
        work = (
            rows.copy_(source[start : start + step])
            if dtype == source.dtype
            else source[start : start + step].to(dtype)
        )
        for tensors, scaling in factors:
            functional.add_delta_rows_(work, start, *tensors, scaling=scaling)  # type: ignore[arg-type]
        if work is not rows:
            rows.copy_(work)
        # a finite sum has finite terms; the reverse does not hold, so look closer before refusing
        if safe and not rows.sum(dtype=torch.float32).isfinite() and not rows.isfinite().all():
            raise ValueError(
                f"merging {what} would give weights that are not finite in {source.dtype}, in rows"
                f" {start} to {start + step}: the adapter is broken, or alpha too large for this"
                " dtype."
            )


@torch.no_grad()
def _check_same_function(
    layer: GraloraLayer, weights: Mapping[str, float], new: Mapping[Place, nn.Parameter]
) -> None:
    """A subclass with a forward of its own may do more with W than x @ Wᵀ; try both ways on a few
    numbers.
    """
    if not isinstance(layer, InPlaceLayer) or layer.is_plain():
        return
    merged = new[id(layer), "weight"]
    adapters = layer.gralora_adapters
    now = layer._parameters["weight"]
    base = cast(nn.Parameter, layer.map.base_weight)
    probe = layer.probe(torch.Generator().manual_seed(0))
    if probe is None:
        return
    x = probe.to(base.device, base.dtype)
    try:
        layer._parameters["weight"] = base
        y = layer.base_forward(x)
        layer._parameters["weight"] = merged
        in_weight = layer.base_forward(x) - y
    finally:
        layer._parameters["weight"] = now
    mode = [(adapters[name], adapters[name].training) for name in weights]
    beside = sum(
        layer.update(x, adapter.eval(), weights[name])
        for name, (adapter, _) in zip(weights, mode, strict=True)
    )
    for adapter, training in mode:
        adapter.train(training)
    scale = max(float(y.abs().max()), float(cast(Tensor, beside).abs().max()), 1e-30)
    if float((in_weight - beside).abs().max()) > 100 * torch.finfo(base.dtype).eps * scale:
        raise ValueError(
            f"{layer._base_class.__name__} has a forward of its own that is not x @ Wᵀ + b: merged,"
            " it would compute something else than with the adapter beside it. Leave it unmerged,"
            " or pass safe=False to `merge`."
        )
