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

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from gralora.files.atomic import write_atomically
from gralora.files.own import (
    AdapterFile,
    AdapterFileError,
    Format,
    Header,
    kind_of,
    with_names,
)
from gralora.files.pairs import PairReader, Stored, pair_of, put_pair


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
DTYPES = ("F32", "F16", "BF16")
DAMAGES = (
    ValueError,
    IndexError,
    KeyError,
    OSError,
    TypeError,
    OverflowError,
    UnicodeDecodeError,
)
"""What the package raises at a damaged file."""


def write_gguf(file: AdapterFile, path: Path) -> None:
    """Write a file with k = 1 throughout."""
    gguf = _package()
    architecture = architecture_of(file.model)
    _refuse_tied(file)
    names = gguf_names(list(file.configs), file.model)
    alpha = max((config.alpha for config in file.configs.values()), default=1.0)

    def write(target: Path) -> None:
        writer = gguf.GGUFWriter(target, architecture.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        for name in file.configs:
            down, up, _ = pair_of(file, name).with_alpha(alpha)
            up = permuted(up, heads_of(name, file.model))
            both = (up, down.mT) if kind_of(file, name) == "embedding" else (down, up)
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
    fields, header = _opened(path)
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise AdapterFileError(f"{path} is a GGUF file, but no LoRA adapter.")
    reader = PairReader(path, header, "gguf")
    for key in header.shapes:
        if not key.endswith(".lora_a"):
            continue
        name = key.removesuffix(".lora_a")
        lora_a, lora_b = f"{name}.lora_a", f"{name}.lora_b"
        if name == TOKEN_EMBEDDING:
            down, up, kind = Stored(lora_b, transposed=True), Stored(lora_a), "embedding"
        else:
            down, up, kind = Stored(lora_a), Stored(lora_b), "linear"
        reader.add(name, down, up, fields.get("adapter.lora.alpha") or None, kind=kind)
    file = reader.finished()
    file.model = {"architecture": fields.get("general.architecture")}
    return file


def _opened(path: Path) -> tuple[dict[str, Any], Header]:
    """The metadata of a GGUF file, and its tensors."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except DAMAGES as error:
        raise AdapterFileError(f"{path} cannot be read as a GGUF file: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    dtypes = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise AdapterFileError(
                f"{path}: {name} is of type {dtype}; legal are {', '.join(DTYPES)}."
            )
    shapes = {name: tuple(t.shape.tolist()[::-1]) for name, t in tensors.items()}
    return fields, Header({}, shapes, dtypes, lambda key: _tensor(gguf, tensors[key]))


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
    result = with_names(file, {name: here[name] for name in file.configs})
    for name in result.configs:
        pair, heads = pair_of(result, name), heads_of(name, model)
        if heads is not None and len(pair.up) % (2 * heads):
            raise AdapterFileError(
                f"the file has {len(pair.up)} outputs for {name!r}, which in this model has"
                f" {heads} heads of an even size."
            )
        put_pair(result, name, pair._replace(up=permuted(pair.up, heads, back=True)))
    return result


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


def _refuse_tied(file: AdapterFile) -> None:
    if not (file.model or {}).get("tie_word_embeddings"):
        return
    for name in file.configs:
        if kind_of(file, name) == "embedding" or name.endswith("lm_head"):
            raise ValueError(
                f"{name!r} is tied to its head or embedding, which in llama.cpp are one tensor:"
                " merge_and_unload, save the model and convert that."
            )


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor) -> None:
    values = tensor if tensor.dtype is torch.float16 else tensor.float()
    array = values.contiguous().numpy()
    if tensor.dtype is torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, array)


def _tensor(gguf: Any, tensor: Any) -> Tensor:
    if tensor.tensor_type.name == "BF16":
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.copy()).bfloat16()
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


GGUF = Format(
    lambda path: path.is_file() and _starts(path),
    read_gguf,
    write_gguf,
    kinds=("linear", "embedding"),
    beside=False,
    reason="llama.cpp's LoRA file, as it is written here, holds linear layers and the embedding",
)
