"""GraLoRA as the plain LoRA that it is.

A GraLoRA update is exactly a LoRA of rank k * r + hybrid_r, and a LoRA is exactly a GraLoRA with k
= 1. So between formats an adapter is rewritten as an `AdapterFile` with k = 1.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from einops import rearrange
from torch import Tensor

from gralora.files.own import AdapterFile, kind_of, layer_tensors, out_in, pop_layer, tensors_beside
from gralora.files.pairs import Pair, padded, pair_config, pair_of, put_pair
from gralora.layers.attention import PACKED, PARTS
from gralora.layers.class_change import join
from gralora.maths import functional
from gralora.model.fit import is_share


def as_lora(
    file: AdapterFile, rank: int | float | None = None, errors: dict[str, float] | None = None
) -> AdapterFile:
    """The same adapter with k = 1: exact, or with every layer of rank `rank`, cut by SVD or padded
    with zeros.

    A `rank` below 1 is a share: every layer is cut to the smallest rank that keeps it of ‖ΔW‖².
    With a number all layers get one alpha as well: where their scalings differ, B takes them in.
    Servers that read neither `rank_pattern` nor `alpha_pattern` take such a file.

    Args:
        errors: a dict to be filled with ‖new ΔW - ΔW‖ / ‖ΔW‖ of each layer.
    """
    _check_rank(rank)
    scalings = {config.scaling for config in file.configs.values()}
    fold = rank is not None and not is_share(rank) and len(scalings) > 1
    beside = tensors_beside(file)
    result = dataclasses.replace(file, configs={}, tensors=beside, format="lora")
    for name, config in file.configs.items():
        down, up = functional.lora_factors(*layer_tensors(file, name))
        dtype, error = down.dtype, 0.0
        if rank is not None:
            down, up, error = _of_rank(down, up, rank)
        r = down.shape[-2]
        alpha = r * config.plain_alpha / (config.r + config.hybrid_r)
        pair = Pair(down, up, pair_config(r, alpha, config.gralora_dropout))
        if fold:
            pair = pair.folded()
        put_pair(result, name, pair._replace(down=pair.down.to(dtype), up=pair.up.to(dtype)))
        if errors is not None:
            errors[name] = error
    return result


def packed(file: AdapterFile) -> AdapterFile:
    """A file with k = 1 in which the projections of an attention are packed as PEFT has them.

    One pair for q, k and v together, of the sum of their ranks, and one for out_proj of the same
    rank; B takes the scalings in.
    """
    projections = [name for name in file.configs if kind_of(file, name) == "attention"]
    result = dataclasses.replace(
        file, configs=dict(file.configs), tensors=dict(file.tensors), base=dict(file.base)
    )
    for path in dict.fromkeys(name.rpartition(".")[0] for name in projections):
        _pack(result, path)
    return result


def _pack(file: AdapterFile, path: str) -> None:
    """Pack the projections of one attention, in place."""
    names = {part: join(path, part) for part in PARTS if join(path, part) in file.configs}
    sizes = {size for name in names.values() for size in out_in(file, name)}
    if len(sizes) > 1:
        raise ValueError(
            f"the inputs of {path!r} differ in size, which PEFT can't express in LoRA:"
            f" {sorted(sizes)}."
        )
    pairs = {part: pair_of(file, name).folded() for part, name in names.items()}
    for name in names.values():
        pop_layer(file, name)
        file.base.pop(name, None)
    empty = next(iter(pairs.values())).down[:0]
    factors = {part: (pair.down, pair.up) for part, pair in pairs.items()}
    downs, ups = zip(*(factors.get(part, (empty, empty.mT)) for part in PACKED), strict=True)
    block_diagonal: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    whole = {
        path: (torch.cat(downs), block_diagonal),
        join(path, "out_proj"): factors.get("out_proj", (empty, empty.mT)),
    }
    r = max(1, *(len(down) for down, _ in whole.values()))
    config = pair_config(r, r, max(pair.config.gralora_dropout for pair in pairs.values()))
    for name, (down, up) in whole.items():
        put_pair(file, name, Pair(*padded(down, up, r), config))


def unpacked(file: AdapterFile) -> AdapterFile:
    """The reverse of `packed`: a pair for q, k and v together, beside one for out_proj, as
    three.
    """
    for path in [name for name in file.configs if join(name, "out_proj") in file.configs]:
        down, ups, config = pair_of(file, path)
        if len(ups) != 3 * down.shape[1]:
            continue
        pop_layer(file, path)
        for part, up in zip(PACKED, rearrange(ups, "(p o) r -> p o r", p=3), strict=True):
            put_pair(file, join(path, part), Pair(down, up, config))
    return file


def _check_rank(rank: int | float | None) -> None:
    if rank is None or is_share(rank):
        return
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(
            f"rank={rank!r} is not legal: it must be an integer of at least 1, a share of the"
            " squared norm between 0 and 1, or None for the exact rank."
        )


def _of_rank(down: Tensor, up: Tensor, rank: int | float) -> tuple[Tensor, Tensor, float]:
    """The pair of this rank, or of the rank that keeps this share, and its relative error."""
    if is_share(rank):
        rank = functional.pair_rank_of_share(down, up, rank)
    rank = int(rank)
    if down.shape[-2] <= rank:
        return *padded(down, up, rank), 0.0
    down, up = down.double(), up.double()
    if down.dim() == 2:
        return functional.truncated(down, up, rank)
    cut = [functional.truncated(*each, rank) for each in zip(down, up, strict=True)]
    norms = [functional.product_norm(*each) for each in zip(down, up, strict=True)]
    downs, ups, errors = zip(*cut, strict=True)
    lost = math.hypot(*(error * norm for error, norm in zip(errors, norms, strict=True)))
    return torch.stack(downs), torch.stack(ups), lost / (math.hypot(*norms) or 1)
