"""A new adapter out of others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from gralora.config import GraloraConfig, divisors
from gralora.engines.distributed import copy_into
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.linear_map import PREFIX
from gralora.maths import functional, merging
from gralora.maths.functional import Tensors
from gralora.model.biases import adapted_biases
from gralora.model.control import weights_of
from gralora.model.fit import fill, is_share, rank_for, widened
from gralora.model.inject import Plan, install
from gralora.model.saved import saved_biases, saved_modules, token_modules
from gralora.model.state import all_or_nothing, check_known, check_new
from gralora.model.state_dict import adapter_state_dict, load_adapter_state_dict
from gralora.model.targets import Target
from gralora.model.tokens import tied_to

SPARSE = {"ties": merging.ties, "dare": merging.dare, "magnitude_prune": merging.magnitude_prune}
HOW = ("exact", "svd", *SPARSE)


def combine(
    model: nn.Module,
    adapter_names: Sequence[str] | Mapping[str, float],
    weights: Sequence[float] | None,
    new_name: str,
    how: str = "exact",
    *,
    r: int | float | None = None,
    gralora_k: int | None = None,
    density: float | None = None,
    errors: dict[str, float] | None = None,
) -> None:
    """Add the adapter Σ weight * adapter under a new name, inactive and frozen: what `set_adapter`
    with weights computes.

    Args:
        adapter_names: of adapters of this model, or {name: weight}.
        weights: one for each name; None for 1 each, or where `adapter_names` holds them.
        how: "exact": the ranks add up; where the ks differ, the new one is their least common
            multiple, and a rank grows by the factor by which its blocks are cut. "svd": the nearest
            adapter of rank `r`, block by block. "ties", "dare", "magnitude_prune": the updates ΔW,
            not their sum, are first thinned out value by value (`maths/merging.py`; PEFT's
            "ties_svd", "dare_linear_svd", "magnitude_prune_svd"), then the nearest adapter is taken
            as by "svd". The factors by themselves can't be merged so: those of two adapters have no
            basis in common.
        r: for all but "exact"; the largest of the combined adapters' if None. A share below 1: each
            layer gets the smallest rank whose blocks keep this share of the squared norm of what is
            asked for.
        gralora_k: for all but "exact"; the least common multiple if None.
        density: for the last three, which need it: the share of values that stays, in (0, 1].
        errors: a dict to be filled with ‖new ΔW - Σ‖ / ‖Σ‖ of each layer; zero if exact.

    Raises:
        KeyError: an unknown name. ValueError: the new name is in use, a weight is not finite, k
            does not divide a layer, or two of the adapters train the same bias or saved module. The
            model is then unchanged.
    """
    chosen = _chosen(adapter_names, weights)
    check_known(model, *chosen)
    check_new(model, new_name)
    if how not in HOW:
        raise ValueError(f"how={how!r} is not known; there are: {', '.join(map(repr, HOW))}.")
    if how == "exact" and (r is not None or gralora_k is not None):
        raise ValueError(
            "r and gralora_k are for the other ways; the exact sum has those that follow from its"
            " parts."
        )
    if (density is not None) != (how in SPARSE) or (density is not None and not 0 < density <= 1):
        raise ValueError(
            f"density={density} with how={how!r}: {', '.join(SPARSE)} need one in (0, 1], and"
            " nothing else does."
        )
    layers: dict[str, _Layer] = {}
    for path, layer in gralora_layers(model):
        parts = [
            (layer.gralora_adapters[n], share)
            for n, share in chosen.items()
            if n in layer.gralora_adapters
        ]
        if parts:
            layers[path] = _Layer(
                layer, parts, _config(path, layer, parts, how, r, gralora_k, density)
            )
    plan, sources = _plan(model, layers, chosen), _sources(model, chosen)
    with all_or_nothing(model):
        install(model, plan, new_name, trainable=False)
        for path, (layer, parts, config) in layers.items():
            error = _fill(layer.gralora_adapters[new_name], parts, config, how, density)
            if errors is not None:
                errors[path] = error
        load_adapter_state_dict(model, sources, new_name, strict=False)


class _Layer(NamedTuple):
    """What becomes of one layer: the adapters with their weights, and the config of their sum."""

    layer: GraloraLayer
    parts: list[tuple[GraloraAdapter, float]]
    config: GraloraConfig


def _plan(model: nn.Module, layers: Mapping[str, _Layer], names: Collection[str]) -> Plan:
    tokens = {path: own for name in names for path, own in token_modules(model, name).items()}
    follow = {id(tied) for module, _ in tokens.values() for tied in tied_to(model, module)}
    biases = {path: own for name in names for path, own in saved_biases(model, name).items()}
    saved: dict[str, nn.Module] = {
        path: m
        for path, m in saved_modules(model)
        if any(name in m.gralora_saved for name in names)
        and path not in (*tokens, *biases)
        and id(m) not in follow
    }
    return Plan(
        [Target(path, each.layer.map, each.config) for path, each in layers.items()],
        saved,
        biases,
        {
            path: reduce(torch.promote_types, (a.A.dtype for a, _ in each.parts))
            for path, each in layers.items()
        },
        reset=False,
        tokens=tokens,
    )


def _chosen(
    names: Sequence[str] | Mapping[str, float], weights: Sequence[float] | None
) -> dict[str, float]:
    chosen = weights_of(names if weights is None else _zipped(names, weights))
    if not chosen:
        raise ValueError(f"adapter_names={names!r} names no adapter.")
    return chosen


def _zipped(
    names: Sequence[str] | Mapping[str, float], weights: Sequence[float]
) -> dict[str, float]:
    names = [names] if isinstance(names, str) else list(names)
    if len(names) != len(weights) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(weights)} weights were given for the adapters {names}: give one for each, each"
            " once."
        )
    return dict(zip(names, weights, strict=True))


def _config(
    path: str,
    layer: GraloraLayer,
    parts: list[tuple[GraloraAdapter, float]],
    how: str,
    r: int | float | None,
    k: int | None,
    density: float | None,
) -> GraloraConfig:
    configs = [adapter.config for adapter, _ in parts]
    k = k or math.lcm(*(c.gralora_k for c in configs))
    cut = layer.map.divided_sizes
    if any(
        size % k for size in cut
    ):  # a given k: a least common multiple divides what each of its parts divides
        legal = ", ".join(map(str, divisors(math.gcd(*cut))))
        raise ValueError(
            f"gralora_k={k} does not divide both sizes of {path!r}, {cut}. Legal here: {legal}."
        )
    if how == "exact":
        rank, hybrid_r = (
            sum(c.r * k // c.gralora_k for c in configs),
            sum(c.hybrid_r for c in configs),
        )
    else:
        asked = _asked(parts, how, density) if is_share(r) else torch.zeros(())
        rank, hybrid_r = (
            rank_for(asked, r, k, max(c.r for c in configs)),
            max(c.hybrid_r for c in configs),
        )
    return GraloraConfig(
        r=rank,
        hybrid_r=hybrid_r,
        alpha=rank + hybrid_r,
        gralora_k=k,
        gralora_dropout=max(c.gralora_dropout for c in configs),
        bias="gralora_only" if any(a.bias is not None for a, _ in parts) else "none",
    )


def _sources(model: nn.Module, names: Mapping[str, float]) -> dict[str, Tensor]:
    """The values of the copies of modules, which belong to one of the adapters each."""
    sources: dict[str, Tensor] = {}
    for name in names:
        added_up = adapted_biases(model, name)
        state = adapter_state_dict(model, name)
        own = {k: t for k, t in state.items() if PREFIX not in k and k not in added_up}
        shared = [key for key in own if key in sources]
        if shared:
            raise ValueError(
                f"two of the adapters train {shared[0]!r}: what they trained can't be added up."
            )
        sources.update(own)
    return sources


@torch.no_grad()
def _fill(
    new: GraloraAdapter,
    parts: list[tuple[GraloraAdapter, float]],
    config: GraloraConfig,
    how: str,
    density: float | None,
) -> float:
    biases = [own for a, share in parts if (own := a.bias_times(share)) is not None]
    if new.bias is not None and biases:
        copy_into(new.bias, sum(biases, start=torch.zeros_like(biases[0])))
    if how != "exact":
        return fill(new.tensors, _asked(parts, how, density), config)
    scaled = [
        (widened(adapter.tensors), share * adapter.config.scaling) for adapter, share in parts
    ]
    total = _concatenated(scaled, config.gralora_k)
    for parameter, values in zip(new.tensors, total, strict=True):
        if parameter is not None and values is not None:
            copy_into(parameter, values)
    return 0.0


@torch.no_grad()
def _asked(parts: list[tuple[GraloraAdapter, float]], how: str, density: float | None) -> Tensor:
    """The update (..., out, in) that the new adapter is to come near to."""
    deltas = [
        functional.delta_weight(*widened(a.tensors), scaling=a.config.scaling) for a, _ in parts
    ]
    shares = [share for _, share in parts]
    if how in SPARSE and density is not None:
        return SPARSE[how](deltas, shares, density)
    return sum(
        (share * delta for share, delta in zip(shares, deltas, strict=True)), start=torch.zeros(())
    )


def _concatenated(scaled: list[tuple[Tensors, float]], k: int) -> Tensors:
    """The adapter of scaling 1 whose blocks have the ranks of all of these, one after the other; B
    takes the scalings.
    """
    downs, ups, generals = [], [], []
    for (A, B, A_general, B_general), scaling in scaled:
        finer = k // A.shape[-3]
        # a block cut in finer x finer has all of the block's rank in each piece: the piece's rows
        # of A and columns of B
        down = rearrange(A, "... i (f m) (j s) -> ... (i f) m j s", j=A.shape[-3], f=finer)
        down = repeat(down, "... i m j s -> ... i m (j g) s", g=finer)
        up = rearrange(B, "... j (i s) (f o) -> ... (j f) i s o", i=A.shape[-3], f=finer)
        up = repeat(up, "... j i s o -> ... j (i g) s o", g=finer)
        downs.append(down)
        ups.append(up * scaling)
        if A_general is not None and B_general is not None:
            generals.append((A_general, B_general * scaling))
    A = rearrange(torch.cat(downs, dim=-1), "... i m j s -> ... i m (j s)")
    B = rearrange(torch.cat(ups, dim=-2), "... j i s o -> ... j (i s) o")
    if not generals:
        return A, B, None, None
    return (
        A,
        B,
        torch.cat([a for a, _ in generals], dim=-2),
        torch.cat([b for _, b in generals], dim=-1),
    )
