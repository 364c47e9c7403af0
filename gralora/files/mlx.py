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

from torch import Tensor

from gralora.files.atomic import write_folder
from gralora.files.own import (
    AdapterFile,
    AdapterFileError,
    Format,
    kind_of,
    opened,
    read_json,
    unshared,
    write_tensors,
)
from gralora.files.pairs import PairReader, Stored, padded, pair_of
from gralora.layers.class_change import join

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
BLOCK = re.compile(r"^.*\blayers\.\d+\.")
EMBEDDINGS = ("embed_tokens", "wte", "embedding", "embeddings")
"""Names of embeddings in mlx-lm's models."""


def write_mlx(file: AdapterFile, path: Path) -> None:
    """Write a file with k = 1 throughout."""
    pairs = {name: pair_of(file, name) for name in file.configs}
    scale = 1.0
    scalings = {config.scaling for config in file.configs.values()}
    if len(scalings) == 1:
        (scale,) = scalings
    else:
        pairs = {name: pair.folded() for name, pair in pairs.items()}
    rank = max((config.r for config in file.configs.values()), default=1)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        down, up = padded(pair.down, pair.up, rank)
        embedding = kind_of(file, name) == "embedding"
        both = (up, down) if embedding else (down.mT, up.mT)
        tensors.update(zip(_keys(name), (each.contiguous() for each in both), strict=True))
    config = _config(file, rank, scale)
    tensors = unshared(tensors)

    def write(folder: Path) -> None:
        write_tensors(tensors, folder / WEIGHTS, {"format": "mlx"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    write_folder(path, write, keep_others=True)


def _config(file: AdapterFile, rank: int, scale: float) -> dict[str, Any]:
    dropouts = {config.gralora_dropout for config in file.configs.values()}
    return {
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


def read_mlx(path: Path) -> AdapterFile:
    """Read a folder of mlx-lm's."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    parameters = config.get("lora_parameters")
    if config.get("fine_tune_type", "lora") != "lora" or not isinstance(parameters, dict):
        raise AdapterFileError(f"{path} holds {WEIGHTS}, but {CONFIG} describes no LoRA.")
    scale = parameters.get("scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise AdapterFileError(f"{path / CONFIG} has a scale of {scale!r}; it must be a number.")
    with opened(path / WEIGHTS) as header:
        reader = PairReader(path, header, "mlx")
        for key in header.shapes:
            if not key.endswith("lora_a"):
                continue
            name = key.removesuffix("lora_a").removesuffix(".")
            lora_a, lora_b = _keys(name)
            dropout = parameters.get("dropout", 0.0)
            if name.rpartition(".")[2] in EMBEDDINGS:
                down, up, kind = Stored(lora_b), Stored(lora_a), "embedding"
            else:
                down, up, kind = Stored(lora_a, True), Stored(lora_b, True), "linear"
            reader.add(name, down, up, scaling=scale, dropout=dropout, kind=kind)
        return reader.finished()


def _keys(name: str) -> tuple[str, str]:
    return join(name, "lora_a"), join(name, "lora_b")


MLX = Format(
    lambda path: path.is_dir() and (path / WEIGHTS).is_file(),
    read_mlx,
    write_mlx,
    kinds=("linear", "embedding"),
    beside=False,
    reason="mlx-lm adapts linear layers and embeddings, and reads nothing else",
)
