"""GraLoRA as the plain LoRA that it is.

A GraLoRA update is exactly a LoRA of rank k * r + hybrid_r, and a LoRA is exactly a GraLoRA with k
= 1. So between formats an adapter is rewritten as an `AdapterFile` with k = 1; its pairs are laid
out as PEFT lays them out.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import cast

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from gralora.config import GraloraConfig
from gralora.files.experts import is_experts
from gralora.files.own import AdapterFile, AdapterFileError, layer_keys, layer_tensors
from gralora.layers.attention import (
    PACKED,
    PARTS,
)  # PEFT adapts q, k and v as the one matrix in which they are packed
from gralora.layers.class_change import join
from gralora.maths import functional
from gralora.model.fit import is_share
from gralora.model.state import adapter_keys


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
    share = is_share(rank)
    if (
        rank is not None
        and not share
        and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1)
    ):
        raise ValueError(
            f"rank={rank!r} is not legal: it must be an integer of at least 1, a share of the"
            " squared norm between 0 and 1, or None for the exact rank."
        )
    fold = (
        rank is not None
        and not share
        and len({config.scaling for config in file.configs.values()}) > 1
    )
    configs, tensors = {}, {}
    for name, config in file.configs.items():
        down, up = functional.lora_factors(*layer_tensors(file, name))
        dtype, error = down.dtype, 0.0
        if rank is not None:
            cut = functional.pair_rank_of_share(down, up, rank) if share else cast(int, rank)
            down, up, error = _of_rank(down, up, cut)
        r, up = down.shape[-2], up * config.scaling if fold else up
        alpha = r if fold else r * config.plain_alpha / (config.r + config.hybrid_r)
        configs[name] = _plain_config(r, alpha, config.gralora_dropout)
        tensors.update(_as_k_1(name, down.to(dtype), up.to(dtype)))
        if errors is not None:
            errors[name] = error
    return dataclasses.replace(
        file, configs=configs, tensors={**tensors, **tensors_beside(file)}, format="lora"
    )


def tensors_beside(file: AdapterFile) -> dict[str, Tensor]:
    """The tensors that are no adapter's: of biases and saved modules."""
    owned = {key for name, config in file.configs.items() for key in layer_keys(name, config)}
    return {key: tensor for key, tensor in file.tensors.items() if key not in owned}


