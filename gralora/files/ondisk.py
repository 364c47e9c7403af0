"""Merging into checkpoints on disk, and extracting from them, without a model: one tensor in memory
at a time.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from gralora.config import GraloraConfig, legal_k
from gralora.files.atomic import write_atomically, write_folder
from gralora.files.own import (
    FLOATS,
    GRALORA,
    AdapterFile,
    BaseWeight,
    kind_of,
    layer_tensors,
    out_in,
    tensors_beside,
)
from gralora.files.shards import CONV1D_MODELS, DTYPES, INDEX, Checkpoint, Shard
from gralora.files.tokens import token_modules
from gralora.layers.attention import PACKED, third
from gralora.layers.class_change import join
from gralora.layers.loading import FACTORS
from gralora.maths import functional
from gralora.model.fit import difference, fitted
from gralora.model.merge import write_merged
from gralora.model.state import adapter_keys
from gralora.model.targets import nearest
from gralora.model.tokens import ROWS

WEIGHT_FILES = (".bin", ".pt", ".pth", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")

Progress = Callable[[Sequence[str]], Iterable[str]]


class Extracted(NamedTuple):
    """One layer of an extraction: the relative errors of the GraLoRA and of the best LoRA of equal
    parameters.
    """

    layer: str
    shape: tuple[int, int]
    error: float
    best_lora_error: float


def merge_checkpoint(
    model: Path, file: AdapterFile, out: Path, *, force: bool = False, progress: Progress = iter
) -> list[str]:
    """Write the checkpoint `model` with the adapter merged to `out`; all other files of a folder
    are copied.

    Equal to merging in memory, bit for bit.

    Returns:
        the names of copied files that hold weights of another format, unmerged.

    Raises:
        ValueError: the adapter's layers are not in the checkpoint, or can't be merged.
            FileExistsError: `out` exists.
    """
    checkpoint = Checkpoint.open(model)
    _check_out(out, force, model)
    work = _Merging(checkpoint, file, progress)
    if model.is_file():
        write_atomically(out, lambda path: work.write(checkpoint.shards[0], path))
    else:
        write_folder(out, work.fill)
    if work.differing:
        warnings.warn(
            "the adapter was trained on another base: the weights differ in"
            f" {', '.join(work.differing[:5])}, {len(work.differing)} of {len(file.configs)}"
            " layers.",
            UserWarning,
            stacklevel=2,
        )
    return work.unmerged


class _Merging:
    """A merge that has been checked: what each tensor of the checkpoint becomes."""

    def __init__(self, checkpoint: Checkpoint, file: AdapterFile, progress: Progress) -> None:
        stored, rename = _places(file, checkpoint)
        self.checkpoint, self.file = checkpoint, file
        self.maps: dict[str, list[str]] = {}
        _check_tied(checkpoint, file)
        for name, key in stored.items():
            self.maps.setdefault(rename(key), []).append(name)
        self.layouts = {
            n: _check_layer(checkpoint, key, file, n)
            for key, names in self.maps.items()
            for n in names
        }
        self.replaced = _replaced(file, checkpoint, rename)
        self.steps = iter(progress(list(self.layouts)))
        self.differing: list[str] = []
        self.unmerged: list[str] = []

    def merged(self, shard: Shard, key: str) -> bytearray | None:
        """The bytes of a tensor with the adapter in it; None if it has none."""
        if key not in self.maps:
            return None
        tensor, buffer = shard.read(key)
        for name in self.maps[key]:
            next(self.steps)
            layout, there = self.layouts[name], self.file.base.get(name)
            matrix = _matrix(tensor, self.file, name, layout)
            if there is not None and there.differs(
                BaseWeight.of(tensor.dtype, there.shape, layout, matrix)
            ):
                self.differing.append(name)
            updates = [(layer_tensors(self.file, name), self.file.configs[name].scaling)]
            write_merged(matrix, matrix, updates, safe=True, what=repr(name))
        return buffer

    def write(self, shard: Shard, path: Path) -> None:
        last, where = self.checkpoint.shards[-1], self.checkpoint.where
        new = {key: t for key, t in self.replaced.items() if where.get(key, last) is shard}
        shard.write(path, lambda key: self.merged(shard, key), new)
        if shard is last:
            next(self.steps, None)  # so that a bar ends

    def fill(self, folder: Path) -> None:
        shards = {shard.path.name: shard for shard in self.checkpoint.shards}
        for each in sorted(self.checkpoint.path.iterdir()):
            target = folder / each.name
            if each.name in shards:
                self.write(shards[each.name], target)
                continue
            if each.name.endswith(WEIGHT_FILES):
                self.unmerged.append(each.name)
            if each.is_dir():
                shutil.copytree(each, target)
            else:
                shutil.copy2(each, target)
        if self.checkpoint.index is not None:
            _write_index(self.checkpoint, self.replaced, folder / INDEX)


def extract_checkpoint(
    base: Path,
    tuned: Path,
    out: Path,
    targets: str,
    config: GraloraConfig,
    *,
    force: bool = False,
    progress: Progress = iter,
) -> list[Extracted]:
    """Write the best GraLoRA for tuned - base to `out`, a file of ours.

    Args:
        targets: a regular expression for the whole name of a layer.
    """
    first, second = Checkpoint.open(base), Checkpoint.open(tuned)
    _check_out(out, force, base, tuned)
    names = [name for name in first.names() if re.fullmatch(targets, name)]
    if not names:
        raise ValueError(
            f"{targets!r} matches no layer of {base}. Nearest names:"
            f" {nearest(targets, first.names())}."
        )
    _check_extractable(first, second, names, config)
    file = AdapterFile({}, {})
    rows = [_extract(first, second, name, config, file) for name in progress(names)]
    GRALORA.write(file, out)
    return rows


def _extract(
    first: Checkpoint, second: Checkpoint, name: str, config: GraloraConfig, file: AdapterFile
) -> Extracted:
    """Fit the adapter of one layer and put it into `file`."""
    key, transposed = join(name, "weight"), first.model_type in CONV1D_MODELS
    weight, _ = first.where[key].read(key)
    tuned, _ = second.where[key].read(key)
    delta = difference(key, weight, tuned)
    if transposed:
        weight, delta = weight.mT, delta.mT
    factors, error = fitted(delta, config)
    for factor_key, factor in adapter_keys(name, dict(zip(FACTORS, factors, strict=True))).items():
        if factor is not None:
            file.tensors[factor_key] = factor.float().contiguous()
    file.configs[name] = config
    shape = (delta.shape[0], delta.shape[1])
    file.base[name] = BaseWeight.of(weight.dtype, shape, transposed, weight)
    best = functional.best_lora_error(delta, config.r + config.hybrid_r)
    return Extracted(name, shape, error, best)


def _places(
    file: AdapterFile, checkpoint: Checkpoint
) -> tuple[dict[str, str], Callable[[str], str]]:
    """The tensor that holds each of the adapter's maps, under the adapter's names, and the way to
    the checkpoint's.
    """
    have = set(checkpoint.where)

    def places(packed: bool) -> dict[str, str]:
        return {name: _stored_in(file, name, packed) for name in file.configs}

    if not file.configs:
        return {}, _renaming(file.modules_to_save, set(checkpoint.names()), checkpoint)
    separate = places(packed=False)
    try:
        return separate, _renaming(list(separate.values()), have, checkpoint)
    except ValueError:
        packed = places(packed=True)
        return packed, _renaming(list(packed.values()), have, checkpoint)


def _stored_in(file: AdapterFile, name: str, packed: bool) -> str:
    path, _, own = name.rpartition(".")
    kind = kind_of(file, name)
    if kind == "experts":
        return name
    if kind == "attention" and own in PACKED:
        return join(path, "in_proj_weight" if packed else f"{own}_weight")
    return join(name, "weight")


def _matrix(tensor: Tensor, file: AdapterFile, name: str, transposed: bool) -> Tensor:
    """The map (..., out, in) within the tensor that holds it, a view."""
    kind = kind_of(file, name)
    if kind == "attention" and len(tensor) == 3 * out_in(file, name)[0]:
        return third(tensor, name.rpartition(".")[2])
    if kind == "experts" or tensor.dim() == 2:
        return tensor.mT if transposed else tensor
    if kind == "transposed convolution":
        return tensor.flatten(1).mT
    A = layer_tensors(file, name)[0]
    if A.dim() == 3:
        return tensor.flatten(1)
    return rearrange(tensor.flatten(1), "(g o) m -> g o m", g=len(A))


def _renaming(names: list[str], have: set[str], checkpoint: Checkpoint) -> Callable[[str], str]:
    """From the adapter's names to the checkpoint's: the same, or all with one prefix more or
    less.
    """
    if have.issuperset(names):
        return lambda name: name
    parts = names[0].split(".")
    more = {known.removesuffix(names[0]) for known in have if known.endswith(f".{names[0]}")}
    less = {
        ".".join(parts[:end]) + "." for end in range(1, len(parts)) if ".".join(parts[end:]) in have
    }
    added = [prefix for prefix in sorted(more) if all(prefix + name in have for name in names)]
    taken = [
        p
        for p in sorted(less)
        if all(name.startswith(p) and name.removeprefix(p) in have for name in names)
    ]
    if len(added) + len(taken) > 1:
        raise ValueError(
            f"{checkpoint.path} has {names[0]!r} under more than one prefix:"
            f" {', '.join(added + taken)}."
        )
    if added:
        return lambda name: added[0] + name
    if taken:
        return lambda name: _without(taken[0], name, checkpoint)
    missing = [name for name in names if name not in have]
    raise ValueError(
        f"{checkpoint.path} lacks {len(missing)} of the adapter's {len(names)} layers, under any"
        f" prefix: {', '.join(map(repr, missing[:3]))}. Nearest: {nearest(missing[0], have)}."
    )


def _without(prefix: str, name: str, checkpoint: Checkpoint) -> str:
    if not name.startswith(prefix):
        raise ValueError(
            f"{checkpoint.path} names its tensors without {prefix!r}, so {name!r} of the adapter"
            " has no place there. Merge into a checkpoint of the whole model."
        )
    return name.removeprefix(prefix)


def _check_layer(checkpoint: Checkpoint, key: str, file: AdapterFile, name: str) -> bool:
    """Whether the weight is stored (in, out); raises if nothing can be merged into it."""
    entry, known = checkpoint.entry(key), file.base.get(name)
    if known is not None and known.kind != "linear":
        shape = known.shape[:-2] + known.shape[:-3:-1] if known.fan_in_fan_out else known.shape
        packed = (3 * shape[0], *shape[1:]) if known.kind == "attention" else shape
        if entry.code not in FLOATS or entry.shape not in (shape, packed):
            raise ValueError(
                f"{key} is of type {entry.code} and shape {entry.shape}; the adapter is for"
                f" {shape}."
            )
        return known.fan_in_fan_out
    if entry.code not in FLOATS or len(entry.shape) != 2:
        raise ValueError(
            f"{key} is of type {entry.code} and shape {entry.shape}: no plain matrix to merge into."
        )
    return checkpoint.transposed(
        key.rpartition(".")[0], out_in(file, name), None if known is None else known.fan_in_fan_out
    )


def _check_tied(checkpoint: Checkpoint, file: AdapterFile) -> None:
    """Raise ValueError where the embedding's weight is the head's as well, and the adapter is of
    the embedding alone.
    """
    embeddings = [name for name in file.configs if kind_of(file, name) == "embedding"]
    if embeddings and checkpoint.tied:
        raise ValueError(
            f"{checkpoint.path} ties its head to an embedding (tie_word_embeddings in config.json):"
            f" with the adapter of {embeddings[0]!r} in it, the head would change as well. Merge in"
            " memory, and save with config.tie_word_embeddings = False."
        )


def _replaced(
    file: AdapterFile, checkpoint: Checkpoint, rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """Biases and saved modules, under the checkpoint's names and, where they are there, in its
    types.
    """
    result, rows = {}, token_modules(file)
    for module, tokens in rows.items():
        name = rename(join(module, "weight"))
        if name not in checkpoint.where:
            raise ValueError(f"{checkpoint.path} lacks {name}, of which the adapter trains tokens.")
        weight, _ = checkpoint.where[name].read(name)
        if max(tokens) >= len(weight):
            raise ValueError(
                f"{name} has {len(weight)} tokens, and the adapter trains token {max(tokens)}."
            )
        own = file.tensors[join(module, ROWS)].to(weight.dtype)
        result[name] = weight.index_copy(0, torch.tensor(tokens), own)
    beside = [key for key in tensors_beside(file) if key.rpartition(".")[0] not in rows]
    for key, tensor in ((key, file.tensors[key]) for key in beside):
        name = rename(key)
        if name in checkpoint.where:
            entry = checkpoint.entry(name)
            if key in file.biases and entry.shape != tuple(tensor.shape):
                raise ValueError(
                    f"{name} is of shape {entry.shape}; the adapter's bias is"
                    f" {tuple(tensor.shape)}."
                )
            tensor = tensor.to(DTYPES.get(entry.code, tensor.dtype))
        elif key in file.biases:
            raise ValueError(f"{checkpoint.path} lacks {name}, a bias that the adapter trains.")
        result[name] = tensor
    return result


def _check_extractable(
    first: Checkpoint, second: Checkpoint, names: list[str], config: GraloraConfig
) -> None:
    problems = []
    for name in names:
        key = join(name, "weight")
        entry, k = first.entry(key), config.gralora_k
        if len(entry.shape) != 2 or entry.code not in FLOATS:
            problems.append(
                f"{name!r} has a weight of type {entry.code} and shape {entry.shape}, no plain"
                " matrix."
            )
        elif (
            key not in second.where
            or second.entry(key).shape != entry.shape
            or second.entry(key).code not in FLOATS
        ):
            problems.append(f"{name!r} is missing in {second.path}, or otherwise there.")
        elif math.gcd(*entry.shape) % k:
            legal = legal_k(*entry.shape, config.r)
            problems.append(
                f"gralora_k={k} does not divide both sizes of {name!r}, {entry.shape}. Legal here:"
                f" {legal}."
            )
    if problems:
        raise ValueError("\n".join(problems))


def _write_index(checkpoint: Checkpoint, replaced: dict[str, Tensor], path: Path) -> None:
    index: dict[str, Any] = copy.deepcopy(checkpoint.index or {})
    for key, tensor in replaced.items():
        if key not in checkpoint.where:
            index["weight_map"][key] = checkpoint.shards[-1].path.name
        size = tensor.numel() * tensor.element_size()
        size -= checkpoint.entry(key).size if key in checkpoint.where else 0
        if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
            index["metadata"]["total_size"] += size
    path.write_text(json.dumps(index, indent=2) + "\n")


def _check_out(out: Path, force: bool, *inputs: Path) -> None:
    for each in inputs:
        if out.resolve() == each.resolve() or each.resolve() in out.resolve().parents:
            raise ValueError(f"{out} is {each} or lies in it; name another place.")
    refuse_existing(out, force)


def refuse_existing(out: Path, force: bool) -> None:
    """Raise FileExistsError if `out` exists, unless `force`; FileNotFoundError if it has no folder
    to be in.
    """
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; --force overwrites it.")
    if not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}")
