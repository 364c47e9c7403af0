"""Adapters from models into files, and back: saving and loading in every format of the table."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gralora.config import GraloraConfig
from gralora.engines.distributed import check_whole, is_spread, write_once
from gralora.engines.walk import named_modules
from gralora.files.experts import apart, together
from gralora.files.gguf import GGUF, renamed
from gralora.files.lora import as_lora, lora_pairs
from gralora.files.mlx import MLX
from gralora.files.own import (
    FLOATS,
    GRALORA,
    LAYER_FIELDS,
    MODEL_FIELDS,
    AdapterFile,
    AdapterFileError,
    BaseWeight,
    Format,
    check_finite,
    layer_keys,
    layer_shapes,
)
from gralora.files.peft import LORA, PEFT
from gralora.files.tokens import token_modules
from gralora.layers.adapter import GraloraAdapter, check_adapter_name
from gralora.layers.base import GraloraLayer, Spot, gralora_layers
from gralora.layers.class_change import join
from gralora.layers.pending import set_trained
from gralora.model.inject import Plan, install
from gralora.model.record import vanished
from gralora.model.saved import SavedModule, bias_swaps, is_bias, saved_modules, units
from gralora.model.state import all_or_nothing, check_known, known_adapters, named_adapter_parameters
from gralora.model.state_dict import adapter_state_dict, live_tensors, load_adapter_state_dict, torn
from gralora.model.statistics import moved_buffers
from gralora.model.targets import Names, Target, nearest, shorten, unfit
from gralora.model.tokens import check_tokens

FORMATS: dict[str, Format] = {"gralora": GRALORA, "peft": PEFT, "lora": LORA, "gguf": GGUF, "mlx": MLX}
"""The table of file formats, by the name that `save_adapter` takes; the last that matches reads."""


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    format: str = "gralora",
    rank: int | None = None,
    errors: dict[str, float] | None = None,
    experts: str = "fused",
    dtype: torch.dtype | None = None,
    allow_missing: bool = False,
) -> None:
    """Write one adapter to `path`, atomically. In a process group every process calls, and rank 0 writes.

    Args:
        format: "gralora": one safetensors file that describes itself. "peft": a folder that PEFT reads as GraLoRA.
            "lora": a folder that PEFT and every server of LoRA reads as plain LoRA of rank k * r + hybrid_r; exact.
            "gguf": llama.cpp's file, of the same pairs; needs the package gguf.
        rank: for plain LoRA: the rank of every layer. A higher one is cut by SVD, a lower one padded with zeros.
        experts: for "lora": "fused", as PEFT has fused experts, and vLLM where its own code fuses them; "each", a pair for every
            expert under the names of a checkpoint, as vLLM and SGLang read all others.
        dtype: of the adapter's tensors in the file; None for their own.
        errors: a dict to be filled with ‖what is written - ΔW‖ / ‖ΔW‖ of each layer.
        allow_missing: write what is there, where layers that were adapted have been replaced since by others without an
            adapter.

    Raises:
        KeyError: no such adapter. ValueError: no such format, or it can't express this adapter; or something that was adapted
            is there no more; or a tensor is not of its shape, as under an engine that has emptied or flattened it.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known; there are: {', '.join(map(repr, FORMATS))}.")
    gone = vanished(model, adapter_name)
    if gone and not allow_missing:
        raise ValueError(
            f"{len(gone)} of what adapter {adapter_name!r} was injected into are there no more: {shorten(gone)}. Something has "
            "rebuilt these modules since; do that first, then inject. allow_missing=True writes what is left."
        )
    check_known(model, adapter_name)
    moved = moved_buffers(model)
    if moved:
        warnings.warn(
            f"training has moved buffers that belong to no adapter, and are not in the file: {shorten(moved)}. Modules that "
            "are to learn whole belong in modules_to_save.",
            UserWarning,
            stacklevel=2,
        )
    file = convertible(adapter_file(model, adapter_name), format, rank, errors, experts, dtype)
    sharded = any(is_spread(tensor) for tensor in live_tensors(model, adapter_name).values())
    write_once(lambda: FORMATS[format].write(file, Path(path)), together=sharded)


