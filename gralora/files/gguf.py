"""llama.cpp's LoRA file, written and read with the package `gguf`.

Its facts, from llama.cpp's `src/llama-adapter.cpp`: metadata general.type "adapter",
general.architecture that of the model, adapter.type "lora", adapter.lora.alpha; tensors `<name of
the weight>.lora_a` (rank, in) and `.lora_b` (out, rank), ranks of their own. The scale is alpha /
rank of each tensor with one alpha for all, so where scalings differ B takes the rest in. Of the
token embedding lora_a is (tokens, rank) and lora_b (width, rank). Names are those of `gguf`'s own
tables.

Some architectures have the rows of q and k in another order there than in transformers: the two
halves of each head that rotary embeddings turn together lie side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from gralora.config import GraloraConfig
from gralora.files.atomic import write_atomically
from gralora.files.experts import refuse_experts
from gralora.files.lora import is_embedding, lora_pairs
from gralora.files.own import AdapterFile, AdapterFileError, BaseWeight, Format, layer_config
from gralora.layers.class_change import join
from gralora.model.state import adapter_keys


class Architecture(NamedTuple):
    """What llama.cpp calls a model of transformers, and whether it turns q and k round."""

    name: str
    permuted: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2"),
}
"""By `model_type` of transformers' config; each is tested with llama.cpp itself."""

MAGIC = b"GGUF"
TOKEN_EMBEDDING = "token_embd.weight"


def write_gguf(file: AdapterFile, path: Path) -> None:
    """Write a file with k = 1 throughout."""
    gguf = _package()
    architecture = architecture_of(file.model)
    _refuse(file)
    names = gguf_names(list(file.configs), file.model)
    pairs = lora_pairs(file)
    alpha = max((config.alpha for config in file.configs.values()), default=1.0)

    def write(target: Path) -> None:
        writer = gguf.GGUFWriter(target, architecture.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        for name, config in file.configs.items():
            down, up = (pairs[join(name, f"lora_{letter}.weight")] for letter in "AB")
            up = up.to(torch.promote_types(up.dtype, torch.float32)) * (config.alpha / alpha)
            up = permuted(up, heads_of(name, file.model)).to(down.dtype)
            both = (up, down.mT) if is_embedding(file, name) else (down, up)
            for letter, tensor in zip("ab", both, strict=True):
                _add(gguf, writer, f"{names[name]}.lora_{letter}", tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)


def read_gguf(path: Path) -> AdapterFile:
    """Read llama.cpp's file. Its layers bear llama.cpp's names until a model says what it calls
    them (`renamed`).
    """
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (
        ValueError,
        IndexError,
        KeyError,
        OSError,
        TypeError,
        OverflowError,
        UnicodeDecodeError,
    ) as error:
        raise AdapterFileError(f"{path} cannot be read as a GGUF file: {error}") from error
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise AdapterFileError(f"{path} is a GGUF file, but no LoRA adapter.")
    alpha = fields.get("adapter.lora.alpha")
    result = AdapterFile(
        {}, {}, format="gguf", model={"architecture": fields.get("general.architecture")}
    )
    for key in [key for key in tensors if key.endswith(".lora_a")]:
        name = key.removesuffix(".lora_a")
        if f"{name}.lora_b" not in tensors:
            raise AdapterFileError(f"{path}: {name!r} has a lora_a and no lora_b.")
        down, up = (_read(gguf, path, tensors[f"{name}.lora_{letter}"]) for letter in "ab")
        if name == TOKEN_EMBEDDING:
            up, down = down, up.mT
            result.base[name] = BaseWeight(
                (len(up), down.shape[1]), "unknown", False, None, "embedding"
            )
        if (
            down.dim() != 2
            or up.dim() != 2
            or len(down) != up.shape[1]
            or 0 in (*down.shape, *up.shape)
        ):
            raise AdapterFileError(
                f"{path}: {name!r} has a pair of shapes {tuple(down.shape)} and {tuple(up.shape)}."
            )
        r = len(down)
        result.configs[name] = layer_config(
            path, name, {"r": r, "alpha": alpha or r, "gralora_k": 1}
        )
        A, B = rearrange(down, "r i -> 1 i r"), rearrange(up, "o r -> 1 r o")
        result.tensors.update(adapter_keys(name, {"A": A.contiguous(), "B": B.contiguous()}))
    if len(result.configs) * 2 != len(tensors):
        raise AdapterFileError(f"{path} holds tensors that are no pair of a LoRA.")
    return result


GGUF = Format(lambda path: path.is_file() and _starts(path), read_gguf, write_gguf)


def renamed(file: AdapterFile, layers: list[str], model: Mapping[str, Any] | None) -> AdapterFile:
    """A file of llama.cpp's under the names of a model that has these layers, its q and k turned
    back.

    Raises:
        AdapterFileError: the model's architecture is another one, or it lacks a layer.
    """
    try:
        architecture = architecture_of(model)
    except ValueError as error:
        raise AdapterFileError(str(error)) from error
    if architecture.name != (file.model or {}).get("architecture"):
        given = (file.model or {}).get("architecture")
        raise AdapterFileError(
            f"the file is for models that llama.cpp calls {given!r}, and this is"
            f" {architecture.name!r}."
        )
    here = {known: name for name, known in gguf_names(layers, model, strict=False).items()}
    lacking = [name for name in file.configs if name not in here]
    if lacking:
        raise AdapterFileError(f"the file adapts {lacking[0]!r}, which this model lacks.")
    configs: dict[str, GraloraConfig] = {}
    tensors: dict[str, Tensor] = {}
    for old, config in file.configs.items():
        new = here[old]
        A, B = (file.tensors[key] for key in adapter_keys(old, dict.fromkeys("AB")))
        up = permuted(rearrange(B, "1 r o -> o r"), heads_of(new, model), back=True)
        configs[new] = config
        tensors.update(adapter_keys(new, {"A": A, "B": rearrange(up, "o r -> 1 r o").contiguous()}))
    base = {here[name]: weight for name, weight in file.base.items()}
    return dataclasses.replace(file, configs=configs, tensors=tensors, base=base)


def architecture_of(model: Mapping[str, Any] | None) -> Architecture:
    """llama.cpp's architecture of a model, as `AdapterFile.model` describes it.

    Raises:
        ValueError: it is not known, or not covered.
    """
    model_type = (model or {}).get("model_type")
    if model_type not in ARCHITECTURES:
        known = (
            f"model_type={model_type!r} is not covered"
            if model_type
            else "what model the adapter is of is not known"
        )
        raise ValueError(
            f"{known}, so llama.cpp's names for its layers can't be told. Covered:"
            f' {", ".join(ARCHITECTURES)}. Ways out: format="lora" and llama.cpp\'s own'
            " convert_lora_to_gguf.py, or merge and serve the model. `gralora convert` takes the"
            " model's folder or config.json as --base."
        )
    return ARCHITECTURES[model_type]


def gguf_names(
    layers: list[str], model: Mapping[str, Any] | None, *, strict: bool = True
) -> dict[str, str]:
    """llama.cpp's names for the weights of layers.

    Raises:
        ValueError: it has none for some layer; if not `strict`, these are left out.
    """
    gguf = _package()
    name = architecture_of(model).name
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, int((model or {}).get("num_hidden_layers", 0)))
    result: dict[str, str] = {}
    for layer in layers:
        forms = (
            layer,
            f"model.{layer}",
            f"transformer.{layer}",
            layer.replace("language_model.", ""),
        )
        found = next((own for form in forms if (own := table.get_name(form)) is not None), None)
        if found is not None:
            result[layer] = f"{found}.weight"
        elif strict:
            raise ValueError(f"llama.cpp's architecture {name!r} has no weight for {layer!r}.")
    return result


