"""Adapters in files: adapter-only state dicts, and the library's own self-describing safetensors file.

A file is untrusted input. Names, shapes and configs are checked against the file's own header and the model before
anything is allocated or changed, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gralora.config import GraloraConfig
from gralora.inject import Plan, install
from gralora.layers import check_adapter_name, gralora_layers, kind_of
from gralora.saved import bias_swaps, saved_modules, units
from gralora.state import (
    adapter_keys,
    all_or_nothing,
    check_known,
    check_unmerged,
    join,
    known_adapters,
    named_adapter_parameters,
)
from gralora.targets import Names, Target, nearest, unfit
from gralora.version import __version__

FORMAT_VERSION = 1
LAYER_FIELDS = ("r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout")


class AdapterFileError(ValueError):
    """A file is no adapter, is damaged, or does not fit the model."""


class LoadResult(NamedTuple):
    """Keys that the adapter has and the state dict lacks, and the reverse. Both empty if strict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class AdapterFile:
    """One adapter, read from any format: the config of every layer, and what is trained with them."""

    configs: dict[str, GraloraConfig]
    tensors: dict[str, Tensor]
    modules_to_save: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """One row of the table of file formats."""

    matches: Callable[[Path], bool]
    read: Callable[[Path], AdapterFile]
    write: Callable[[nn.Module, Path, str], None]


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The values of one adapter, and nothing of the base: `<module>.gralora_A` and so on.

    Saved modules and trained biases are included under their own names. The tensors share memory with the model.

    Raises:
        KeyError: no such adapter.
    """
    check_known(model, adapter_name)
    return {key: tensor.detach() for key, tensor in _live_tensors(model, adapter_name).items()}


def load_adapter_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str = "default", *, strict: bool = True
) -> LoadResult:
    """Copy values into an adapter that the model has. Nothing is allocated; the dtype of the adapter stays.

    Raises:
        KeyError: no such adapter; or, if `strict`, keys are missing or unexpected. ValueError: a shape differs, or the
            adapter is merged. Nothing has then been copied.
    """
    check_known(model, adapter_name)
    check_unmerged(model, adapter_name)
    own = _live_tensors(model, adapter_name)
    result = LoadResult([k for k in own if k not in state_dict], [k for k in state_dict if k not in own])
    if strict and any(result):
        parts = [
            f"{what}: {_shorten(keys)}" for what, keys in zip(("missing", "unexpected"), result, strict=True) if keys
        ]
        raise KeyError(
            f"the state dict does not fit adapter {adapter_name!r}; {'; '.join(parts)}. strict=False passes them."
        )
    shared = [key for key in own if key in state_dict]
    wrong = [
        f"{key} is {tuple(state_dict[key].shape)} there and {tuple(own[key].shape)} here"
        for key in shared
        if state_dict[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"shapes differ, nothing was loaded: {_shorten(wrong)}")
    with torch.no_grad():
        for key in shared:
            own[key].copy_(state_dict[key])
    return result


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", *, format: str = "gralora"
) -> None:
    """Write one adapter to `path`: one safetensors file that describes itself, written atomically.

    Raises:
        KeyError: no such adapter. ValueError: no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; there are: {', '.join(map(repr, FORMATS))}.")
    check_known(model, adapter_name)
    FORMATS[format].write(model, Path(path), adapter_name)


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", *, trainable: bool = False
) -> nn.Module:
    """Read an adapter from `path`, inject it and load its values; returns `model`.

    The first adapter of a model becomes active, a further one is added inactive. It is frozen unless `trainable`, and in
    the dtype of the file. Where the model has an adapter of this name already, on the same layers and of the same
    shapes, its values are replaced in place.

    Raises:
        ValueError (AdapterFileError): the file is damaged or does not fit the model, which is then unchanged.
    """
    check_adapter_name(adapter_name)
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"no adapter at {source}")
    found = next((f for f in FORMATS.values() if f.matches(source)), None)
    if found is None:
        raise AdapterFileError(f"{source} is no adapter of a known format ({', '.join(FORMATS)}).")
    file = found.read(source)
    plan = _plan(model, file)
    with all_or_nothing(model):
        if adapter_name in known_adapters(model):
            _check_same_layers(model, file, adapter_name)
            for name, layer in gralora_layers(model):
                if name in file.configs:
                    layer.gralora_adapters[adapter_name].config = file.configs[name]
            for parameter in named_adapter_parameters(model, adapter_name).values():
                parameter.requires_grad_(trainable)
        else:
            install(model, plan, adapter_name, trainable=trainable)
        try:
            load_adapter_state_dict(model, file.tensors, adapter_name)
        except (KeyError, ValueError) as error:
            raise AdapterFileError(f"{source} does not fit this model: {error.args[0]}") from error
    return model