LORA_FORMATS = {"lora", "gguf", "mlx"}
"""Formats that hold plain LoRA."""


def convertible(
    file: AdapterFile,
    format: str,
    rank: int | None = None,
    errors: dict[str, float] | None = None,
    experts: str = "fused",
    dtype: torch.dtype | None = None,
) -> AdapterFile:
    """`file` as `format` can express it: for plain LoRA as pairs of rank `rank`, or of their own, exactly."""
    if experts not in ("fused", "each"):
        raise ValueError(f'experts={experts!r} is not legal: it must be "fused" or "each".')
    if experts != "fused" and format != "lora":
        raise ValueError(f'experts={experts!r} is for format="lora".')
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype={dtype} is not legal: it must be one of {', '.join(map(str, FLOATS.values()))}.")
    if format in LORA_FORMATS:
        file = as_lora(file, rank, errors)
        file = apart(file) if experts == "each" else file
    elif rank is not None:
        raise ValueError(f'rank={rank} is for plain LoRA, such as format="lora"; the rank of GraLoRA is its r.')
    elif errors is not None:
        errors.update(dict.fromkeys(file.configs, 0.0))
    if dtype is not None:
        own = {key for name, config in file.configs.items() for key in layer_keys(name, config)}
        cast = {key: tensor.to(dtype) if key in own else tensor for key, tensor in file.tensors.items()}
        file = dataclasses.replace(file, tensors=cast)
    return file


def to_lora(
    model: nn.Module, adapter_name: str = "default", rank: int | None = None, *, errors: dict[str, float] | None = None
) -> dict[str, Tensor]:
    """The adapter as plain LoRA pairs: `<module>.lora_A.weight` (R, in) and `<module>.lora_B.weight` (out, R).

    Their product lora_B @ lora_A is ΔW, the scaling included: exactly with R = k * r + hybrid_r, or the best of `rank`.

    Args:
        rank: of every layer. A higher one is cut by SVD, computed from the factors; a lower one is padded with zeros.
        errors: a dict to be filled with ‖lora_B @ lora_A - ΔW‖ / ‖ΔW‖ of each layer.

    Raises:
        KeyError: no such adapter. ValueError: `rank` is no positive integer.
    """
    return lora_pairs(as_lora(adapter_file(model, adapter_name), rank, errors), scaled=True)


def adapter_file(model: nn.Module, adapter_name: str) -> AdapterFile:
    """All that a file of one adapter holds, in whatever format; the tensors share memory with the model."""
    layers = [(name, layer) for name, layer in gralora_layers(model) if adapter_name in layer.gralora_adapters]
    check_whole(model)
    tensors = adapter_state_dict(model, adapter_name)
    _check_shapes(layers, adapter_name, tensors)
    config = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", None)
    return AdapterFile(
        tensors=tensors,
        configs={name: layer.gralora_adapters[adapter_name].config for name, layer in layers},
        modules_to_save=[name for name, saved in saved_modules(model) if _has_own(saved, adapter_name)],
        biases=[key for key, _, swap in bias_swaps(model) if adapter_name in swap.names],
        base={name: _base_of(layer.spot) for name, layer in layers},
        module_names=[name for name, _ in named_modules(model) if "gralora_" not in name],
        base_name=origin if isinstance(origin, str) and origin else None,
        model=model_fields(config),
    )


def model_fields(config: object) -> dict[str, Any] | None:
    """What a file remembers of a model's config, an object or a dict as config.json holds it; None if it is none."""
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


def _has_own(saved: SavedModule, adapter_name: str) -> bool:
    return adapter_name in saved.gralora_saved and bool(saved.gralora_saved[adapter_name].state_dict())


