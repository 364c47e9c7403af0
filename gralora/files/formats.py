"""The table of file formats: what each can express, which of them a path holds, and where it
lies.
"""

from __future__ import annotations

import dataclasses
import re
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
    layer_keys,
)
from gralora.files.peft import LORA, PEFT

FORMATS: dict[str, Format] = {
    **{"gralora": GRALORA, "peft": PEFT, "lora": LORA, "gguf": GGUF},
    **{"diffusers": DIFFUSERS, "kohya": KOHYA, "mlx": MLX},
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
    """
    if experts not in ("fused", "each"):
        raise ValueError(f'experts={experts!r} is not legal: it must be "fused" or "each".')
    if experts != "fused" and format != "lora":
        raise ValueError(f'experts={experts!r} is for format="lora".')
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(
            f"dtype={dtype} is not legal: it must be one of {', '.join(map(str, FLOATS.values()))}."
        )
    if format in LORA_FORMATS:
        file = as_lora(file, _rank(file, rank), errors)
        file = apart(file) if experts == "each" else file
    elif rank is not None:
        raise ValueError(
            f'rank={rank} is for plain LoRA, such as format="lora"; the rank of GraLoRA is its r.'
        )
    elif errors is not None:
        errors.update(dict.fromkeys(file.configs, 0.0))
    if dtype is not None:
        own = {key for name, config in file.configs.items() for key in layer_keys(name, config)}
        cast = {
            key: tensor.to(dtype) if key in own else tensor for key, tensor in file.tensors.items()
        }
        file = dataclasses.replace(file, tensors=cast)
    return file


def exact_rank(file: AdapterFile) -> int:
    """The largest rank that some layer has as plain LoRA."""
    return max((c.r * c.gralora_k + c.hybrid_r for c in file.configs.values()), default=1)


def _rank(file: AdapterFile, rank: int | float | str | None) -> int | float | None:
    if not isinstance(rank, str):
        return rank
    legal = [each for each in VLLM_RANKS if each >= exact_rank(file)]
    if rank != "vllm" or not legal:
        why = (
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter's is {exact_rank(file)}:"
            " give a number, to cut it"
        )
        raise ValueError(
            why + "."
            if rank == "vllm"
            else f'rank={rank!r} is not legal: it must be an integer, a share below 1, or "vllm".'
        )
    return legal[0]


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
    own = [
        file
        for file in sorted(folder.glob("*.safetensors"))
        if not (folder / "adapter_config.json").exists()
    ]
    return own[0] if len(own) == 1 and own[0].name != "pytorch_lora_weights.safetensors" else folder


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
        found["num_hidden_layers"], found["num_attention_heads"] = (
            getattr(config, n, None) for n in ("n_layer", "n_head")
        )
    plain = {key: value for key, value in found.items() if isinstance(value, (str, int, list))}
    return plain if isinstance(found["model_type"], str) else None