def read_gralora(path: Path) -> AdapterFile:
    """Read the library's own file. Only the header is believed, and only after it has been checked."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "gralora":
                raise AdapterFileError(f"{path} is a safetensors file, but no gralora adapter.")
            if metadata.get("format_version") != str(FORMAT_VERSION):
                given = metadata.get("format_version")
                raise AdapterFileError(f"{path} is of format version {given!r}; this library reads {FORMAT_VERSION}.")
            configs = _read_configs(path, metadata.get("modules", ""))
            saved, biases = (_read_names(path, metadata, key) for key in ("modules_to_save", "biases"))
            keys = list(file.keys())
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
            _check_header(path, configs, shapes)
            tensors = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read as a safetensors file: {error}") from error
    return AdapterFile(configs, tensors, saved, biases)


def write_gralora(model: nn.Module, path: Path, adapter_name: str) -> None:
    modules = {
        name: {f: getattr(layer.gralora_adapters[adapter_name].config, f) for f in LAYER_FIELDS}
        for name, layer in gralora_layers(model)
        if adapter_name in layer.gralora_adapters
    }
    metadata = {
        "format": "gralora",
        "format_version": str(FORMAT_VERSION),
        "gralora_version": __version__,
        "modules": json.dumps(modules),
        "modules_to_save": json.dumps([n for n, saved in saved_modules(model) if adapter_name in saved.gralora_saved]),
        "biases": json.dumps([key for key, _, swap in bias_swaps(model) if adapter_name in swap.names]),
    }
    tensors = unshared(adapter_state_dict(model, adapter_name))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


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


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_gralora(path: Path) -> bool:
    return path.is_file()


FORMATS: dict[str, Format] = {"gralora": Format(_is_gralora, read_gralora, write_gralora)}
"""The table of file formats, by the name that `save_adapter` takes; the first that matches reads."""


def _live_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(named_adapter_parameters(model, adapter_name))
    for path, saved in saved_modules(model):
        if adapter_name in saved.gralora_saved:
            own = saved.gralora_saved[adapter_name].state_dict()
            tensors.update({join(path, key): tensor for key, tensor in own.items() if join(path, key) not in tensors})
    return tensors


def _plan(model: nn.Module, file: AdapterFile) -> Plan:
    """Find every module that the file names, and check that the file's tensors fit there."""
    names = Names(model)
    by_name: dict[str, nn.Module] = {name: module for _, its, module in names for name in its}

    def module_at(name: str) -> nn.Module:
        if name not in by_name:
            raise AdapterFileError(
                f"the file adapts {name!r}, which this model lacks. Nearest: {nearest(name, by_name)}."
            )
        return by_name[name]

    targets, dtypes = [], {}
    for name, config in file.configs.items():
        module = module_at(name)
        kind = kind_of(type(module))
        reason = unfit(module, names)
        if kind is None or reason is not None:
            raise AdapterFileError(f"the file adapts {name!r}, which in this model {reason}.")
        for key, shape in layer_shapes(name, *kind.features(module), config).items():
            tensor = file.tensors.get(key)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise AdapterFileError(
                    f"{key} must have shape {shape} to fit this model's {name!r}; the file has {found}."
                )
            dtypes[name] = tensor.dtype
        targets.append(Target(name, module, config))
    saved = {name: module_at(name) for name in file.modules_to_save}
    for name, module in saved.items():
        if dict(units(module, name)) != {name: module}:
            raise AdapterFileError(f"the file holds a copy of {name!r}, which in this model owns no parameters.")
    biases = {}
    for key in file.biases:
        owner = module_at(key.rpartition(".")[0])
        if key.rpartition(".")[2] != "bias" or owner._parameters.get("bias") is None:
            raise AdapterFileError(f"the file holds {key!r}, which is no bias of this model.")
        biases[key] = owner
    return Plan(targets, saved, biases, dtypes, reset=False)


