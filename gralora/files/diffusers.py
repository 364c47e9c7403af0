"""Files of those who make pictures: diffusers' own, and kohya's, which ComfyUI and diffusers'
converter read.

diffusers (0.42.1, `loaders/lora_pipeline.py`, `loaders/peft.py`) keeps
`pytorch_lora_weights.safetensors`: PEFT's pairs behind a prefix for each part of a pipeline, and in
the metadata under `lora_adapter_metadata` the fields of a LoraConfig for each. kohya (read by
diffusers' `loaders/lora_conversion_utils.py` and ComfyUI's `comfy/lora.py`) writes the dots of
names as
underscores: `lora_unet_<name>.lora_down.weight`, `.lora_up.weight`, `.alpha`. The scaling is in the
up-projection here, and alpha the rank, so that no reader can take it for another; kohya's file has
one rank for all, lower ones padded with zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gralora.files.atomic import write_atomically, write_folder
from gralora.files.own import (
    AdapterFile,
    AdapterFileError,
    Format,
    opened,
    parse_json,
    unshared,
    with_names,
    write_tensors,
)
from gralora.files.pairs import PairReader, Stored, groups_of, in_peft_layout, lora_keys, pair_of
from gralora.files.patterns import pattern
from gralora.layers.class_change import join

WEIGHTS, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
PARTS: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "transformer": (),
}
"""Parts of a pipeline that hold adapters, with kohya's prefixes, of which the first is written; for
transformers kohya has other names than diffusers.
"""

ENDS = ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"))
"""Of the keys in diffusers' folders, of today and of before it had PEFT."""


def part_of_pipeline(class_name: str) -> str:
    """The part that a module is in diffusers' pipelines, by its class.

    Raises:
        ValueError: that can't be told.
    """
    if "UNet" in class_name:
        return "unet"
    if "Transformer" in class_name and "Model" in class_name:
        return "transformer"
    if re.match(r"CLIPText|T5Encoder|UMT5Encoder|ChatGLM|Gemma|Llama", class_name):
        return "text_encoder_2" if class_name == "CLIPTextModelWithProjection" else "text_encoder"
    raise ValueError(
        f"which part of a pipeline a {class_name} is can't be told: give a mapping from the part's"
        f" name ({', '.join(PARTS)}) to the module, save_adapter({{'unet': module}}, ...)."
    )


def with_part(file: AdapterFile, part: str) -> AdapterFile:
    """The file of a module with its names behind the part's."""
    return dataclasses.replace(
        file,
        configs={join(part, name): config for name, config in file.configs.items()},
        tensors={join(part, key): tensor for key, tensor in file.tensors.items()},
        base={join(part, name): weight for name, weight in file.base.items()},
        biases=[join(part, key) for key in file.biases],
        modules_to_save=[join(part, name) for name in file.modules_to_save],
    )


def of_parts(files: Collection[AdapterFile]) -> AdapterFile:
    """One file of those of several parts."""
    result = AdapterFile({}, {})
    for file in files:
        result.configs.update(file.configs)
        result.tensors.update(file.tensors)
        result.base.update(file.base)
        result.biases += file.biases
        result.modules_to_save += file.modules_to_save
    return result


def write_diffusers(file: AdapterFile, path: Path) -> None:
    """A folder; `file` has k = 1 throughout, and names that begin with a part."""
    tensors: dict[str, Tensor] = {}
    ranks_of_parts: dict[str, dict[str, int]] = {}
    for name, (down, up) in _pairs(_in_parts(file)).items():
        tensors.update(zip(lora_keys(name), (down, up), strict=True))
        part, _, own = name.partition(".")
        ranks_of_parts.setdefault(part, {})[own] = len(down)
    metadata = {
        f"{part}.{field}": value
        for part, ranks in ranks_of_parts.items()
        for field, value in _config(ranks).items()
    }
    header = {"format": "pt", METADATA: json.dumps(metadata, indent=2, sort_keys=True)}
    tensors = unshared(tensors)
    write_folder(
        path, lambda folder: write_tensors(tensors, folder / WEIGHTS, header), keep_others=True
    )


def _config(ranks: dict[str, int]) -> dict[str, Any]:
    """Fields of a LoraConfig for layers of these ranks, with a scaling of 1."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != r}
    return {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }


def write_kohya(file: AdapterFile, path: Path) -> None:
    """One file; `file` has k = 1 throughout, and names that begin with a part."""
    file = _in_parts(file)
    for name in file.configs:
        if groups_of(file, name) > 1:
            raise ValueError(
                f"{name!r} is a convolution of several groups, for which kohya has no pair."
                ' format="lora" holds it.'
            )
    tensors: dict[str, Tensor] = {}
    pairs = _pairs(file)
    # one rank for all: diffusers' converter mixes up ranks
    rank = max((len(down) for down, _ in pairs.values()), default=1)
    for name, (down, up) in pairs.items():
        key = _kohya_name(name)
        if f"{key}.alpha" in tensors:
            raise ValueError(f"{name!r} and another layer are both {key!r} in kohya's names.")
        missing, kernel = rank - len(down), [0, 0] * (down.dim() - 2)
        tensors[f"{key}.lora_down.weight"] = F.pad(down, (0, 0, *kernel, 0, missing))
        tensors[f"{key}.lora_up.weight"] = F.pad(up, (*kernel, 0, missing))
        tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=down.dtype)
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }
    tensors = unshared(tensors)
    write_atomically(path, lambda temporary: write_tensors(tensors, temporary, header))


def _kohya_name(name: str) -> str:
    part, _, own = name.partition(".")
    if not PARTS[part]:
        raise ValueError(
            f"{name!r}: kohya's names for transformers are not diffusers'. format=\"diffusers\""
            " writes them, and ComfyUI reads that."
        )
    if part.startswith("text_encoder") and own.startswith("encoder.layers."):
        own = f"text_model.{own}"  # as transformers named them before 5
    return f"{PARTS[part][0]}_{own.replace('.', '_')}"


def _in_parts(file: AdapterFile) -> AdapterFile:
    if all(name.partition(".")[0] in PARTS for name in file.configs):
        return file
    return with_part(file, part_of_pipeline(str((file.model or {}).get("class"))))


def _pairs(file: AdapterFile) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B of every layer, with a scaling of 1."""
    return {name: in_peft_layout(file, name, pair_of(file, name).folded()) for name in file.configs}


