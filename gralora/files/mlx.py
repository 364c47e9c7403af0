"""mlx-lm's folder, as its own reader takes it (`mlx_lm/tuner/utils.py`, `load_adapters`).

`adapters.safetensors` holds `<layer>.lora_a` (in, rank) and `<layer>.lora_b` (rank, out);
`adapter_config.json` one rank and one scale for all, which multiplies directly, and the names of
the layers within a block. Where ranks differ the lower ones are padded with zeros, where scalings
do lora_b takes them in. Of an embedding lora_a is (tokens, rank).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from gralora.files.atomic import write_folder
from gralora.files.experts import refuse_experts
from gralora.files.lora import is_embedding, lora_pairs
from gralora.files.own import (
    AdapterFile,
    AdapterFileError,
    BaseWeight,
    Format,
    check_dtype,
    layer_config,
    opened,
    read_json,
    unshared,
    write_tensors,
)
from gralora.layers.class_change import join
from gralora.model.state import adapter_keys

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
BLOCK = re.compile(r"^.*\blayers\.\d+\.")


def write_mlx(file: AdapterFile, path: Path) -> None:
    """Write a file with k = 1 throughout."""
    refuse_experts(file, "mlx-lm's folder, as it is written here,")
    beside = [*file.biases, *file.modules_to_save]
    if beside:
        raise ValueError(
            f"the adapter trains {beside[0]!r} as well, which mlx-lm's LoRA can't hold: merge, and"
            " convert the model."
        )
    for name in file.configs:
        kind = file.base[name].kind if name in file.base else "linear"
        if kind not in ("linear", "embedding"):
            raise ValueError(f"{name!r}, of kind {kind!r}, is nothing that mlx-lm adapts.")
    pairs, tensors = lora_pairs(file), {}
    rank = max((config.r for config in file.configs.values()), default=1)
    scalings = {config.scaling for config in file.configs.values()}
    scale = scalings.pop() if len(scalings) == 1 else 1.0
    for name, config in file.configs.items():
        down, up = (pairs[join(name, f"lora_{letter}.weight")] for letter in "AB")
        up = up * (config.scaling / scale)
        down, up = _padded(down, rank, 0), _padded(up, rank, 1)
        a, b = (up, down) if is_embedding(file, name) else (down.mT, up.mT)
        tensors[join(name, "lora_a")], tensors[join(name, "lora_b")] = (
            a.contiguous(),
            b.contiguous(),
        )
    dropouts = {config.gralora_dropout for config in file.configs.values()}
    config_json = {
        "fine_tune_type": "lora",
        "model": file.base_name,
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
            "keys": sorted({BLOCK.sub("", name) for name in file.configs}),
        },
    }
    tensors = unshared(tensors)

    def write(folder: Path) -> None:
        write_tensors(tensors, folder / WEIGHTS, {"format": "mlx"})
        (folder / CONFIG).write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")

    write_folder(path, write, keep_others=True)


def read_mlx(path: Path) -> AdapterFile:
    """Read a folder of mlx-lm's."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    parameters = config.get("lora_parameters")
    if config.get("fine_tune_type", "lora") != "lora" or not isinstance(parameters, dict):
        raise AdapterFileError(f"{path} holds {WEIGHTS}, but {CONFIG} describes no LoRA.")
    scale: Any = parameters.get("scale")
    result = AdapterFile({}, {}, format="mlx")
    with opened(path / WEIGHTS) as (_, shapes, dtypes, get):
        names = [
            key.removesuffix("lora_a").removesuffix(".") for key in shapes if key.endswith("lora_a")
        ]
        if len(names) * 2 != len(shapes):
            raise AdapterFileError(f"{path} holds tensors that are no pair of a LoRA.")
        for name in names:
            a, b = (shapes.get(join(name, f"lora_{letter}"), ()) for letter in "ab")
            if (
                len(a) != 2
                or len(b) != 2
                or a[1] != b[0]
                or 0 in a + b
                or not isinstance(scale, (int, float))
            ):
                raise AdapterFileError(
                    f"{path}: {name!r} has a pair of shapes {a} and {b}, and a scale of {scale!r}."
                )
            for letter in "ab":
                check_dtype(path, f"{name}.lora_{letter}", dtypes[join(name, f"lora_{letter}")])
            embedding = name.rpartition(".")[2] in (
                "embed_tokens",
                "wte",
                "embedding",
                "embeddings",
            )
            down, up = get(join(name, "lora_a")).mT, get(join(name, "lora_b")).mT
            if embedding:
                down, up = up.mT, down.mT
                result.base[name] = BaseWeight(
                    (len(up), down.shape[1]), "unknown", False, None, "embedding"
                )
            r = a[1]
            fields = {
                "r": r,
                "alpha": scale * r,
                "gralora_k": 1,
                "gralora_dropout": parameters.get("dropout", 0.0),
            }
            result.configs[name] = layer_config(path, name, fields)
            pair = {
                "A": rearrange(down, "r i -> 1 i r").contiguous(),
                "B": rearrange(up, "o r -> 1 r o").contiguous(),
            }
            result.tensors.update(adapter_keys(name, pair))
    return result


MLX = Format(lambda path: path.is_dir() and (path / WEIGHTS).is_file(), read_mlx, write_mlx)


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - tensor.shape[axis]
    return F.pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing))
