"""Adapters from models into files, and back: saving and loading in every format of the table."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from gralora.config import GraloraConfig
from gralora.engines.distributed import check_whole, is_spread, write_once
from gralora.engines.walk import named_modules
from gralora.files.diffusers import of_part, of_parts, part_of_pipeline, with_part
from gralora.files.experts import together
from gralora.files.formats import FORMATS, convertible, located, model_fields, read_adapter
from gralora.files.gguf import renamed
from gralora.files.lora import as_lora
from gralora.files.own import (
    LAYER_FIELDS,
    OPTIONAL_FIELDS,
    AdapterFile,
    AdapterFileError,
    BaseWeight,
    layer_shapes,
    layer_tensors,
)
from gralora.files.pairs import lora_pairs
from gralora.files.tokens import token_modules
from gralora.layers.adapter import GraloraAdapter, check_adapter_name
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.class_change import join
from gralora.layers.linear_map import LinearMap
from gralora.layers.loading import FACTORS
from gralora.layers.pending import set_trained
from gralora.model.biases import adapted_biases, base_bias
from gralora.model.hotswap import placed
from gralora.model.index import known_adapters, missing
from gralora.model.inject import Plan, install
from gralora.model.saved import SavedModule, is_bias, saved_biases, saved_modules, units
from gralora.model.state import (
    adapter_keys,
    all_or_nothing,
    check_known,
    named_adapter_parameters,
)
from gralora.model.state_dict import (
    Load,
    adapter_state_dict,
    live_tensors,
    prepared_load,
    torn,
    write_values,
)
from gralora.model.targets import Names, Target, nearest, reason_unfit, shorten
from gralora.model.tokens import check_tokens

Models = nn.Module | Mapping[str, nn.Module]
Loaded = TypeVar("Loaded", nn.Module, Mapping[str, nn.Module])


def save_adapter(
    model: Models,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    format: str = "gralora",
    rank: int | float | str | None = None,
    errors: dict[str, float] | None = None,
    experts: str = "fused",
    dtype: torch.dtype | None = None,
    allow_missing: bool = False,
) -> None:
    """Write one adapter to `path`, atomically. In a process group every process calls, and rank 0
    writes.

    Args:
        model: for "diffusers" and "kohya" also several modules of a pipeline, by their names there,
            such as "unet".
        format: "gralora": one safetensors file that describes itself. "peft": a folder that PEFT
            reads as GraLoRA. All others are plain LoRA of rank k * r + hybrid_r, exactly. "lora": a
            folder that PEFT and every server of LoRA reads. "gguf": llama.cpp's file; needs the
            package gguf. "mlx": a folder that mlx-lm reads. "diffusers": a folder that pipelines'
            `load_lora_weights` reads. "kohya": one file that ComfyUI reads.
        rank: for plain LoRA: the rank of every layer. A higher one is cut by SVD, a lower one
            padded with zeros. "vllm": padded to the lowest that vLLM can be given. A share below 1:
            each layer is cut to the smallest rank that keeps this share of ‖ΔW‖².
        experts: for "lora": "fused", as PEFT has fused experts, and vLLM where its own code fuses
            them; "each", a pair for every expert under the names of a checkpoint, as vLLM and
            SGLang read all others.
        dtype: of the adapter's tensors in the file; None for their own.
        errors: a dict to be filled with ‖what is written - ΔW‖ / ‖ΔW‖ of each layer.
        allow_missing: write what is there, where layers that were adapted have been replaced since
            by others without an adapter.

    Raises:
        KeyError: no such adapter. ValueError: no such format, or it can't express this adapter; or
            something that was adapted is there no more; or a tensor is not of its shape, as under
            an engine that has emptied or flattened it.
    """
    if format not in FORMATS:
        raise ValueError(
            f"format={format!r} is not known; there are: {', '.join(map(repr, FORMATS))}."
        )
    parts = model if isinstance(model, Mapping) else {"": model}
    if isinstance(model, Mapping) and format not in PIPELINES:
        raise ValueError(
            f"several modules are for {' and '.join(map(repr, PIPELINES))}; format={format!r} is of"
            " one."
        )
    files = []
    for part, module in parts.items():
        _check_there(module, adapter_name, allow_missing)
        own = adapter_file(module, adapter_name)
        files.append(with_part(own, part) if part else own)
    file = convertible(
        files[0] if len(files) == 1 else of_parts(files), format, rank, errors, experts, dtype
    )
    live = [
        tensor
        for module in parts.values()
        for tensor in live_tensors(module, adapter_name).values()
    ]

    def write() -> None:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        FORMATS[format].write(file, Path(path))

    write_once(write, together=any(map(is_spread, live)))


PIPELINES = ("diffusers", "kohya")
"""Formats of pipelines: files of several modules."""


def _check_there(model: nn.Module, adapter_name: str, allow_missing: bool) -> None:
    """Raise unless the model has all of the adapter."""
    gone = missing(model, [adapter_name])
    if gone and not allow_missing:
        raise ValueError(
            f"{len(gone)} of what adapter {adapter_name!r} was injected into are there no more:"
            f" {shorten(gone)}. Something has rebuilt these modules since; do that first, then"
            " inject. allow_missing=True writes what is left."
        )
    check_known(model, adapter_name)


def to_lora(
    model: nn.Module,
    adapter_name: str = "default",
    rank: int | float | None = None,
    *,
    errors: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """The adapter as plain LoRA pairs: `<module>.lora_A.weight` (R, in) and
    `<module>.lora_B.weight` (out, R).

    Their product lora_B @ lora_A is ΔW, the scaling included: exactly with R = k * r + hybrid_r, or
    the best of `rank`.

    Args:
        rank: of every layer. A higher one is cut by SVD, computed from the factors; a lower one is
            padded with zeros. A share below 1: the smallest that keeps this share of ‖ΔW‖².
        errors: a dict to be filled with ‖lora_B @ lora_A - ΔW‖ / ‖ΔW‖ of each layer.

    Raises:
        KeyError: no such adapter. ValueError: `rank` is no positive integer and no share.
    """
    return lora_pairs(as_lora(adapter_file(model, adapter_name), rank, errors), scaled=True)


def adapter_file(model: nn.Module, adapter_name: str) -> AdapterFile:
    """All that a file of one adapter holds, in whatever format; the tensors share memory with the
    model.
    """
    layers = [
        (name, layer)
        for name, layer in gralora_layers(model)
        if adapter_name in layer.gralora_adapters
    ]
    check_whole(model)
    tensors = adapter_state_dict(model, adapter_name)
    _check_shapes(layers, adapter_name, tensors)
    only_biases = saved_biases(model, adapter_name)
    copies = [join(path, name) for path, (_, names) in only_biases.items() for name in names]
    config = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", None)
    return AdapterFile(
        tensors=tensors,
        configs={name: layer.gralora_adapters[adapter_name].config for name, layer in layers},
        modules_to_save=[
            name
            for name, saved in saved_modules(model)
            if _has_own(saved, adapter_name) and name not in only_biases
        ],
        biases=[*adapted_biases(model, adapter_name), *copies],
        base={name: _base_of(layer.map) for name, layer in layers},
        module_names=[name for name, _ in named_modules(model) if "gralora_" not in name],
        base_name=origin if isinstance(origin, str) and origin else None,
        model={
            **(model_fields(config) or {}),
            "class": getattr(type(model), "_base_class", type(model)).__name__,
        },
    )


def _has_own(saved: SavedModule, adapter_name: str) -> bool:
    return adapter_name in saved.gralora_saved and bool(
        saved.gralora_saved[adapter_name].state_dict()
    )


def _check_shapes(
    layers: list[tuple[str, GraloraLayer]], adapter_name: str, tensors: Mapping[str, Tensor]
) -> None:
    """Raise ValueError if a tensor is not what it should be: an engine may have emptied or
    flattened it.
    """
    wrong = [
        f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items() if tensor.numel() == 0
    ]
    for name, layer in layers:
        config, map = layer.gralora_adapters[adapter_name].config, layer.map
        n_in, n_out = map.sizes
        for key, shape in layer_shapes(name, n_in, n_out, config, map.copies).items():
            if key not in tensors or tuple(tensors[key].shape) != shape:
                found = "missing" if key not in tensors else tuple(tensors[key].shape)
                wrong.append(f"{key} {found}, not {shape}")
    if wrong:
        raise ValueError(
            f"adapter {adapter_name!r} is not whole, nothing is written: {shorten(wrong)}."
        )


def load_adapter(
    model: Loaded,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trainable: bool = False,
    allow_nonfinite: bool = False,
) -> Loaded:
    """Read an adapter from `path`, inject it and load its values; returns `model`.

    `path` is a file or folder of any format of `save_adapter`, or "owner/name" on the Hugging Face
    hub, if huggingface_hub is installed. Plain LoRA is GraLoRA with k = 1. A warning names the
    layers whose weights are not those that the adapter was trained on, where the file knows them.

    The first adapter of a model becomes active, a further one is added inactive. It is frozen
    unless `trainable`, and in the dtype of the file. Where the model has an adapter of this name
    already, on the same layers and of the same k, and no smaller, its values are replaced in place;
    `prepare_hotswap` makes room.

    Args:
        model: of a pipeline's file also several modules by their names there.
        allow_nonfinite: load NaN and infinite values, which are refused otherwise.

    Raises:
        ValueError (AdapterFileError): the file is damaged or does not fit the model, which is then
            unchanged. Nothing is left over or missed: an error names what would be.
            (`load_adapter_state_dict(strict=False)` returns both.)
    """
    check_adapter_name(adapter_name)
    source = located(os.fspath(path))
    file = read_adapter(source, allow_nonfinite=allow_nonfinite)
    if isinstance(model, Mapping):
        if file.format not in PIPELINES:
            raise AdapterFileError(
                f"{source} is of format {file.format!r}, which is of one module; several were"
                " given."
            )
        parts = [(module, of_part(file, part, _layers(module))) for part, module in model.items()]
    else:
        parts = [(model, _in_names_of(model, file))]
    plans = [_plan(module, own) for module, own in parts]
    for (_, own), plan in zip(parts, plans, strict=True):
        _warn_of_another_base(source, plan, own)
    with all_or_nothing(*(module for module, _ in parts)):
        loads = [
            _prepared(source, module, own, plan, adapter_name, trainable)
            for (module, own), plan in zip(parts, plans, strict=True)
        ]
        write_values(loads)
    return model


def _prepared(
    source: Path,
    model: nn.Module,
    file: AdapterFile,
    plan: Plan,
    adapter_name: str,
    trainable: bool,
) -> Load:
    """Make the adapter ready for the file's values, and check these; none is copied yet."""
    try:
        values = file.tensors
        if adapter_name in known_adapters(model):
            values = _swapped(model, file, adapter_name, trainable)
        else:
            install(model, plan, adapter_name, trainable=trainable)
        return prepared_load(model, values, adapter_name)
    except (KeyError, ValueError) as error:
        raise AdapterFileError(f"{source} does not fit this model: {error.args[0]}") from error