def heads_of(layer: str, model: Mapping[str, Any] | None) -> int | None:
    """In how many heads the outputs of a layer are turned round; None if they are not."""
    model = model or {}
    last = layer.rpartition(".")[2]
    if last not in ("q_proj", "k_proj") or not architecture_of(model).permuted:
        return None
    heads = int(model["num_attention_heads"])
    return heads if last == "q_proj" else int(model.get("num_key_value_heads") or heads)


def permuted(up: Tensor, heads: int | None, *, back: bool = False) -> Tensor:
    """Rows (out, ...) from transformers' order into llama.cpp's, or back: the halves of each head
    side by side.
    """
    if heads is None:
        return up
    if back:
        return rearrange(up, "(h d two) r -> (h two d) r", h=heads, two=2)
    return rearrange(up, "(h two d) r -> (h d two) r", h=heads, two=2)


def _refuse(file: AdapterFile) -> None:
    refuse_experts(file, "llama.cpp's file, as it is written here,")
    beside = [*file.biases, *file.modules_to_save]
    if beside:
        raise ValueError(
            f"the adapter trains {beside[0]!r} as well, which a LoRA of llama.cpp can't hold:"
            " merge_and_unload, save the model and convert that."
        )
    for name in file.configs:
        kind = file.base[name].kind if name in file.base else "linear"
        if kind not in ("linear", "embedding"):
            raise ValueError(f"{name!r}, of kind {kind!r}, is nothing that llama.cpp adapts.")
        if (file.model or {}).get("tie_word_embeddings") and (
            kind == "embedding" or name.endswith("lm_head")
        ):
            raise ValueError(
                f"{name!r} is tied to its head or embedding, which in llama.cpp are one tensor:"
                " merge_and_unload, save the model and convert that."
            )


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor) -> None:
    if tensor.dtype is torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(
            name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind
        )
    else:
        kept = tensor if tensor.dtype is torch.float16 else tensor.float()
        writer.add_tensor(name, kept.contiguous().numpy())


def _read(gguf: Any, path: Path, tensor: Any) -> Tensor:
    kinds = {getattr(gguf.GGMLQuantizationType, kind): kind for kind in ("F32", "F16", "BF16")}
    if tensor.tensor_type not in kinds:
        raise AdapterFileError(
            f"{path}: {tensor.name} is of type {tensor.tensor_type.name}; legal are F32, F16, BF16."
        )
    if kinds[tensor.tensor_type] == "BF16":
        return torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        ).bfloat16()
    return torch.from_numpy(tensor.data.copy())


def _starts(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "llama.cpp's files need the package gguf: pip install 'gralora[gguf]'."
        ) from error
    return gguf
