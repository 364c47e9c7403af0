"""LoRA pairs: ΔW = alpha / r * up @ down, in memory, in PEFT's layout, and read from any format.

In an `AdapterFile` a pair is GraLoRA with k = 1. A format stores it as two tensors; formats differ
in names, order and layout, and in where alpha is.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from gralora.config import GraloraConfig
from gralora.files.own import (
    AdapterFile,
    AdapterFileError,
    BaseWeight,
    Header,
    check_dtype,
    kind_of,
    layer_config,
    layer_tensors,
)
from gralora.layers.class_change import join
from gralora.model.state import adapter_keys


class Pair(NamedTuple):
    """ΔW = config.scaling * up @ down.

    Attributes:
        down: (..., r, in); of a convolution (..., r, in * kernel).
        up: (..., out, r). Fused experts, and the groups of a convolution, are a leading axis.
        config: with k = 1.
    """

    down: Tensor
    up: Tensor
    config: GraloraConfig

    def with_alpha(self, alpha: float) -> Pair:
        """The same update with another alpha: `up` is multiplied by the quotient."""
        config = dataclasses.replace(self.config, alpha=alpha)
        return Pair(self.down, self.up * (self.config.alpha / alpha), config)

    def folded(self) -> Pair:
        """The same update with a scaling of 1."""
        return self.with_alpha(self.config.r)


def pair_config(r: int, alpha: float, dropout: float) -> GraloraConfig:
    whole = int(alpha) if alpha == int(alpha) else alpha
    return GraloraConfig(r=r, alpha=whole, gralora_k=1, gralora_dropout=dropout)


def pair_of(file: AdapterFile, name: str) -> Pair:
    """The pair of a layer with k = 1."""
    A, B, _, _ = layer_tensors(file, name)
    down, up = rearrange(A, "... 1 i r -> ... r i"), rearrange(B, "... 1 r o -> ... o r")
    return Pair(down, up, file.configs[name])


def put_pair(file: AdapterFile, name: str, pair: Pair) -> None:
    """Make `pair` the adapter of a layer, in place."""
    A = rearrange(pair.down, "... r i -> ... 1 i r").contiguous()
    B = rearrange(pair.up, "... o r -> ... 1 r o").contiguous()
    file.configs[name] = pair.config
    file.tensors.update(adapter_keys(name, {"A": A, "B": B}))


def padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with a higher rank."""
    missing = rank - down.shape[-2]
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))


def lora_keys(name: str) -> tuple[str, str]:
    """PEFT's keys."""
    return join(name, "lora_A.weight"), join(name, "lora_B.weight")


def lora_pairs(file: AdapterFile, *, scaled: bool = False) -> dict[str, Tensor]:
    """The pairs of a file with k = 1 in PEFT's keys and layout; `scaled`: with a scaling of 1."""
    result: dict[str, Tensor] = {}
    for name in file.configs:
        pair = pair_of(file, name)
        tensors = in_peft_layout(file, name, pair.folded() if scaled else pair)
        result.update(zip(lora_keys(name), tensors, strict=True))
    return result


def in_peft_layout(file: AdapterFile, name: str, pair: Pair) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B; fused experts keep their leading axis.

    Of a convolution they are kernels: (R, in, *kernel) and (out, r, 1, ...). Where it has groups,
    R = groups * r: lora_A has all channels, and is zero for those of other groups.
    """
    kind = kind_of(file, name)
    if kind == "transposed convolution":
        raise ValueError(
            f"{name!r} is a transposed convolution, for which there is no LoRA."
            ' format="gralora" holds it.'
        )
    if kind != "convolution":
        return pair.down.contiguous(), pair.up.contiguous()
    down, up = pair.down, pair.up
    groups = groups_of(file, name)
    if down.dim() > 2:
        down, up = _over_all_channels(down), rearrange(up, "g o r -> (g o) r")
    _, channels, *kernel = file.base[name].shape
    lora_A = down.reshape(len(down), channels * groups, *kernel)
    return lora_A.contiguous(), up.reshape(*up.shape, *(1 for _ in kernel)).contiguous()


def groups_of(file: AdapterFile, name: str) -> int:
    """The number of groups of a convolution's adapter; 1 for all else."""
    A = layer_tensors(file, name)[0]
    return len(A) if A.dim() > 3 and kind_of(file, name) == "convolution" else 1


def _over_all_channels(down: Tensor) -> Tensor:
    """(groups, r, in / groups * kernel) -> (groups * r, in * kernel)."""
    same = torch.eye(len(down), dtype=down.dtype, device=down.device)
    wide = einsum(down, same, "g r m, g h -> g r h m")
    return rearrange(wide, "g r h m -> (g r) (h m)")


