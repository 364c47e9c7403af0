"""Model checkpoints on disk, one tensor in memory at a time, whatever their size.

A checkpoint is one `.safetensors` file, or a folder as Hugging Face writes it: shards, and an index
that says which tensor lies where.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gralora.files.own import FLOATS, opened, read_json
from gralora.layers.class_change import join

INDEX = "model.safetensors.index.json"
CHUNK = 2**22  # bytes
DTYPES = {
    **FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
"""Values of `model_type` in config.json whose linear layers are Conv1D: stored (in, out)."""


class Entry(NamedTuple):
    """One tensor of a shard: its type and shape, and where its bytes lie in the file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass
class Shard:
    """One safetensors file; its header was checked by safetensors itself."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, path: Path) -> Shard:
        with opened(path), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        start = 8 + length
        entries = {}
        for key, each in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            begin, end = each["data_offsets"]
            entries[key] = Entry(each["dtype"], tuple(each["shape"]), start + begin, end - begin)
        return cls(path, metadata, entries)

    def read(self, key: str) -> tuple[Tensor, bytearray]:
        """A tensor, and the memory that it lies in."""
        entry = self.entries[key]
        buffer = bytearray(entry.size)
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            file.readinto(buffer)
        return _tensor_in(buffer, DTYPES[entry.code], entry.shape), buffer

    def write(
        self, path: Path, changed: Callable[[str], bytearray | None], new: dict[str, Tensor]
    ) -> None:
        """Write the shard to `path`, with the bytes that `changed` gives in place of its own, and
        the tensors `new`.
        """
        layout = {key: (e.code, e.shape, e.size) for key, e in self.entries.items()}
        for key, tensor in new.items():
            size = tensor.numel() * tensor.element_size()
            layout[key] = (CODES[tensor.dtype], tuple(tensor.shape), size)
        # the widest types first, as safetensors itself writes, so that each lies at a multiple of
        # its width
        if new:
            layout = dict(sorted(layout.items(), key=lambda item: -_width(item[1][0])))
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        end = 0
        for key, (code, shape, size) in layout.items():
            header[key] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("rb") as source, path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in layout:
                value = _bytes_of(new[key]) if key in new else changed(key)
                if value is not None:
                    file.write(value)
                else:
                    _copy(source, file, self.entries[key])


@dataclass
class Checkpoint:
    """A model on disk: where each of its tensors lies."""

    path: Path
    shards: list[Shard]
    index: dict[str, Any] | None = None
    model_type: str | None = None
    tied: bool = False
    where: dict[str, Shard] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        if path.is_file():
            result = cls(path, [Shard.open(path)])
        elif path.is_dir():
            result = cls._open_folder(path)
        else:
            raise FileNotFoundError(f"no checkpoint at {path}")
        result.where = {key: shard for shard in result.shards for key in shard.entries}
        return result

    @classmethod
    def _open_folder(cls, path: Path) -> Checkpoint:
        index = read_json(path / INDEX) if (path / INDEX).is_file() else None
        names = ["model.safetensors"]
        if index:
            names = sorted(set(index.get("weight_map", {}).values()))
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError(f"{path / INDEX} names files outside its folder.")
        elif not (path / names[0]).is_file():
            raise ValueError(
                f"{path} is no checkpoint: it holds neither {INDEX} nor model.safetensors."
            )
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        shards = [Shard.open(path / name) for name in names]
        result = cls(path, shards, index, config.get("model_type"))
        result.tied = bool(config.get("tie_word_embeddings"))
        return result

    def entry(self, key: str) -> Entry:
        return self.where[key].entries[key]

    def names(self) -> list[str]:
        """The modules that own a weight."""
        return [key.rpartition(".")[0] for key in self.where if key.split(".")[-1] == "weight"]

    def transposed(self, name: str, shape: tuple[int, int], known: bool | None) -> bool:
        """Whether the weight of `name`, a map of `shape` (out, in), is stored as (in, out). A
        square one can't tell itself.
        """
        stored = self.entry(join(name, "weight")).shape
        if stored not in (shape, shape[::-1]):
            raise ValueError(
                f"{name!r} is of shape {stored} in {self.path}; the adapter is for (out, in) ="
                f" {shape}."
            )
        if shape[0] != shape[1]:
            return stored != shape
        if known is None and self.model_type is None:
            raise ValueError(
                f"{name!r} is square, and neither the adapter nor a config.json says whether it is"
                " stored as (out, in) or, as in GPT-2, as (in, out). Load the adapter into the"
                " model and save it again: the new file says so."
            )
        return self.model_type in CONV1D_MODELS if known is None else known


def _width(code: str) -> int:
    return DTYPES[code].itemsize if code in DTYPES else 1


def _tensor_in(buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not buffer:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


def _bytes_of(tensor: Tensor) -> bytearray:
    buffer = bytearray(tensor.numel() * tensor.element_size())
    if buffer:
        _tensor_in(buffer, tensor.dtype, tuple(tensor.shape)).copy_(tensor)
    return buffer


def _copy(source: BinaryIO, target: BinaryIO, entry: Entry) -> None:
    source.seek(entry.begin)
    left = entry.size
    while left:
        piece = source.read(min(CHUNK, left))
        if not piece:
            raise OSError(f"{source.name} ends too early.")
        target.write(piece)
        left -= len(piece)
