"""The table of file formats: what each can express, which of them a path holds, and where it
lies.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gralora.files.diffusers import DIFFUSERS, KOHYA
from gralora.files.experts import apart
from gralora.files.gguf import GGUF
from gralora.files.lora import as_lora
from gralora.files.mlx import MLX
from gralora.files.own import (
    FLOATS,
    GRALORA,
    MODEL_FIELDS,
    AdapterFile,
    AdapterFileError,
    Format,
    check_finite,
    kind_of,
    tensors_beside,
)
from gralora.files.peft import LORA, PEFT

FORMATS: dict[str, Format] = {
    "gralora": GRALORA,
    "peft": PEFT,
    "lora": LORA,
    "gguf": GGUF,
    "diffusers": DIFFUSERS,
    "kohya": KOHYA,
    "mlx": MLX,
}
"""By the name that `save_adapter` takes; the last that matches reads."""

LORA_FORMATS = {"lora", "gguf", "diffusers", "kohya", "mlx"}
"""Formats that hold plain LoRA."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be (`vllm/config/lora.py`, `MaxLoRARanks`)."""


def convertible(
    file: AdapterFile,
    format: str,
    rank: int | float | str | None = None,
    errors: dict[str, float] | None = None,
    experts: str = "fused",
    dtype: torch.dtype | None = None,
) -> AdapterFile:
    """`file` as `format` can express it: for plain LoRA as pairs of rank `rank`, or of their own,
    exactly.

    Raises:
        ValueError: the format can't hold it, or an option is not legal or for another format.
    """
    if experts not in ("fused", "each"):
        raise ValueError(f'experts={experts!r} is not legal: it must be "fused" or "each".')
    if experts != "fused" and format != "lora":
        raise ValueError(f'experts={experts!r} is for format="lora".')
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(
            f"dtype={dtype} is not legal: it must be one of {', '.join(map(str, FLOATS.values()))}."
        )
    if rank is not None and format not in LORA_FORMATS:
        raise ValueError(
            f'rank={rank} is for plain LoRA, such as format="lora"; the rank of GraLoRA is its r.'
        )
    for refusal in refusals(file, format):
        raise ValueError(refusal)
    if format in LORA_FORMATS:
        file = as_lora(file, _rank(file, rank), errors)
    elif errors is not None:
        errors.update(dict.fromkeys(file.configs, 0.0))
    if experts == "each":
        file = apart(file)
    if dtype is not None:
        beside = tensors_beside(file)
        tensors = {key: each.to(dtype) for key, each in file.tensors.items() if key not in beside}
        file = dataclasses.replace(file, tensors={**tensors, **beside})
    return file


def refusals(file: AdapterFile, format: str) -> Iterator[str]:
    """What of an adapter a format can't hold, and why, as texts of errors."""
    row = FORMATS[format]
    kinds = {name: kind_of(file, name) for name in file.configs}
    name = next((name for name, kind in kinds.items() if kind not in row.kinds), None)
    if name is not None:
        others = [f'"{other}"' for other in FORMATS if kinds[name] in FORMATS[other].kinds]
        yield (
            f"{name!r}, of kind {kinds[name]!r}, can't be saved with format={format!r}:"
            f" {row.reason}. Formats that hold it: {', '.join(others)}."
        )
    beside = [*file.biases, *file.modules_to_save]
    if beside and not row.beside:
        others = [f'"{other}"' for other in FORMATS if FORMATS[other].beside]
        yield (
            f"the adapter trains {beside[0]!r} as well, which can't be saved with"
            f" format={format!r}: {row.reason}. Formats that hold it: {', '.join(others)}; or"
            " merge_and_unload, and save or convert the whole model."
        )


def exact_rank(file: AdapterFile) -> int:
    """The largest rank that some layer has as plain LoRA."""
    return max((c.r * c.gralora_k + c.hybrid_r for c in file.configs.values()), default=1)


def _rank(file: AdapterFile, rank: int | float | str | None) -> int | float | None:
    if not isinstance(rank, str):
        return rank
    if rank != "vllm":
        raise ValueError(
            f'rank={rank!r} is not legal: it must be an integer, a share below 1, or "vllm".'
        )
    exact = exact_rank(file)
    if exact > VLLM_RANKS[-1]:
        raise ValueError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter's is {exact}: give a"
            " number, to cut it."
        )
    return min(each for each in VLLM_RANKS if each >= exact)


def read_adapter(path: Path, *, allow_nonfinite: bool = False) -> AdapterFile:
    """Read an adapter in whatever format it is; NaN and infinite values are refused unless
    allowed.
    """
    if not path.exists():
        raise FileNotFoundError(f"no adapter at {path}")
    format = next((f for f in reversed(FORMATS.values()) if f.matches(path)), None)
    if format is None:
        raise AdapterFileError(f"{path} is no adapter of a known format ({', '.join(FORMATS)}).")
    file = format.read(path)
    if not allow_nonfinite:
        check_finite(path, file.tensors)
    return file


def located(path: str | Path) -> Path:
    """Where an adapter lies: here, or under "owner/name" on the Hugging Face hub, if
    `huggingface_hub` is installed.
    """
    here = Path(path)
    if here.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or here.parent.is_dir():
        return here
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"no adapter at {path}. If it lies on the Hugging Face hub: pip install 'gralora[hub]'."
        ) from None
    try:
        folder = Path(
            snapshot_download(
                str(path), allow_patterns=["*.json", "*.safetensors", "*.gguf", "*.bin"]
            )
        )
    except Exception as error:  # of whatever kind: no network, no such repository, no access
        raise FileNotFoundError(
            f"no adapter at {path}, nor on the Hugging Face hub: {error}"
        ) from error
    files = list(folder.glob("*.safetensors"))
    is_peft = (folder / "adapter_config.json").exists()
    if len(files) == 1 and not is_peft and files[0].name != "pytorch_lora_weights.safetensors":
        return files[0]
    return folder


def model_fields(config: object) -> dict[str, Any] | None:
    """What a file remembers of a model's config, an object or a dict as config.json holds it; None
    if it is none.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    elif isinstance(config, dict):
        config = SimpleNamespace(**{**config, **(config.get("text_config") or {})})
    found = {field: getattr(config, field, None) for field in MODEL_FIELDS}
    if found["num_hidden_layers"] is None:  # GPT-2's names, in a file
        found["num_hidden_layers"] = getattr(config, "n_layer", None)
        found["num_attention_heads"] = getattr(config, "n_head", None)
    plain = {key: value for key, value in found.items() if isinstance(value, (str, int, list))}
    return plain if isinstance(found["model_type"], str) else None
