"""Adapters into the weights, and exactly out again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from gralora import functional
from gralora.adapter import Tensors
from gralora.config import divisors
from gralora.inject import unload
from gralora.layers import FULL, HALF, GraloraLayer, gralora_layers
from gralora.saved import BIAS_CHILD, SAVED_CHILD, bias_swaps, saved_modules
from gralora.state import all_or_nothing, check_known, own_weight, put_back_weight

CACHED = 2**19  # numbers


def merge(model: nn.Module, adapter_names: str | Collection[str] | None = None, *, safe: bool = True) -> None:
    """Write adapters into the weights: W + Σ weight * ΔW. A merged layer costs exactly what the base layer costs.

    The layer's own weight is put aside, so `unmerge` gives it back bit for bit, in every dtype. Merging again changes
    nothing; merging a, then b, equals merging both. Adapters that are active but not merged go on acting beside it.

    Args:
        adapter_names: one or several; None for the active ones. An inactive adapter is merged with weight 1.
        safe: refuse if a merged weight would not be finite, or if a layer with a forward of its own computes something
            else with the merged weight than with the adapter beside it.

    Raises:
        KeyError: unknown name. TypeError: a weight is quantised or otherwise no plain tensor. ValueError: see `safe`.
            The model is then unchanged.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    check_known(model, *(names or ()))
    plan: list[tuple[GraloraLayer, dict[str, float]]] = []
    for path, layer in gralora_layers(model):
        adapters = layer.gralora_adapters
        wanted = adapters.active if names is None else {n: adapters.active.get(n, 1.0) for n in names if n in adapters}
        if any(name not in adapters.merged for name in wanted):
            _check_mergeable(path, layer)
            plan.append((layer, {**adapters.merged, **wanted}))
    merged = [_merged_weight(layer, weights, safe) for layer, weights in plan]
    if safe:
        for (layer, weights), weight in zip(plan, merged, strict=True):
            _check_same_function(layer, weights, weight)
    with all_or_nothing(model):
        for (layer, weights), weight in zip(plan, merged, strict=True):
            adapters = layer.gralora_adapters
            if adapters.base_weight is None:
                adapters.__dict__["base_weight"] = layer._parameters["weight"]
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            adapters.merged = weights


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its own weight back, the very object, bit for bit."""
    for _, layer in gralora_layers(model):
        put_back_weight(layer)


def merge_and_unload(model: nn.Module, *, dequantize: torch.dtype | None = None) -> nn.Module:
    """The plain model with the active adapters written into it: no adapter, no class of ours, weights W + Σ weight * ΔW.

    Saved modules and biases of the active adapters stay. No second copy of the model is made.

    Args:
        dequantize: a floating type. Each adapted layer whose weight is quantised then becomes an `nn.Linear` of this type
            that holds the dequantised W + Σ weight * ΔW; W is what the layer's own forward makes of unit vectors.

    Raises:
        TypeError, ValueError: as `merge`; the model is then unchanged.
    """
    layers = [
        (path, layer, {**layer.gralora_adapters.merged, **layer.gralora_adapters.active})
        for path, layer in gralora_layers(model)
    ]
    packed = [row for row in layers if dequantize is not None and _is_packed(row[1])]
    layers = [row for row in layers if row not in packed]
    plain = [_dequantized(layer, weights, cast(torch.dtype, dequantize)) for _, layer, weights in packed]
    for path, layer, weights in layers:
        if weights:
            _check_mergeable(path, layer)
            _check_same_function(layer, weights, _merged_weight(layer, weights, safe=True))
    unmerge(model)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for _, layer, weights in layers:
        weight = cast(nn.Parameter, layer._parameters["weight"])
        if owners[id(weight)] > 1 and weights:  # tied: the others keep the base's weight
            tied = nn.Parameter(_merged_weight(layer, weights, safe=False), requires_grad=weight.requires_grad)
            layer._parameters["weight"] = tied
        elif weights:
            _write_merged(layer, weight.data, weight.data, weights, safe=False)
    for (_, layer, _), linear in zip(packed, plain, strict=True):
        _become(layer, linear)
    _keep_active_copies(model)
    return unload(model)


def _is_packed(layer: GraloraLayer) -> bool:
    # a plain weight is exactly a Parameter over exactly a Tensor; subclasses carry formats that only they know
    weight = layer._parameters.get("weight")
    return weight is not None and (type(weight) is not nn.Parameter or weight.dtype not in (*FULL, *HALF))


@torch.no_grad()
def _dequantized(layer: GraloraLayer, weights: Mapping[str, float], dtype: torch.dtype) -> nn.Linear:
    """A plain layer of the same map, with the adapters in its weight."""
    n_in, n_out = layer.features(layer)
    bias, device = layer._parameters.get("bias"), cast(Tensor, layer.weight).device
    if bias is not None:
        layer._parameters["bias"] = None
    try:
        weight = layer.base_forward(torch.eye(n_in, dtype=dtype, device=device)).t().float()
    finally:
        if bias is not None:
            layer._parameters["bias"] = bias
    for name, share in weights.items():
        weight = weight + share * layer.gralora_adapters[name].delta_weight().float()
    if not weight.to(dtype).isfinite().all():
        raise ValueError(f"merging {', '.join(weights)} would give weights that are not finite in {dtype}.")
    linear = nn.Linear(n_in, n_out, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def _become(layer: nn.Module, linear: nn.Linear) -> None:
    """Turn `layer` into `linear` in place; the object and its hooks stay."""
    hooks = {name: value for name, value in layer.__dict__.items() if "_hooks" in name}
    state = {**linear.__dict__, **hooks, "training": layer.training}
    layer.__class__ = nn.Linear
    layer.__dict__.clear()
    layer.__dict__.update(state)


def _keep_active_copies(model: nn.Module) -> None:
    for _, saved in list(saved_modules(model)):
        copies = saved.gralora_saved
        if copies.active is not None:
            replica = copies[copies.active]
            frozen = {name for name, p in saved._parameters.items() if p is not None and not p.requires_grad}
            saved._parameters.update(replica._parameters)
            saved._buffers.update(replica._buffers)
            saved._modules.update({n: m for n, m in replica._modules.items() if n != SAVED_CHILD})
            for name in frozen:
                # `unload` thaws what was thawed before
                cast(nn.Parameter, saved._parameters[name]).requires_grad_(False)
    for _, owner, _ in list(bias_swaps(model)):
        bias = owner._parameters["bias"]
        del owner._modules[BIAS_CHILD]
        if bias is not None:
            bias.requires_grad_(False)


def _check_mergeable(path: str, layer: GraloraLayer) -> None:
    weight = layer._parameters.get("weight")
    if weight is None:
        raise TypeError(
            f"{path!r} computes its weight (parametrised, pruned or normed), so nothing can be merged into it."
        )
    if _is_packed(layer):
        raise TypeError(
            f"the weight of {path!r} is a {type(weight).__name__} of {weight.dtype}, quantised or in a format of its own: "
            "merging would be wrong. Ways out: leave the adapter unmerged, merge into a model with plain weights, or "
            "merge_and_unload(model, dequantize=torch.bfloat16), which makes a plain layer of it."
        )
    if weight.is_meta:
        raise TypeError(
            f"the weight of {path!r} is on the meta device (offloaded, or never loaded): nothing to merge into."
        )


def _merged_weight(layer: GraloraLayer, weights: Mapping[str, float], safe: bool) -> Tensor:
    base = own_weight(layer)
    new = torch.empty_like(base, requires_grad=False)
    return _write_merged(layer, base.data, new, weights, safe)


def _write_merged(layer: GraloraLayer, base: Tensor, new: Tensor, weights: Mapping[str, float], safe: bool) -> Tensor:
    chosen = [(layer.gralora_adapters[name], weight) for name, weight in weights.items()]
    updates = [(adapter.tensors, weight * adapter.config.scaling) for adapter, weight in chosen]
    return write_merged(base, new, updates, transposed=layer.transposed, safe=safe, what=", ".join(weights))


@torch.no_grad()
def write_merged(
    base: Tensor,
    new: Tensor,
    updates: Sequence[tuple[Tensors, float]],
    *,
    transposed: bool,
    safe: bool,
    what: str,
) -> Tensor:
    """new = base + Σ scaling * ΔW, one row of blocks at a time; `new` may be `base`. Sums in float32 at least.

    Args:
        updates: (the adapter's tensors, its scaling) of each.
        transposed: `base` is (in, out).
        safe: refuse a result that is not finite; `what` names it.
    """
    layout = "i o -> o i" if transposed else "o i -> o i"
    source, target = rearrange(base, layout), rearrange(new, layout)
    dtype = torch.promote_types(base.dtype, torch.float32)
    for (A, *_), _ in updates:
        dtype = torch.promote_types(dtype, A.dtype)
    factors = [(tuple(t if t is None else t.to(dtype) for t in tensors), scaling) for tensors, scaling in updates]
    # rows within one output block of every adapter, and few enough to stay in a cache through all that is done to them
    block = math.gcd(*(tensors[1].shape[-1] for tensors, _ in updates))
    step = max(d for d in divisors(block) if d == 1 or d * target.shape[1] <= CACHED)
    for start in range(0, target.shape[0], step):
        rows = target[start : start + step]
        work = (
            rows.copy_(source[start : start + step]) if dtype == base.dtype else source[start : start + step].to(dtype)
        )
        for tensors, scaling in factors:
            functional.add_delta_rows_(work, start, *tensors, scaling=scaling)  # type: ignore[arg-type]
        if work is not rows:
            rows.copy_(work)
        # a finite sum has finite terms; the reverse does not hold, so look closer before refusing
        if safe and not rows.sum(dtype=torch.float32).isfinite() and not rows.isfinite().all():
            raise ValueError(
                f"merging {what} would give weights that are not finite in {base.dtype}, in rows {start} to "
                f"{start + step}: the adapter is broken, or alpha too large for this dtype."
            )
    return new


@torch.no_grad()
def _check_same_function(layer: GraloraLayer, weights: Mapping[str, float], merged: Tensor) -> None:
    """A subclass with a forward of its own may do more with W than x @ Wᵀ; try both ways on a few numbers."""
    if layer.is_plain():
        return
    adapters = layer.gralora_adapters
    now = layer._parameters["weight"]
    base = cast(nn.Parameter, own_weight(layer))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.features(layer)[0], generator=generator).to(base.device, base.dtype)
    try:
        layer._parameters["weight"] = base
        y = layer.base_forward(x)
        layer._parameters["weight"] = nn.Parameter(merged, requires_grad=False)
        in_weight = layer.base_forward(x) - y
    finally:
        layer._parameters["weight"] = now
    mode = [(adapters[name], adapters[name].training) for name in weights]
    beside = sum(adapter.eval()(x, weights[name]) for name, (adapter, _) in zip(weights, mode, strict=True))
    for adapter, training in mode:
        adapter.train(training)
    scale = max(float(y.abs().max()), float(cast(Tensor, beside).abs().max()), 1e-30)
    if float((in_weight - beside).abs().max()) > 100 * torch.finfo(base.dtype).eps * scale:
        raise ValueError(
            f"{layer._base_class.__name__} has a forward of its own that is not x @ Wᵀ + b: merged, it would compute "
            "something else than with the adapter beside it. Leave it unmerged, or pass safe=False to `merge`."
        )
