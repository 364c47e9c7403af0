"""Adapters in files, without a model: what a file holds, and the library's own self-describing
safetensors file.

A file is untrusted input. Names, shapes and configs are checked against the file's own header
before anything is allocated, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gralora.config import GraloraConfig
from gralora.files.atomic import write_atomically
from gralora.layers.class_change import join
from gralora.layers.loading import FACTORS
from gralora.maths.functional import Tensors
from gralora.model.state import adapter_keys
from gralora.version import __version__

FORMAT_VERSION = 1
LAYER_FIELDS = ("r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout")
OPTIONAL_FIELDS = ("use_rslora",)
"""Written only where they are set."""
MODEL_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "vocab_size",
    "tie_word_embeddings",
    "architectures",
)
"""What a file remembers of the config of a transformers model: enough to name and order its layers
for other readers.
"""

KINDS = (
    "linear",
    "embedding",
    "attention",
    "convolution",
    "transposed convolution",
    "experts",
)
"""The kinds of layers; of an embedding tokens are the outputs, "attention" is a projection within
one.
"""

SAMPLES = 256
LARGEST_HEADER = 2**25  # bytes: room for a hundred thousand layers
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Shapes = dict[str, tuple[int, ...]]


class AdapterFileError(ValueError):
    """A file is no adapter, is damaged, or does not fit the model."""


@dataclass(frozen=True)
class BaseWeight:
    """What a file remembers of the weight that an adapter was trained on.

    Attributes:
        shape: (out, in), however the layer stores it; (out, in, *kernel) of a convolution,
            (experts, out, in) of experts.
        fan_in_fan_out: the layer stores it as (in, out), as GPT-2's Conv1D does.
        values: a hash of values spread over the weight, each rounded to bfloat16 so that a cast of
            the same weight agrees; None where they can't be read (quantised, offloaded, sharded).
        kind: one of `KINDS`.
    """

    shape: tuple[int, ...]
    dtype: str
    fan_in_fan_out: bool
    values: str | None
    kind: str = "linear"

    def differs(self, other: BaseWeight) -> bool:
        """Whether the two are known to be of different values."""
        return None not in (self.values, other.values) and self.values != other.values

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        fan_in_fan_out: bool,
        matrix: Tensor | None,
        kind: str = "linear",
    ) -> BaseWeight:
        """Of a weight with these values, as a matrix (..., out, in); None where they can't be
        read.
        """
        values = None if matrix is None else _hash(matrix.detach())
        return cls(shape, str(dtype).removeprefix("torch."), fan_in_fan_out, values, kind)


@dataclass
class AdapterFile:
    """One adapter, read from any format or about to be written: the config of every layer, and what
    is trained with them.

    `format` names the row of the table of formats that it was read by; `base` holds what is known
    of the weights beneath it. `module_names`, `base_name` and `model` (some fields of its config,
    `MODEL_FIELDS`) describe the model that it comes from, where that is known.
    """

    configs: dict[str, GraloraConfig]
    tensors: dict[str, Tensor]
    modules_to_save: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    base: dict[str, BaseWeight] = field(default_factory=dict)
    module_names: list[str] = field(default_factory=list)
    base_name: str | None = None
    format: str | None = None
    model: dict[str, Any] | None = None


class Format(NamedTuple):
    """One row of the table of file formats.

    Attributes:
        kinds: the kinds of layers whose adapters it can hold.
        beside: whether it can hold biases, modules_to_save and tokens.
        reason: why it can hold no more, for an error.
    """

    matches: Callable[[Path], bool]
    read: Callable[[Path], AdapterFile]
    write: Callable[[AdapterFile, Path], None]
    kinds: Collection[str] = KINDS
    beside: bool = True
    reason: str = ""


class Header(NamedTuple):
    """What a safetensors file says of itself, and the way to its tensors."""

    metadata: dict[str, str]
    shapes: Shapes
    dtypes: dict[str, str]
    get: Callable[[str], Tensor]


@contextmanager
def opened(path: Path) -> Iterator[Header]:
    """A safetensors file, its header checked; anything wrong with it is an AdapterFileError."""
    try:
        with path.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > LARGEST_HEADER:
            claim = f"it claims a header of {length} bytes; up to {LARGEST_HEADER} are read"
            raise AdapterFileError(f"{path} cannot be read as a safetensors file: {claim}.")
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(each.get_shape()) for key, each in slices.items()}
            dtypes = {key: each.get_dtype() for key, each in slices.items()}
            yield Header(file.metadata() or {}, shapes, dtypes, file.get_tensor)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read as a safetensors file: {error}") from error


def read_gralora(path: Path) -> AdapterFile:
    """Read the library's own file. Only the header is believed, and only after it has been
    checked.
    """
    with opened(path) as (metadata, shapes, dtypes, get):
        if metadata.get("format") != "gralora":
            beside = path.with_name("adapter_config.json").exists()
            hint = " Its folder is one of PEFT's: give the folder." if beside else ""
            raise AdapterFileError(f"{path} is a safetensors file, but no gralora adapter.{hint}")
        if metadata.get("format_version") != str(FORMAT_VERSION):
            given = metadata.get("format_version")
            raise AdapterFileError(
                f"{path} is of format version {given!r}; this library reads {FORMAT_VERSION}."
            )
        configs = _read_configs(path, metadata.get("modules", ""))
        saved, biases = (_read_names(path, metadata, key) for key in ("modules_to_save", "biases"))
        base = _read_base(path, metadata.get("base", "{}"))
        model = parse_json(path, "the metadata 'model'", metadata.get("model", "null"))
        if not isinstance(model, (dict, type(None))):
            raise AdapterFileError(f"{path}: the metadata 'model' is no JSON object.")
        check_shapes(path, configs, shapes)
        check_dtypes(path, configs, dtypes)
        tensors = {key: get(key) for key in shapes}
    return AdapterFile(configs, tensors, saved, biases, base, format="gralora", model=model)


def write_gralora(file: AdapterFile, path: Path) -> None:
    metadata = {
        "format": "gralora",
        "format_version": str(FORMAT_VERSION),
        "gralora_version": __version__,
        "modules": json.dumps(
            {name: _layer_fields(config) for name, config in file.configs.items()}
        ),
        "modules_to_save": json.dumps(file.modules_to_save),
        "biases": json.dumps(file.biases),
        "base": json.dumps({name: asdict(weight) for name, weight in file.base.items()}),
        **({"model": json.dumps(file.model)} if file.model else {}),
    }
    tensors = unshared(file.tensors)
    write_atomically(path, lambda temporary: write_tensors(tensors, temporary, metadata))


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file; what the disk refuses is an OSError, and its mode is the umask's, as with
    any other file.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, dict(metadata))
        path.chmod(mode)  # safetensors gives its files to the user alone
    except SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from error


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def layer_shapes(
    name: str, in_features: int, out_features: int, config: GraloraConfig, copies: int | None = None
) -> Shapes:
    """The keys of one layer's adapter in a file, and their shapes."""
    k, r, h = config.gralora_k, config.r, config.hybrid_r
    if in_features % k or out_features % k:
        raise AdapterFileError(
            f"gralora_k={k} divides not both sizes of {name!r}, {in_features} and {out_features}."
        )
    shapes: Shapes = {"A": (k, in_features // k, r), "B": (k, r, out_features // k)}
    if h:
        shapes |= {"A_general": (h, in_features), "B_general": (out_features, h)}
    if copies is not None:
        shapes = {key: (copies, *shape) for key, shape in shapes.items()}
    return adapter_keys(name, shapes)


def check_shapes(path: Path, configs: Mapping[str, GraloraConfig], shapes: Shapes) -> None:
    """Sizes follow from A and B; every other shape must agree with them."""
    for name, config in configs.items():
        A, B = (shapes.get(join(name, f"gralora_{letter}"), ()) for letter in "AB")
        if len(A) not in (3, 4) or len(B) != len(A) or 0 in A + B:
            raise AdapterFileError(
                f"{path}: {name!r} stands in the metadata without a 3-D gralora_A and gralora_B."
            )
        copies = A[0] if len(A) == 4 else None
        for key, shape in layer_shapes(name, A[-3] * A[-2], B[-3] * B[-1], config, copies).items():
            if shapes.get(key) != shape:
                raise AdapterFileError(
                    f"{path}: {key} has shape {shapes.get(key)}, but the metadata means {shape}."
                )


def check_dtypes(
    path: Path, configs: Mapping[str, GraloraConfig], dtypes: Mapping[str, str]
) -> None:
    """Adapters are of floating numbers."""
    for name, config in configs.items():
        for key in layer_keys(name, config):
            check_dtype(path, key, dtypes[key])


def check_dtype(path: Path, key: str, code: str) -> None:
    if code not in FLOATS:
        raise AdapterFileError(f"{path}: {key} is of type {code}; legal are {', '.join(FLOATS)}.")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError if a tensor holds NaN or an infinite value."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterFileError(
                f"{path}: {key} holds values that are not finite: the training that made it"
                " diverged, or the file is damaged. allow_nonfinite=True loads it all the same."
            )


def parse_json(path: Path, what: str, text: str) -> Any:
    """Strict JSON: no key twice, no NaN, no nesting that would break the parser."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path}: {what} is no valid JSON: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{path} is no text: {error}") from error
    content = parse_json(path, "the file", text)
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} is no JSON object.")
    return content


def _layer_fields(config: GraloraConfig) -> dict[str, Any]:
    optional = [field for field in OPTIONAL_FIELDS if getattr(config, field)]
    return {field: getattr(config, field) for field in (*LAYER_FIELDS, *optional)}


def layer_config(path: Path, name: str, values: Mapping[str, Any]) -> GraloraConfig:
    try:
        return GraloraConfig(**values)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: the metadata of {name!r} is not legal: {error}") from error


def layer_tensors(file: AdapterFile, name: str) -> Tensors:
    keys = adapter_keys(name, dict.fromkeys(FACTORS))
    A, B, A_general, B_general = (file.tensors.get(key) for key in keys)
    assert A is not None and B is not None  # every reader has checked
    return A, B, A_general, B_general


def kind_of(file: AdapterFile, name: str) -> str:
    """The kind of a layer; where the file does not say it, as far as the tensors tell."""
    kind = file.base[name].kind if name in file.base else "linear"
    has_copies = layer_tensors(file, name)[0].dim() > 3
    # the groups of a convolution are on the leading axis, too
    return "experts" if has_copies and kind != "convolution" else kind


def out_in(file: AdapterFile, name: str) -> tuple[int, int]:
    """The sizes of a layer, as its adapter's tensors have them."""
    A, B, _, _ = layer_tensors(file, name)
    return B.shape[-3] * B.shape[-1], A.shape[-3] * A.shape[-2]


def layer_keys(name: str, config: GraloraConfig) -> list[str]:
    return list(adapter_keys(name, dict.fromkeys(FACTORS if config.hybrid_r else FACTORS[:2])))


def tensors_beside(file: AdapterFile) -> dict[str, Tensor]:
    """The tensors that are not an adapter's: biases, saved modules and tokens."""
    owned = {key for name, config in file.configs.items() for key in layer_keys(name, config)}
    return {key: tensor for key, tensor in file.tensors.items() if key not in owned}


def pop_layer(file: AdapterFile, name: str) -> GraloraConfig:
    """Remove the adapter of one layer; returns its config."""
    config = file.configs.pop(name)
    for key in layer_keys(name, config):
        del file.tensors[key]
    return config


def with_names(file: AdapterFile, names: Mapping[str, str]) -> AdapterFile:
    """The layers in `names`, a mapping from old to new names, and nothing beside them."""
    tensors = {}
    for old, new in names.items():
        config = file.configs[old]
        for old_key, new_key in zip(layer_keys(old, config), layer_keys(new, config), strict=True):
            tensors[new_key] = file.tensors[old_key]
    return replace(
        file,
        configs={new: file.configs[old] for old, new in names.items()},
        tensors=tensors,
        base={new: file.base[old] for old, new in names.items() if old in file.base},
        biases=[],
        modules_to_save=[],
    )


def _hash(weight: Tensor) -> str:
    count = min(SAMPLES, weight.numel())
    positions = (
        torch.arange(count, device=weight.device) * (weight.numel() - 1) // max(count - 1, 1)
    )
    weight = weight.reshape(-1, weight.shape[-1])
    values = weight[positions // weight.shape[1], positions % weight.shape[1]].to(torch.bfloat16)
    bits = values.view(torch.int16).tolist()  # numbers: the same in either byte order
    return hashlib.sha256(repr(bits).encode()).hexdigest()[:16]


def _read_configs(path: Path, text: str) -> dict[str, GraloraConfig]:
    modules = parse_json(path, "the metadata 'modules'", text)
    if not isinstance(modules, dict):
        raise AdapterFileError(f"{path}: the metadata 'modules' is no JSON object.")
    for name, values in modules.items():
        if not isinstance(values, dict) or set(values) - set(OPTIONAL_FIELDS) != set(LAYER_FIELDS):
            legal = f"exactly {', '.join(LAYER_FIELDS)}, and may hold {', '.join(OPTIONAL_FIELDS)}"
            raise AdapterFileError(f"{path}: the metadata of {name!r} must hold {legal}.")
    return {name: layer_config(path, name, values) for name, values in modules.items()}


def _read_names(path: Path, metadata: Mapping[str, str], key: str) -> list[str]:
    names = parse_json(path, f"the metadata {key!r}", metadata.get(key, "[]"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterFileError(f"{path}: the metadata {key!r} is no JSON list of names.")
    return names


def _read_base(path: Path, text: str) -> dict[str, BaseWeight]:
    base = parse_json(path, "the metadata 'base'", text)
    if not isinstance(base, dict):
        raise AdapterFileError(f"{path}: the metadata 'base' is no JSON object.")
    return {name: _base_weight(path, name, fields) for name, fields in base.items()}


def _base_weight(path: Path, name: str, fields: Any) -> BaseWeight:
    match fields:
        case {
            "shape": [int(), int(), *_] as shape,
            "dtype": str(dtype),
            "fan_in_fan_out": bool(layout),
            "values": str() | None,
        } if all(isinstance(size, int) for size in shape):
            return BaseWeight(
                tuple(shape), dtype, layout, fields["values"], str(fields.get("kind", "linear"))
            )
    raise AdapterFileError(
        f"{path}: the metadata 'base' of {name!r} must hold shape, dtype, fan_in_fan_out and"
        " values."
    )


GRALORA = Format(Path.is_file, read_gralora, write_gralora)