def _layers(model: nn.Module) -> list[str]:
    return [name for its, _ in Names(model).maps for name in its]


def _in_names_of(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """The file under the names that this model has for its layers."""
    layers = _layers(model)
    if file.format == "gguf":
        return renamed(file, layers, model_fields(getattr(model, "config", None)))
    if file.format in PIPELINES:
        try:
            part = part_of_pipeline(getattr(type(model), "_base_class", type(model)).__name__)
        except ValueError as error:
            raise AdapterFileError(str(error)) from error
        return of_part(file, part, layers)
    together(file, {*layers, *(name for _, its, _ in Names(model) for name in its)})
    return file


class _Places:
    """The modules and the maps of a model, under every name that they have."""

    def __init__(self, model: nn.Module) -> None:
        names = Names(model)
        self.modules = {name: module for _, its, module in names for name in its}
        self.maps = {name: map for its, map in names.maps for name in its}

    def module(self, name: str) -> nn.Module:
        if name not in self.modules:
            known = [*self.modules, *(other for other in self.maps if other not in self.modules)]
            raise AdapterFileError(
                f"the file adapts {name!r}, which this model lacks. Nearest:"
                f" {nearest(name, known)}."
            )
        return self.modules[name]

    def map(self, name: str) -> LinearMap:
        map = self.maps.get(name)
        reason = f"is a {type(self.module(name)).__name__}" if map is None else reason_unfit(map)
        if map is None or reason is not None:
            raise AdapterFileError(f"the file adapts {name!r}, which in this model {reason}.")
        return map


def _plan(model: nn.Module, file: AdapterFile) -> Plan:
    """Find every module that the file names, and check that the file's tensors fit there."""
    places = _Places(model)
    maps = {name: places.map(name) for name in file.configs}
    biases = _biases(file, places)
    own = {map.bias_place for map in maps.values()} & set(biases.values())
    targets = []
    for name, map in maps.items():
        _check_fits(file, name, map)
        bias = "gralora_only" if map.bias_place in own else "none"
        targets.append(Target(name, map, replace(file.configs[name], bias=bias)))
    copies: dict[str, tuple[nn.Module, list[str]]] = {}
    for key, place in biases.items():
        if place not in own:
            copies.setdefault(key.rpartition(".")[0], (place[0], []))[1].append(place[1])
    rows = token_modules(file)
    whole = [name for name in file.modules_to_save if name not in rows]
    saved = {unit: m for name in whole for unit, m in units(places.module(name), name)}
    parameters = {
        join(name, key): p for name, unit in saved.items() for key, p in unit.named_parameters()
    }
    return Plan(
        targets,
        saved,
        copies,
        dtypes={name: layer_tensors(file, name)[0].dtype for name in maps},
        reset=False,
        tied=not torn(parameters, file.tensors),
        tokens={name: (_embedding(name, places, own), own) for name, own in rows.items()},
    )


def _check_fits(file: AdapterFile, name: str, map: LinearMap) -> None:
    """Raise AdapterFileError unless the file's tensors have the shapes that the map needs."""
    config = file.configs[name]
    if any(size % config.gralora_k for size in map.divided_sizes):
        raise AdapterFileError(
            f"gralora_k={config.gralora_k} divides not both sizes of {name!r}, {map.divided_sizes}."
        )
    for key, shape in layer_shapes(name, *map.sizes, config, map.copies).items():
        tensor = file.tensors.get(key)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise AdapterFileError(
                f"{key} must have shape {shape} to fit this model's {name!r}; the file has {found}."
            )


def _biases(file: AdapterFile, places: _Places) -> dict[str, tuple[nn.Module, str]]:
    """(owner, name) of every bias in the file."""
    found = {}
    for key in file.biases:
        path, _, parameter = key.rpartition(".")
        owner = places.module(path)
        if not is_bias(parameter) or owner._parameters.get(parameter) is None:
            raise AdapterFileError(f"the file holds {key!r}, which is not a bias of this model.")
        found[key] = owner, parameter
    return found


def _embedding(name: str, places: _Places, tokens: tuple[int, ...]) -> nn.Module:
    """The embedding of which the file holds these rows."""
    module = places.module(name)
    try:
        check_tokens(name, module, tokens, "any")
    except ValueError as error:
        raise AdapterFileError(str(error)) from error
    return module


def _base_of(map: LinearMap) -> BaseWeight:
    weight = map.base_weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    matrix = map.base_matrix() if plain and weight.numel() > 0 and not weight.is_meta else None
    return BaseWeight.of(weight.dtype, map.shape, map.transposed, matrix, map.kind)


def _warn_of_another_base(path: Path, plan: Plan, file: AdapterFile) -> None:
    """Compare what the file remembers of the weights beneath it with this model's; shapes have been
    checked.
    """
    here = {t.name: _base_of(t.map) for t in plan.targets if t.name in file.base}
    differing = [
        (
            name
            if here[name].dtype == there.dtype
            else f"{name} ({there.dtype} there, {here[name].dtype} here)"
        )
        for name, there in file.base.items()
        if name in here and there.differs(here[name])
    ]
    if differing:
        warnings.warn(
            f"{path} was trained on another base: the weights differ in {shorten(differing)}, "
            f"{len(differing)} of {len(here)} layers. Outputs will not be those it was trained"
            " for.",
            UserWarning,
            stacklevel=3,
        )


def _keep_or_replace_config(adapter: GraloraAdapter, config: GraloraConfig) -> None:
    # compiled code stands on the very object, so it is replaced only by one that computes something
    # else
    if any(
        getattr(adapter.config, field) != getattr(config, field)
        for field in (*LAYER_FIELDS, *OPTIONAL_FIELDS)
    ):
        adapter.config = config


def _swapped(
    model: nn.Module, file: AdapterFile, adapter_name: str, trainable: bool
) -> dict[str, Tensor]:
    """Make an adapter that the model has ready for the values of a file, and those ready for it."""
    here = {
        name: layer.gralora_adapters
        for name, layer in gralora_layers(model)
        if adapter_name in layer.gralora_adapters
    }
    others = here.keys() ^ file.configs.keys()
    lacking = [
        name for name in others if name in here and here[name][adapter_name].roomy
    ]  # these get zeros
    if len(lacking) < len(others):
        raise AdapterFileError(
            f"adapter {adapter_name!r} is in this model already, on other layers than the file's:"
            f" {shorten(sorted(others))}. Delete it first, or load under another name."
        )
    values = dict(file.tensors)
    zeroed = [here[name] for name in lacking]
    for name, adapters in here.items():
        adapter = adapters[adapter_name]
        keys = list(adapter_keys(name, dict.fromkeys(FACTORS)))
        if name in lacking:
            zeros = [None if t is None else torch.zeros_like(t) for t in adapter.tensors]
            values.update(
                {key: zero for key, zero in zip(keys, zeros, strict=True) if zero is not None}
            )
            continue
        found = placed(adapter, layer_tensors(file, name), file.configs[name])
        if found is None:
            shapes = [tuple(tensor.shape) for tensor in (adapter.A, values[keys[0]])]
            raise AdapterFileError(
                f"{keys[0]} is {shapes[1]} there and {shapes[0]} here, of another k or larger."
                " prepare_hotswap(model, max_r) makes room for ranks up to max_r; else load under"
                " another name."
            )
        values.update(
            {key: value for key, value in zip(keys, found[0], strict=True) if value is not None}
        )
        _keep_or_replace_config(adapter, found[1])
    for key, layers in adapted_biases(model, adapter_name).items():
        if all(layer.gralora_adapters in zeroed for layer in layers):
            values[key] = base_bias(layers[0])
    for parameter in named_adapter_parameters(model, adapter_name).values():
        set_trained(parameter, trainable)
    return values