def _check_shapes(layers: list[tuple[str, GraloraLayer]], adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor is not what it should be: an engine may have emptied or flattened it."""
    wrong = [f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items() if tensor.numel() == 0]
    for name, layer in layers:
        config, spot = layer.gralora_adapters[adapter_name].config, layer.spot
        n_in, n_out = spot.sizes
        for key, shape in layer_shapes(name, n_in, n_out, config, spot.copies).items():
            if key not in tensors or tuple(tensors[key].shape) != shape:
                found = "missing" if key not in tensors else tuple(tensors[key].shape)
                wrong.append(f"{key} {found}, not {shape}")
    if wrong:
        raise ValueError(f"adapter {adapter_name!r} is not whole, nothing is written: {shorten(wrong)}.")


def read_adapter(path: Path, *, allow_nonfinite: bool = False) -> AdapterFile:
    """Read an adapter in whatever format it is; NaN and infinite values are refused unless allowed."""
    if not path.exists():
        raise FileNotFoundError(f"no adapter at {path}")
    format = next((f for f in reversed(FORMATS.values()) if f.matches(path)), None)
    if format is None:
        raise AdapterFileError(f"{path} is no adapter of a known format ({', '.join(FORMATS)}).")
    file = format.read(path)
    if not allow_nonfinite:
        check_finite(path, file.tensors)
    return file


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    allow_nonfinite: bool = False,
) -> nn.Module:
    """Read an adapter from `path`, inject it and load its values; returns `model`.

    `path` is a file of ours, or a folder of PEFT's: GraLoRA, or plain LoRA, which is GraLoRA with k = 1. A warning names
    the layers whose weights are not those that the adapter was trained on, where the file knows them.

    The first adapter of a model becomes active, a further one is added inactive. It is frozen unless `trainable`, and in
    the dtype of the file. Where the model has an adapter of this name already, on the same layers and of the same
    shapes, its values are replaced in place.

    Args:
        allow_nonfinite: load NaN and infinite values, which are refused otherwise.

    Raises:
        ValueError (AdapterFileError): the file is damaged or does not fit the model, which is then unchanged.
    """
    check_adapter_name(adapter_name)
    source = Path(path)
    file = read_adapter(source, allow_nonfinite=allow_nonfinite)
    file = _in_names_of(model, file)
    plan = _plan(model, file)
    _warn_of_another_base(source, plan, file)
    try:
        with all_or_nothing(model):
            if adapter_name in known_adapters(model):
                _prepare_swap(model, file, adapter_name, trainable)
            else:
                install(model, plan, adapter_name, trainable=trainable)
            load_adapter_state_dict(model, file.tensors, adapter_name)
    except (KeyError, ValueError) as error:
        raise AdapterFileError(f"{source} does not fit this model: {error.args[0]}") from error
    return model


def _in_names_of(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """The file under the names that this model has for its layers."""
    names = Names(model)
    layers = [name for its, _ in names.spots for name in its]
    if file.format == "gguf":
        return renamed(file, layers, model_fields(getattr(model, "config", None)))
    together(file, {*layers, *(name for _, its, _ in names for name in its)})
    return file


def _plan(model: nn.Module, file: AdapterFile) -> Plan:
    """Find every module that the file names, and check that the file's tensors fit there."""
    names = Names(model)
    modules: dict[str, nn.Module] = {name: module for _, its, module in names for name in its}
    spots: dict[str, Spot] = {name: spot for its, spot in names.spots for name in its}
    known = [*modules, *(name for name in spots if name not in modules)]

    def lacking(name: str) -> AdapterFileError:
        return AdapterFileError(f"the file adapts {name!r}, which this model lacks. Nearest: {nearest(name, known)}.")

    def module_at(name: str) -> nn.Module:
        if name not in modules:
            raise lacking(name)
        return modules[name]

    targets, dtypes = [], {}
    for name, config in file.configs.items():
        if name not in spots and name not in modules:
            raise lacking(name)
        spot = spots.get(name)
        reason = f"is a {type(modules[name]).__name__}" if spot is None else unfit(spot, names)
        if spot is None or reason is not None:
            raise AdapterFileError(f"the file adapts {name!r}, which in this model {reason}.")
        if any(size % config.gralora_k for size in spot.cut):
            raise AdapterFileError(f"gralora_k={config.gralora_k} divides not both sizes of {name!r}, {spot.cut}.")
        for key, shape in layer_shapes(name, *spot.sizes, config, spot.copies).items():
            tensor = file.tensors.get(key)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise AdapterFileError(
                    f"{key} must have shape {shape} to fit this model's {name!r}; the file has {found}."
                )
            dtypes[name] = tensor.dtype
        targets.append(Target(name, spot, config))
    rows = token_modules(file)
    whole = [name for name in file.modules_to_save if name not in rows]
    saved = {unit: m for name in whole for unit, m in units(module_at(name), name)}
    tokens = {name: (module_at(name), indices) for name, indices in rows.items()}
    for name, (module, indices) in tokens.items():
        try:
            check_tokens(name, module, indices, "any")
        except ValueError as error:
            raise AdapterFileError(str(error)) from error
    biases = {}
    for key in file.biases:
        owner = module_at(key.rpartition(".")[0])
        parameter = key.rpartition(".")[2]
        if not is_bias(parameter) or owner._parameters.get(parameter) is None:
            raise AdapterFileError(f"the file holds {key!r}, which is no bias of this model.")
        biases[key] = owner, parameter
    parameters = {join(name, key): p for name, unit in saved.items() for key, p in unit.named_parameters()}
    tied = not torn(parameters, file.tensors)
    return Plan(targets, saved, biases, dtypes, reset=False, tied=tied, tokens=tokens)


def _base_of(spot: Spot) -> BaseWeight:
    weight = spot.base_weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    matrix = spot.base_matrix() if plain and weight.numel() > 0 and not weight.is_meta else None
    transposed = spot.kind.transposed(spot.module, spot.part)
    return BaseWeight.of(weight.dtype, spot.shape, transposed, matrix, spot.kind.what)


def _warn_of_another_base(path: Path, plan: Plan, file: AdapterFile) -> None:
    """Compare what the file remembers of the weights beneath it with this model's; shapes have been checked."""
    here = {t.name: _base_of(t.spot) for t in plan.targets if t.name in file.base}
    differing = [
        name if here[name].dtype == there.dtype else f"{name} ({there.dtype} there, {here[name].dtype} here)"
        for name, there in file.base.items()
        if name in here and there.differs(here[name])
    ]
    if differing:
        warnings.warn(
            f"{path} was trained on another base: the weights differ in {shorten(differing)}, "
            f"{len(differing)} of {len(here)} layers. Outputs will not be those it was trained for.",
            UserWarning,
            stacklevel=3,
        )


def _keep_or_replace_config(adapter: GraloraAdapter, config: GraloraConfig) -> None:
    # compiled code stands on the very object, so it is replaced only by one that computes something else
    if any(getattr(adapter.config, field) != getattr(config, field) for field in LAYER_FIELDS):
        adapter.config = config


def _prepare_swap(model: nn.Module, file: AdapterFile, adapter_name: str, trainable: bool) -> None:
    """Make an adapter that the model has ready for the values of a file."""
    here = {name: layer for name, layer in gralora_layers(model) if adapter_name in layer.gralora_adapters}
    if here.keys() != file.configs.keys():
        differing = shorten(sorted(here.keys() ^ file.configs.keys()))
        raise AdapterFileError(
            f"adapter {adapter_name!r} is in this model already, on other layers than the file's: {differing}. "
            "Delete it first, or load under another name."
        )
    for name, layer in here.items():
        _keep_or_replace_config(layer.gralora_adapters[adapter_name], file.configs[name])
    for parameter in named_adapter_parameters(model, adapter_name).values():
        set_trained(parameter, trainable)
