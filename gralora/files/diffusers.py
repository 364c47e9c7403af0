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
import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from gralora.files.atomic import write_atomically, write_folder
from gralora.files.experts import is_experts
from gralora.files.lora import lora_pairs
from gralora.files.own import (
    AdapterFile,
    AdapterFileError,
    BaseWeight,
    Format,
    check_dtype,
    layer_config,
    opened,
    parse_json,
    unshared,
    write_tensors,
)
from gralora.layers.class_change import join
from gralora.model.state import adapter_keys

WEIGHTS, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
PARTS = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "transformer": None,
}
"""Parts of a pipeline that hold adapters, with kohya's prefix; for transformers kohya has other
names than diffusers.
"""


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
    pairs, metadata = _pairs(_in_parts(file)), {}
    parts: dict[str, dict[str, int]] = {}
    for name, (down, _) in pairs.items():
        part, _, own = name.partition(".")
        parts.setdefault(part, {})[own] = len(down)
    for part, ranks in parts.items():
        r = Counter(ranks.values()).most_common(1)[0][0]
        others = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank != r}
        fields = {
            "r": r,
            "lora_alpha": r,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": list(ranks),
        }
        metadata.update({f"{part}.{field}": value for field, value in fields.items()})
    tensors = {
        f"{name}.lora_{letter}.weight": tensor
        for name, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    header = {"format": "pt", METADATA: json.dumps(metadata, indent=2, sort_keys=True)}
    tensors = unshared(tensors)
    write_folder(
        path, lambda folder: write_tensors(tensors, folder / WEIGHTS, header), keep_others=True
    )


def write_kohya(file: AdapterFile, path: Path) -> None:
    """One file; `file` has k = 1 throughout, and names that begin with a part."""
    tensors: dict[str, Tensor] = {}
    pairs = _pairs(_in_parts(file))
    rank = max(
        (len(down) for down, _ in pairs.values()), default=1
    )  # diffusers' converter mixes up ranks
    for name, (down, up) in pairs.items():
        part, _, own = name.partition(".")
        prefix = PARTS[part]
        if prefix is None:
            raise ValueError(
                f"{name!r}: kohya's names for transformers are not diffusers'. format=\"diffusers\""
                " writes them, and ComfyUI reads that."
            )
        if part.startswith("text_encoder") and own.startswith(
            "encoder.layers."
        ):  # as transformers named them before 5
            own = f"text_model.{own}"
        key = f"{prefix}_{own.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            raise ValueError(f"{name!r} and another layer are both {key!r} in kohya's names.")
        missing, kernel = rank - len(down), [0, 0] * (down.dim() - 2)
        down, up = F.pad(down, (0, 0, *kernel, 0, missing)), F.pad(up, (*kernel, 0, missing))
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(rank), dtype=down.dtype)
    dim = str(rank)
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
    }
    tensors = unshared(tensors)
    write_atomically(path, lambda temporary: write_tensors(tensors, temporary, header))


def read_diffusers(path: Path) -> AdapterFile:
    """Read diffusers' folder; names begin with the part (`of_part` takes one)."""
    with opened(path / WEIGHTS) as (metadata, shapes, dtypes, get):
        said = parse_json(path, f"the metadata {METADATA!r}", metadata.get(METADATA, "{}"))
        if not isinstance(said, dict):
            raise AdapterFileError(f"{path}: the metadata {METADATA!r} is no JSON object.")
        result = AdapterFile({}, {}, format="diffusers")
        forms = ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"))
        known = set()
        for key in shapes:
            form = next((form for form in forms if key.endswith(form[0])), None)
            if form is not None:
                name = key.removesuffix(form[0])
                alpha = f"{name}.alpha"
                scale = _said_scale(said, name, shapes[key][0] if shapes[key] else 0)
                if alpha in shapes and not shapes[alpha]:
                    scale = float(get(alpha)) / max(shapes[key][0], 1)
                    known.add(alpha)
                _add(path, result, name, (key, name + form[1]), shapes, dtypes, get, scale)
                known |= {key, name + form[1]}
        if known != set(shapes):
            raise AdapterFileError(
                f"{path} holds {min(set(shapes) - known)!r}, which is no pair of a plain LoRA."
            )
    return result


def read_kohya(path: Path) -> AdapterFile:
    """Read kohya's file; names are kohya's until a model says what it calls them (`of_part`)."""
    with opened(path) as (_, shapes, dtypes, get):
        result, known = AdapterFile({}, {}, format="kohya"), set()
        for key in [key for key in shapes if key.endswith(".lora_down.weight")]:
            name = key.removesuffix(".lora_down.weight")
            keys = (key, f"{name}.lora_up.weight", f"{name}.alpha")
            rank = shapes[key][0] if shapes[key] else 0
            scale = float(get(keys[2])) / max(rank, 1) if shapes.get(keys[2]) == () else 1.0
            _add(path, result, name, keys[:2], shapes, dtypes, get, scale)
            known |= set(keys)
        if not set(shapes) <= known:
            raise AdapterFileError(
                f"{path} holds {min(set(shapes) - known)!r}, which is no pair of a plain LoRA."
            )
    return result