def read_diffusers(path: Path) -> AdapterFile:
    """Read diffusers' folder; names begin with the part (`of_part` takes one)."""
    with opened(path / WEIGHTS) as header:
        reader, alpha_of = PairReader(path, header, "diffusers"), _alphas(path, header.metadata)
        for key in header.shapes:
            for down_end, up_end in ENDS:
                if key.endswith(down_end):
                    name = key.removesuffix(down_end)
                    alpha, use_rslora = reader.scalar(f"{name}.alpha"), False
                    if alpha is None:
                        alpha, use_rslora = alpha_of(name)
                    pair = Stored(key), Stored(name + up_end)
                    reader.add(name, *pair, alpha, use_rslora=use_rslora, kind="convolution")
        return reader.finished()


def _alphas(path: Path, metadata: Mapping[str, str]) -> Callable[[str], tuple[Any, bool]]:
    """What the LoraConfigs in the metadata say of a layer: alpha or None, and use_rslora."""
    fields = parse_json(path, f"the metadata {METADATA!r}", metadata.get(METADATA, "{}"))
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path}: the metadata {METADATA!r} is no JSON object.")

    @functools.cache
    def pattern_of(part: str) -> Callable[[str], Any]:
        patterns, alpha = fields.get(f"{part}.alpha_pattern"), fields.get(f"{part}.lora_alpha")
        return pattern(path, patterns, alpha)

    def alpha_of(name: str) -> tuple[Any, bool]:
        part, _, own = name.partition(".")
        return pattern_of(part)(own), bool(fields.get(f"{part}.use_rslora"))

    return alpha_of


def read_kohya(path: Path) -> AdapterFile:
    """Read kohya's file; names are kohya's until a model says what it calls them (`of_part`)."""
    with opened(path) as header:
        reader = PairReader(path, header, "kohya")
        for key in header.shapes:
            if key.endswith(".lora_down.weight"):
                name = key.removesuffix(".lora_down.weight")
                down, up = Stored(key), Stored(f"{name}.lora_up.weight")
                reader.add(name, down, up, reader.scalar(f"{name}.alpha"), kind="convolution")
        return reader.finished()


def of_part(file: AdapterFile, part: str, layers: Collection[str]) -> AdapterFile:
    """What a file of a pipeline holds for one part, under the names of the module that has these
    layers.

    Raises:
        AdapterFileError: nothing, or a layer that the module lacks.
    """
    if file.format == "diffusers":
        prefix = f"{part}."
        names = {n: n.removeprefix(prefix) for n in file.configs if n.startswith(prefix)}
    else:
        names = _names_from_kohya(file, part, layers)
    if not names:
        there = sorted({re.split(r"[._]", name)[0] for name in file.configs})
        raise AdapterFileError(
            f"the file holds nothing for the part {part!r} of a pipeline; its names begin with"
            f" {there}."
        )
    if len(set(names.values())) < len(names):
        raise AdapterFileError(f"the file holds two pairs for one layer of the part {part!r}.")
    return with_names(file, names)


def _names_from_kohya(file: AdapterFile, part: str, layers: Collection[str]) -> dict[str, str]:
    """The names in the file of the layers of a part -> their names in its module."""
    flat = {layer.replace(".", "_"): layer for layer in layers}
    names = {}
    for name in file.configs:
        for prefix in PARTS.get(part, ()):
            if name.startswith(f"{prefix}_"):
                own = name.removeprefix(f"{prefix}_")
                names[name] = flat.get(own) or flat.get(own.removeprefix("text_model_"), own)
    return names


def _is_kohya(path: Path) -> bool:
    try:
        with opened(path) as header:
            return any(key.endswith(".lora_down.weight") for key in header.shapes)
    except AdapterFileError:
        return False


KINDS = ("linear", "convolution")
REASON = "a LoRA of a pipeline holds linear layers and convolutions"
DIFFUSERS = Format(
    lambda path: path.is_dir() and (path / WEIGHTS).is_file(),
    read_diffusers,
    write_diffusers,
    kinds=KINDS,
    beside=False,
    reason=REASON,
)
KOHYA = Format(
    lambda path: path.is_file() and _is_kohya(path),
    read_kohya,
    write_kohya,
    kinds=KINDS,
    beside=False,
    reason=REASON,
)