def stacked(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Fused experts (e, r, in), (e, out, r) -> PEFT's (e * r, in), (out, r * e)."""
    lora_A, lora_B = rearrange(down, "e r i -> (e r) i"), rearrange(up, "e o r -> o (r e)")
    return lora_A.contiguous(), lora_B.contiguous()


class Stored(NamedTuple):
    """Where a file has one tensor of a pair; down is (r, in) there and up (out, r), or both
    transposed.
    """

    key: str
    transposed: bool = False


class PairReader:
    """Reads the LoRA pairs of a file. Names, shapes and types are checked before a tensor is read.

    Attributes:
        file: what has been read.
        used: the keys that have been read.
    """

    def __init__(self, path: Path, header: Header, format: str) -> None:
        self.path, self.header = path, header
        self.file = AdapterFile({}, {}, format=format)
        self.used: set[str] = set()

    def add(
        self,
        name: str,
        down: Stored,
        up: Stored,
        alpha: Any = None,
        *,
        scaling: float = 1,
        dropout: Any = 0.0,
        use_rslora: bool = False,
        kind: str = "linear",
        expert_rank: Any = None,
    ) -> None:
        """Read one pair.

        Args:
            alpha: as the file has it, not yet checked.
            scaling: of ΔW, where the file has no alpha.
            use_rslora: the scaling is alpha / √r.
            kind: "linear", "embedding", "experts" as PEFT stacks them, or "convolution": kernels,
                or a linear layer if the tensors are matrices.
            expert_rank: the rank of one expert, not yet checked.
        """
        down_shape, up_shape, groups = self._checked(name, down, up, kind)
        if kind == "experts":
            r = self._expert_rank(name, down_shape, expert_rank)
        else:
            r = down_shape[0] // groups
        rank = r * groups  # as the file counts it
        if alpha is None:
            alpha, use_rslora = rank * scaling, False
        factor = (math.sqrt(rank) if use_rslora else 1) / groups
        config = self._config(name, r, alpha, dropout, factor)
        if kind == "embedding" or len(down_shape) > 2:
            shape = (up_shape[0], down_shape[1] // groups, *down_shape[2:])
            self.file.base[name] = BaseWeight(shape, "unknown", False, None, kind)
        A, B = self._matrix(down), self._matrix(up)
        if kind == "experts":
            A, B = rearrange(A, "(e r) i -> e r i", r=r), rearrange(B, "o (r e) -> e o r", r=r)
        if groups > 1:
            A, B = self._own_channels(name, A, groups), rearrange(B, "(g o) r -> g o r", g=groups)
        put_pair(self.file, name, Pair(A, B, config))

    def scalar(self, key: str) -> float | None:
        """A tensor of one number, such as an alpha; None if there is none."""
        shape = self.header.shapes.get(key)
        if shape is None or math.prod(shape) != 1:
            return None
        tensor = self.header.get(key)
        if tensor.is_complex():
            raise AdapterFileError(f"{self.path}: {key} is complex; it must be a real number.")
        self.used.add(key)
        return float(tensor)

    def finished(self) -> AdapterFile:
        """The file; raises if it holds more than pairs."""
        left = self.header.shapes.keys() - self.used
        if left:
            raise AdapterFileError(
                f"{self.path} holds {min(left)!r}, which is not part of a LoRA pair."
            )
        return self.file

    def _checked(
        self, name: str, down: Stored, up: Stored, kind: str
    ) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """The shapes (r, in, ...) and (out, r, ...), and the number of groups."""
        shapes = self.header.shapes
        for key, other in ((down.key, up.key), (up.key, down.key)):
            if key not in shapes:
                raise AdapterFileError(f"{self.path} holds {other!r} without {key!r}.")
        first, second = (
            shapes[each.key][::-1] if each.transposed else shapes[each.key] for each in (down, up)
        )
        groups = _groups(first, second)
        if groups is None or (len(first) > 2 and kind != "convolution"):
            raise AdapterFileError(
                f"{self.path}: {name!r} has a pair of shapes {shapes[down.key]} and"
                f" {shapes[up.key]}: no pair of matrices or of kernels."
            )
        for each in (down, up):
            check_dtype(self.path, each.key, self.header.dtypes[each.key])
        return first, second, groups

    def _expert_rank(self, name: str, down_shape: tuple[int, ...], rank: Any) -> int:
        if isinstance(rank, int) and rank > 0 and down_shape[0] % rank == 0:
            return rank
        raise AdapterFileError(
            f"{self.path}: {name!r} has lora_A of shape {down_shape}, no multiple of its rank"
            f" {rank!r}."
        )

    def _config(self, name: str, r: int, alpha: Any, dropout: Any, factor: float) -> GraloraConfig:
        """The config with alpha * factor; alpha is checked before it is multiplied."""
        fields = {"r": r, "alpha": alpha, "gralora_k": 1, "gralora_dropout": dropout}
        config = layer_config(self.path, name, fields)
        if factor == 1:
            return config
        return layer_config(self.path, name, {**fields, "alpha": config.alpha * factor})

    def _matrix(self, stored: Stored) -> Tensor:
        self.used.add(stored.key)
        tensor = self.header.get(stored.key)
        return tensor.mT if stored.transposed else tensor.flatten(1)

    def _own_channels(self, name: str, A: Tensor, groups: int) -> Tensor:
        """The reverse of `_over_all_channels`."""
        wide = rearrange(A, "(g r) (h m) -> g h r m", g=groups, h=groups)
        own = wide[range(groups), range(groups)]
        if wide.count_nonzero() != own.count_nonzero():
            raise AdapterFileError(
                f"{self.path}: the pair of {name!r}, a convolution of {groups} groups, mixes"
                " channels of different groups, which no weight of such a convolution can."
            )
        return own


def _groups(down: tuple[int, ...], up: tuple[int, ...]) -> int | None:
    """The number of groups of a pair (r, in, ...) and (out, r, ...); None if it is not a pair."""
    if len(down) != len(up) or len(down) < 2 or 0 in down + up or not set(up[2:]) <= {1}:
        return None
    groups, rest = divmod(down[0], up[1])
    if rest or up[0] % groups or down[1] % groups:
        return None
    return groups if groups == 1 or len(down) > 2 else None
