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
from gralora.model.inject import unload
from gralora.model.record import warn_of_vanished
from gralora.model.saved import SAVED_CHILD, bias_swaps, remove_swap, saved_modules
from gralora.model.state import SHARED, all_or_nothing, check_known, known_adapters, put_back_weight
from gralora.model.statistics import keep_moved
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
    warn_of_vanished(model, known_adapters(model) if names is None else names)
    given = isinstance(adapter_names, Mapping)
    plan: list[tuple[GraloraLayer, dict[str, float]]] = []
    aside: dict[
        tuple[int, str], nn.Parameter
    ] = {}  # by place, since maps that share one have one base
    for path, layer in gralora_layers(model):
        adapters = layer.gralora_adapters
        if adapters.base_weight is not None:
            aside[_place(layer)] = adapters.base_weight
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
            plan.append(
                (layer, {name: weights[name] for name in adapters if name in weights})
            )  # sums in one order
    merged = _merged_parameters(plan, safe)
    if safe:
        for layer, weights in plan:
            _check_same_function(layer, weights, merged[_place(layer)])
    with all_or_nothing(model):
        for layer, weights in plan:
            owner, name = layer.map.place
            adapters, place = layer.gralora_adapters, _place(layer)
            if adapters.base_weight is None:
                adapters.__dict__["base_weight"] = aside.setdefault(place, layer.map.parameter)
            owner._parameters[name] = merged[place]
            adapters.merged = weights


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
        warn_of_vanished(model, known_adapters(model))
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
            _check_same_function(
                layer, weights, _merged_parameters([(layer, weights)], safe=True)[_place(layer)]
            )
    unmerge(model)
    owners = Counter(
        id(parameter) for module in modules(model) for parameter in module._parameters.values()
    )
    together = _sharing(layers, owners)
    for _, layer, weights in layers:
        owner, name = layer.map.place
        weight = layer.map.parameter
        if (
            id(layer) in together
        ):  # all that hold the weight have this adapter, and the first of them has written it
            continue
        if (
            owners[id(weight)] > 1 and weights and id(weight) not in together
        ):  # the others keep the base's weight
            tied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            owner._parameters[name] = tied
            _write_merged(layer, weight.data, tied.data, weights, safe=False)
        elif weights:
            new = weight.detach().clone() if hasattr(weight, SHARED) else weight.data
            weight.data = _write_merged(layer, weight.data, new, weights, safe=False)
    for (_, layer, _), linear in zip(packed, plain, strict=True):
        _become(model, layer, linear)
    _keep_active_copies(model)
    keep_moved(model)
    unload(model)
    if were_tied and not output_tied(model):
        warnings.warn(
            "the head of this model was tied to its embedding, and is no more: merged, the two"
            " differ. config.tie_word_embeddings still says that they are tied, and what is saved"
            " would load so: set it to False first.",
            UserWarning,
            stacklevel=2,
        )
    return model


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


@torch.no_grad()
def _settle(owner: nn.Module, rows: TokenRows, written: dict[int, nn.Parameter]) -> None:
    """Write trained tokens into the weight, once where several modules hold it."""
    weight = cast(nn.Parameter, owner._parameters["weight"])
    if id(weight) not in written:
        new = (
            nn.Parameter(weight.detach().clone(), weight.requires_grad)
            if hasattr(weight, SHARED)
            else weight
        )
        written[id(weight)] = new
        new.data.copy_(rows.put_into(weight.data, rows.rows))
    owner._parameters["weight"] = written[id(weight)]


def _sharing(
    layers: Sequence[tuple[str, GraloraLayer, Mapping[str, float]]], owners: Mapping[int, int]
) -> set[int]:
    """Ids of weights all of whose owners share their adapters, and of the layers there but the
    first.
    """
    found: dict[tuple[object, ...], list[GraloraLayer]] = {}
    for _, layer, weights in layers:
        owner, name = layer.map.place
        acting = tuple((id(layer.gralora_adapters[n]), share) for n, share in weights.items())
        found.setdefault((id(owner._parameters[name]), acting), []).append(layer)
    whole = {
        key[0]: own
        for key, own in found.items()
        if key[1] and 1 < len(own) == owners[cast(int, key[0])]
    }
    return {cast(int, key) for key in whole} | {
        id(layer) for own in whole.values() for layer in own[1:]
    }


def _keep_active_copies(model: nn.Module) -> None:
    written: dict[int, nn.Parameter] = {}
    for _, saved in list(saved_modules(model)):
        copies = saved.gralora_saved
        if copies.active is not None:
            replica = copies[copies.active]
            if isinstance(replica, TokenRows):
                _settle(saved, replica, written)
                continue
            frozen = {
                name
                for name, p in saved._parameters.items()
                if p is not None and not p.requires_grad
            }
            saved._parameters.update(replica._parameters)
            saved._buffers.update(replica._buffers)
            saved._modules.update({n: m for n, m in replica._modules.items() if n != SAVED_CHILD})
            for name in frozen:
                # `unload` thaws what was thawed before
                cast(nn.Parameter, saved._parameters[name]).requires_grad_(False)
    for _, owner, swap in list(bias_swaps(model)):
        bias = owner._parameters[swap.parameter]
        remove_swap(owner, swap)
        if bias is not None:
            bias.requires_grad_(False)


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


def _place(layer: GraloraLayer) -> tuple[int, str]:
    owner, name = layer.map.place
    return id(owner), name


def _merged_parameters(
    plan: Sequence[tuple[GraloraLayer, Mapping[str, float]]], safe: bool
) -> dict[tuple[int, str], nn.Parameter]:
    """The new parameter for every place in which some map of `plan` lies; what else lies there
    stays as it is.
    """
    new: dict[tuple[int, str], nn.Parameter] = {}
    for layer, weights in plan:
        now, place = layer.map.parameter, _place(layer)
        if place not in new:
            whole = layer.map.base_matrix().numel() == now.numel()  # nothing else lies there
            new[place] = nn.Parameter(
                torch.empty_like(now) if whole else now.detach().clone(), requires_grad=False
            )
        _write_merged(layer, layer.map.base_weight.data, new[place].data, weights, safe)
    return new


def _write_merged(
    layer: GraloraLayer, base: Tensor, new: Tensor, weights: Mapping[str, float], safe: bool
) -> Tensor:
    """The map's part of `new` from its part of `base`, both in the layout of the parameter that
    holds it; returns `new`.
    """
    chosen = [(layer.gralora_adapters[name], weight) for name, weight in weights.items()]
    updates = [(adapter.tensors, weight * adapter.config.scaling) for adapter, weight in chosen]
    source, target = (layer.map.matrix(weight) for weight in (base, new))
    write_merged(source, target, updates, safe=safe, what=", ".join(weights))
    if (
        target.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
    ):  # a kernel in channels-last order
        new.copy_(layer.map.in_layout(target))
    return new


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
        for index, (one, other) in enumerate(zip(source, target, strict=True)):
            own = [(each(tensors)[index], scaling) for tensors, scaling in updates]
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
    layer: GraloraLayer, weights: Mapping[str, float], merged: nn.Parameter
) -> None:
    """A subclass with a forward of its own may do more with W than x @ Wᵀ; try both ways on a few
    numbers.
    """
    if not isinstance(layer, InPlaceLayer) or layer.is_plain():
        return
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