def lora_pairs(file: AdapterFile, *, scaled: bool = False) -> dict[str, Tensor]:
    """The pairs of a file with k = 1 under PEFT's names; `scaled`: with the scaling in lora_B.

    Of a convolution they are kernels, as PEFT has them: lora_A (R, in, *kernel), lora_B (out, R, 1,
    ...). Where it has groups, lora_A sees all channels, and is zero for those of other groups;
    lora_B has the groups. Of fused experts they have a leading axis of experts.
    """
    result = {}
    for name, config in file.configs.items():
        down, up = _pair(file, name)
        up = up * (config.scaling if scaled else 1)
        shape = file.base[name].shape if name in file.base and not is_experts(file, name) else ()
        if len(shape) > 2 and down.dim() > 2:  # of a grouped convolution both are grouped kernels
            down, up = _over_all_channels(down, shape), rearrange(up, "g o r -> (g o) r")
            shape = (shape[0], shape[1] * (len(down) // up.shape[1]), *shape[2:])
        result[join(name, "lora_A.weight")] = down.reshape(
            len(down), *(shape[1:] or down.shape[1:])
        ).contiguous()
        result[join(name, "lora_B.weight")] = up.reshape(
            *up.shape, *[1] * len(shape[2:])
        ).contiguous()
    return result


def _over_all_channels(down: Tensor, shape: tuple[int, ...]) -> Tensor:
    """down (groups, r, in / groups * kernel) -> (groups * r, in * kernel)."""
    same = torch.eye(len(down), dtype=down.dtype, device=down.device)
    wide = einsum(down, same, "g r m, g h -> g r h m")
    return rearrange(wide, "g r h m -> (g r) (h m)")


def own_channels(path: Path, name: str, A: Tensor, groups: int) -> Tensor:
    """lora_A (groups · r, in · kernel) of a grouped convolution -> (groups, r, in / groups ·
    kernel).
    """
    wide = rearrange(A, "(g r) (h m) -> g h r m", g=groups, h=groups)
    own = wide[range(groups), range(groups)]
    if wide.count_nonzero() != own.count_nonzero():
        raise AdapterFileError(
            f"{path}: the pair of {name!r}, a convolution of {groups} groups, mixes channels of"
            " different groups, which no weight of such a convolution can."
        )
    return own


def groups_of(file: AdapterFile, name: str) -> int:
    """In how many groups a convolution's adapter lies; 1 for all else."""
    A = layer_tensors(file, name)[0]
    return len(A) if A.dim() > 3 and not is_experts(file, name) else 1


def packed(file: AdapterFile) -> AdapterFile:
    """A file with k = 1 in which the projections of an attention are packed as PEFT has them.

    One pair for q, k and v together, of the sum of their ranks, and one for out_proj of the same
    rank; B takes the scalings in.
    """
    attentions = {
        name.rpartition(".")[0]: None for name in file.configs if is_projection(file, name)
    }
    configs, tensors, base = dict(file.configs), dict(file.tensors), dict(file.base)
    for path in attentions:
        own = {part: join(path, part) for part in PARTS if join(path, part) in file.configs}
        width = {size for name in own.values() for size in file.base[name].shape}
        if len(width) > 1:
            raise ValueError(
                f"the inputs of {path!r} differ in size, which PEFT can't express in LoRA:"
                f" {sorted(width)}."
            )
        pairs = {part: _pair(file, name) for part, name in own.items()}
        pairs = {
            part: (down, up * file.configs[own[part]].scaling) for part, (down, up) in pairs.items()
        }
        dropout = max(file.configs[name].gralora_dropout for name in own.values())
        for name in own.values():
            for key in layer_keys(name, configs.pop(name)):
                del tensors[key]
            base.pop(name)
        (size,) = width
        empty = next(iter(pairs.values()))[0].new_zeros(0, size)
        parts = [pairs.get(part, (empty, empty.t())) for part in PACKED]
        down = torch.cat([down for down, _ in parts])
        up: Tensor = torch.block_diag(*(up for _, up in parts))  # type: ignore[no-untyped-call]
        out_down, out_up = pairs.get("out_proj", (empty, empty.t()))
        r = max(len(down), len(out_down), 1)
        configs.update(dict.fromkeys((path, join(path, "out_proj")), _plain_config(r, r, dropout)))
        tensors.update(_as_k_1(path, *_padded(down, up, r)))
        tensors.update(_as_k_1(join(path, "out_proj"), *_padded(out_down, out_up, r)))
    return dataclasses.replace(file, configs=configs, tensors=tensors, base=base)


def unpacked(file: AdapterFile) -> AdapterFile:
    """The reverse of `packed`: a pair for q, k and v together, beside one for out_proj, as
    three.
    """
    for path in [name for name in file.configs if join(name, "out_proj") in file.configs]:
        down, ups = _pair(file, path)
        if len(ups) != 3 * down.shape[1]:
            continue
        config = file.configs.pop(path)
        for key in layer_keys(path, config):
            del file.tensors[key]
        for part, up in zip(PACKED, rearrange(ups, "(p o) r -> p o r", p=3), strict=True):
            file.configs[join(path, part)] = config
            file.tensors.update(_as_k_1(join(path, part), down, up))
    return file


def is_embedding(file: AdapterFile, name: str) -> bool:
    return name in file.base and file.base[name].kind == "embedding"


def is_projection(file: AdapterFile, name: str) -> bool:
    return name in file.base and file.base[name].kind == "attention"


def _plain_config(r: int, alpha: float, dropout: float) -> GraloraConfig:
    return GraloraConfig(
        r=r,
        alpha=int(alpha) if alpha == int(alpha) else alpha,
        gralora_k=1,
        gralora_dropout=dropout,
    )


def _as_k_1(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    pair = {
        "A": rearrange(down, "... r i -> ... 1 i r"),
        "B": rearrange(up, "... o r -> ... 1 r o"),
    }
    return adapter_keys(name, {key: tensor.contiguous() for key, tensor in pair.items()})


def _pair(file: AdapterFile, name: str) -> tuple[Tensor, Tensor]:
    """down (..., r, in) and up (..., out, r) of a layer with k = 1; the reverse of `_as_k_1`."""
    A, B, _, _ = layer_tensors(file, name)
    return rearrange(A, "... 1 i r -> ... r i"), rearrange(B, "... 1 r o -> ... o r")


def _of_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    if down.shape[-2] <= rank:
        return *_padded(down, up, rank), 0.0
    if down.dim() == 2:
        return functional.truncated(down.double(), up.double(), rank)
    cut = [
        functional.truncated(one.double(), other.double(), rank)
        for one, other in zip(down, up, strict=True)
    ]
    norms = [
        functional.product_norm(one.double(), other.double())
        for one, other in zip(down, up, strict=True)
    ]
    lost = math.hypot(*(error * norm for (*_, error), norm in zip(cut, norms, strict=True)))
    return (
        torch.stack([one for one, _, _ in cut]),
        torch.stack([up for _, up, _ in cut]),
        lost / (math.hypot(*norms) or 1),
    )


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - down.shape[-2]
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