def layer_shapes(name: str, in_features: int, out_features: int, config: GraloraConfig) -> dict[str, tuple[int, ...]]:
    """The keys of one layer's adapter in a file, and their shapes."""
    k, r, h = config.gralora_k, config.r, config.hybrid_r
    if in_features % k or out_features % k:
        raise AdapterFileError(f"gralora_k={k} divides not both sizes of {name!r}, {in_features} and {out_features}.")
    shapes: dict[str, Any] = {"A": (k, in_features // k, r), "B": (k, r, out_features // k)}
    if h:
        shapes |= {"A_general": (h, in_features), "B_general": (out_features, h)}
    return cast(dict[str, tuple[int, ...]], adapter_keys(name, shapes))


def _check_same_layers(model: nn.Module, file: AdapterFile, adapter_name: str) -> None:
    here = {n for n, layer in gralora_layers(model) if adapter_name in layer.gralora_adapters}
    if here != set(file.configs):
        differing = _shorten(sorted(here ^ set(file.configs)))
        raise AdapterFileError(
            f"adapter {adapter_name!r} is in this model already, on other layers than the file's: {differing}. "
            "Delete it first, or load under another name."
        )


def _check_header(path: Path, configs: Mapping[str, GraloraConfig], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sizes follow from A and B; every other shape must agree with them."""
    for name, config in configs.items():
        A, B = (shapes.get(join(name, f"gralora_{letter}"), ()) for letter in "AB")
        if len(A) != 3 or len(B) != 3:
            raise AdapterFileError(f"{path}: {name!r} stands in the metadata without a 3-D gralora_A and gralora_B.")
        for key, shape in layer_shapes(name, A[0] * A[1], B[0] * B[2], config).items():
            if shapes.get(key) != shape:
                raise AdapterFileError(f"{path}: {key} has shape {shapes.get(key)}, but the metadata means {shape}.")


def _read_configs(path: Path, text: str) -> dict[str, GraloraConfig]:
    modules = _json(path, "modules", text)
    if not isinstance(modules, dict):
        raise AdapterFileError(f"{path}: the metadata 'modules' is no JSON object.")
    configs = {}
    for name, values in modules.items():
        if not isinstance(values, dict) or set(values) != set(LAYER_FIELDS):
            raise AdapterFileError(f"{path}: the metadata of {name!r} must hold exactly {', '.join(LAYER_FIELDS)}.")
        try:
            configs[name] = GraloraConfig(**values)
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{path}: the metadata of {name!r} is not legal: {error}") from error
    return configs


def _read_names(path: Path, metadata: Mapping[str, str], key: str) -> list[str]:
    names = _json(path, key, metadata.get(key, "[]"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterFileError(f"{path}: the metadata {key!r} is no JSON list of names.")
    return names


def _json(path: Path, what: str, text: str) -> Any:
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
        raise AdapterFileError(f"{path}: the metadata {what!r} is no valid JSON: {error}") from error


def _shorten(items: Iterable[str], count: int = 5) -> str:
    items = list(items)
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")