def of_part(file: AdapterFile, part: str, layers: Collection[str]) -> AdapterFile:
    """What a file of a pipeline holds for one part, under the names of the module that has these
    layers.

    Raises:
        AdapterFileError: nothing, or a layer that the module lacks.
    """
    if file.format == "diffusers":
        names = {
            name: name.removeprefix(f"{part}.")
            for name in file.configs
            if name.startswith(f"{part}.")
        }
    else:
        prefixes = tuple(
            f"{p}_" for p in (PARTS.get(part), "lora_te1" if part == "text_encoder" else None) if p
        )
        flat = {layer.replace(".", "_"): layer for layer in layers}
        names = {}
        for name in file.configs:
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            if prefix is not None:
                own = name.removeprefix(prefix)
                names[name] = flat.get(own) or flat.get(own.removeprefix("text_model_"), own)
    if not names:
        there = sorted({re.split(r"[._]", name)[0] for name in file.configs})
        raise AdapterFileError(
            f"the file holds nothing for the part {part!r} of a pipeline; its names begin with"
            f" {there}."
        )
    result = AdapterFile({}, {}, format=file.format)
    for old, new in names.items():
        result.configs[new] = file.configs[old]
        pair = (file.tensors[key] for key in adapter_keys(old, dict.fromkeys("AB")))
        result.tensors.update(adapter_keys(new, dict(zip("AB", pair, strict=True))))
        if old in file.base:
            result.base[new] = file.base[old]
    return result


DIFFUSERS = Format(
    lambda path: path.is_dir() and (path / WEIGHTS).is_file(), read_diffusers, write_diffusers
)
KOHYA = Format(lambda path: path.is_file() and _is_kohya(path), read_kohya, write_kohya)


def _in_parts(file: AdapterFile) -> AdapterFile:
    if all(name.partition(".")[0] in PARTS for name in file.configs):
        return file
    return with_part(file, part_of_pipeline(str((file.model or {}).get("class"))))


def _pairs(file: AdapterFile) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) of every layer, the scaling in up; of convolutions as kernels."""
    beside = [*file.biases, *file.modules_to_save]
    if beside:
        raise ValueError(
            f"the adapter trains {beside[0]!r} as well, which no LoRA of a pipeline can hold:"
            " merge it."
        )
    for name in file.configs:
        kind = file.base[name].kind if name in file.base else "linear"
        if kind not in ("linear", "convolution") or is_experts(file, name):
            raise ValueError(
                f"{name!r}, of kind {kind!r}, is nothing that a LoRA of a pipeline holds."
            )
    pairs = lora_pairs(file, scaled=True)
    return {
        name: tuple(pairs[join(name, f"lora_{letter}.weight")] for letter in "AB")
        for name in file.configs
    }  # type: ignore[misc]


def _said_scale(said: dict[str, Any], name: str, rank: int) -> float:
    """alpha / rank as a LoraConfig in the metadata has it; 1 where there is none."""
    part, _, own = name.partition(".")
    alpha = said.get(f"{part}.lora_alpha")
    if alpha is None or not rank:
        return 1.0
    patterns = said.get(f"{part}.alpha_pattern") or {}
    exact = {
        re.sub(r"\\(.)", r"\1", text).removeprefix("^").removesuffix("$"): value
        for text, value in patterns.items()
    }
    alpha = exact.get(own, alpha)
    return float(alpha) / (rank**0.5 if said.get(f"{part}.use_rslora") else rank)


def _add(
    path: Path,
    file: AdapterFile,
    name: str,
    keys: tuple[str, ...],
    shapes: Any,
    dtypes: Any,
    get: Any,
    scale: float,
) -> None:
    down, up = (shapes.get(key, ()) for key in keys)
    fits = (
        len(down) >= 2
        and len(up) == len(down)
        and 0 not in down + up
        and down[0] == up[1]
        and not set(up[2:]) - {1}
    )
    if not fits:
        raise AdapterFileError(f"{path}: {name!r} has a pair of shapes {down} and {up}.")
    for key in keys:
        check_dtype(path, key, dtypes[key])
    r = down[0]
    file.configs[name] = layer_config(path, name, {"r": r, "alpha": scale * r, "gralora_k": 1})
    if len(down) > 2:
        file.base[name] = BaseWeight((up[0], *down[1:]), "unknown", False, None, "convolution")
    A, B = (
        rearrange(get(keys[0]).flatten(1), "r i -> 1 i r"),
        rearrange(get(keys[1]).flatten(1), "o r -> 1 r o"),
    )
    file.tensors.update(adapter_keys(name, {"A": A.contiguous(), "B": B.contiguous()}))


def _is_kohya(path: Path) -> bool:
    try:
        with opened(path) as header:
            return any(key.endswith(".lora_down.weight") for key in header.shapes)
    except AdapterFileError:
        return False
