"""PEFT's folders: GraLoRA as GraLoRA, and GraLoRA as the plain LoRA that it is."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from gralora.config import GraloraConfig
from gralora.files.atomic import write_folder
from gralora.files.card import write_card
from gralora.files.experts import is_experts, refuse_experts, stacked, unstacked, unwrapped, wrapped
from gralora.files.lora import (
    groups_of,
    is_embedding,
    is_projection,
    lora_pairs,
    own_channels,
    packed,
    tensors_beside,
    unpacked,
)
from gralora.files.own import (
    LAYER_FIELDS,
    AdapterFile,
    AdapterFileError,
    BaseWeight,
    Format,
    Shapes,
    check_dtype,
    check_shapes,
    layer_config,
    layer_keys,
    opened,
    out_in,
    parse_json,
    read_json,
    unshared,
    write_tensors,
)
from gralora.files.patterns import pattern
from gralora.files.tokens import for_peft, from_peft
from gralora.layers.class_change import join
from gralora.model.state import adapter_keys

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LARGEST_CONFIG = 2**24  # bytes
EXPERTS = "gralora_parameters"
"""In the weights' metadata: parameters of fused experts in the order of their modules, which PEFT's
config does not tell.
"""

HARMLESS = {
    *(
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
    ),
    *(
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
    ),
    *(
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
    ),
    *(
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
        "corda_config",
        "eva_config",
        "lora_ga_config",
    ),
    *("init_lora_weights", "loftq_config", "target_parameters", "trainable_token_indices"),
}
"""Fields of PEFT's LoRA config that leave a trained adapter plain LoRA; any other that is set names
a variant.
"""

PAIRS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
"""Ends of the keys of plain LoRA."""

PLAIN_INITS = (True, False, None, "true", "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights alone."""


def write_peft(file: AdapterFile, path: Path) -> None:
    """A folder that PEFT reads as GraLoRA. There, one config holds for all layers, which are
    linear.
    """
    refuse_experts(file, "PEFT's GraLoRA")
    for name in file.configs:
        if name in file.base and file.base[name].kind != "linear":
            raise ValueError(
                f"{name!r}, of kind {file.base[name].kind!r}, is no linear layer, and PEFT's"
                ' GraLoRA adapts no other. format="lora" writes it as plain LoRA, exactly;'
                ' format="gralora" as it is.'
            )
    plain = {
        name: config.scaled(config.scaling) if config.use_rslora else config
        for name, config in file.configs.items()
    }
    file = dataclasses.replace(file, configs=plain)  # its config has no use_rslora
    for field in LAYER_FIELDS:
        values = {getattr(config, field): name for name, config in file.configs.items()}
        if len(values) > 1:
            shown = ", ".join(f"{value} in {name!r}" for value, name in list(values.items())[:3])
            raise ValueError(
                f"layers differ in {field} ({shown}), which PEFT's GraLoRA can't express: its"
                ' config holds for all layers. format="lora" writes it as plain LoRA, exactly;'
                ' format="gralora" as it is.'
            )
    config = next(iter(file.configs.values()), GraloraConfig())
    fields = {field: getattr(config, field) for field in LAYER_FIELDS}
    _write(
        file,
        path,
        {"peft_type": "GRALORA", **fields, "init_weights": True},
        "gralora_only",
        file.tensors,
    )


def write_lora(file: AdapterFile, path: Path) -> None:
    """A folder that PEFT, and all that reads its folders, reads as plain LoRA; `file` has k = 1
    throughout.
    """
    projections = [name for name in file.configs if is_projection(file, name)]
    attentions = [join(name.rpartition(".")[0], "out_proj") for name in projections]
    file = packed(file)
    doubled = [name for name in projections if name in attentions]
    if doubled:
        warnings.warn(
            "PEFT up to 0.21.2 applies the update of an attention's out_proj twice (its pull"
            f" request 3774): {doubled[0]!r} is written as it is, but will not compute the same"
            " there.",
            UserWarning,
            stacklevel=3,
        )
    refused = [
        name
        for name in file.configs
        if name in file.base and file.base[name].kind == "transposed convolution"
    ]
    if refused:
        raise ValueError(
            f"{refused[0]!r} is a transposed convolution, for which there is no LoRA."
            ' format="gralora" holds it.'
        )
    groups = {
        name: groups_of(file, name) for name in file.configs
    }  # PEFT counts the ranks of all groups
    sizes = {
        name: (config.r * groups[name], config.alpha * groups[name])
        for name, config in file.configs.items()
    }
    common = Counter(sizes.values()).most_common(1)
    r, alpha = common[0][0] if common else (1, 1)
    experts = wrapped([name for name in file.configs if is_experts(file, name)])
    dropouts = {config.gralora_dropout for config in file.configs.values()}
    fields = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": (
            dropouts.pop() if len(dropouts) == 1 and not experts else 0.0
        ),  # PEFT's experts take none
        "rank_pattern": {_exactly(name): own for name, (own, _) in sizes.items() if own != r},
        "alpha_pattern": {_exactly(name): own for name, (_, own) in sizes.items() if own != alpha},
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    pairs = lora_pairs(file)
    for name in [
        name for name in file.configs if is_embedding(file, name)
    ]:  # PEFT's is the transposed map
        down, up = (pairs.pop(join(name, f"lora_{letter}.weight")) for letter in "AB")
        pairs.update(
            dict(
                zip(_embedding_keys(name), (up.mT.contiguous(), down.mT.contiguous()), strict=True)
            )
        )
    for inner, name in experts:
        both = stacked(*(pairs.pop(join(name, f"lora_{letter}.weight")) for letter in "AB"))
        pairs.update(
            {
                join(inner, f"lora_{letter}.weight"): each
                for letter, each in zip("AB", both, strict=True)
            }
        )
    _write(
        file,
        path,
        fields,
        "lora_only",
        {**pairs, **tensors_beside(file)},
        attentions,
        [e.parameter for e in experts],
    )


def read_folder(path: Path) -> AdapterFile:
    """Read a folder of PEFT's: GraLoRA, or plain LoRA as GraLoRA with k = 1. Variants of LoRA are
    refused by name.
    """
    if (path / PICKLE).exists():
        raise AdapterFileError(
            f"{path} holds {PICKLE}, a pickle, which can run any code and is never opened. Save the"
            f" adapter with PEFT's save_pretrained (which writes {WEIGHTS}), and remove the pickle."
        )
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise AdapterFileError(f"{path} is no folder of an adapter: it lacks {name}.")
    if (path / CONFIG).stat().st_size > LARGEST_CONFIG:
        raise AdapterFileError(
            f"{path / CONFIG} is {(path / CONFIG).stat().st_size} bytes long: no config of an"
            " adapter."
        )
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise AdapterFileError(
            f"{path}: peft_type={kind!r} is not known; known are {', '.join(READERS)}."
        )
    with opened(path / WEIGHTS) as (metadata, shapes, dtypes, get):
        # in full, `base_layer` and `modules_to_save` are PEFT's wrappers; `original_module` is the
        # base's own
        wanted = [
            key
            for key in shapes
            if ".original_module." not in key and ".modules_to_save." not in key
        ]
        keys, experts = _without_wrappers(path, config, wanted, metadata)
        stripped = {key: shapes[full] for key, full in keys.items()}
        for key, full in keys.items():
            if _last(key.removesuffix(".weight")).startswith(("lora_", "gralora_")):
                check_dtype(path, key, dtypes[full])
        file, names = READERS[kind](path, config, stripped, lambda key: get(keys[key]), experts)
        embeddings = {
            join(name, "weight") for name in file.configs if is_embedding(file, name)
        }  # PEFT adds the base's own
        rest = [key for key in keys if key not in names | embeddings]
        for key in embeddings & keys.keys():
            name, weight = key.rpartition(".")[0], get(keys[key])
            file.base[name] = BaseWeight.of(
                weight.dtype, file.base[name].shape, False, weight, "embedding"
            )
        file.tensors.update({key: get(keys[key]) for key in rest})
    tokens = from_peft(file, config)
    rest = [key for key in rest if key in file.tensors]
    _sort_out(file, rest, config.get("modules_to_save") or [])
    file.modules_to_save += tokens
    base_name = config.get("base_model_name_or_path")
    layout = config.get("fan_in_fan_out")
    if isinstance(layout, bool):  # all that a folder says of the weights beneath
        known = {
            name: BaseWeight(out_in(file, name), "unknown", layout, None) for name in file.configs
        }
        file.base = {**known, **file.base}
    file.base_name = base_name if isinstance(base_name, str) else None
    return file


Loader = Callable[[str], Tensor]


def _without_wrappers(
    path: Path, config: Mapping[str, Any], keys: Iterable[str], metadata: Mapping[str, str]
) -> tuple[dict[str, str], Collection[str]]:
    """The file's keys by their names without PEFT's wrappers, and which parameters of fused experts
    are among these.
    """
    bare = {key.removeprefix(PREFIX): key for key in keys}
    parameters = config.get("target_parameters") or []
    ordered = parse_json(path, f"the metadata {EXPERTS!r}", metadata.get(EXPERTS, "[]"))
    if not all(
        isinstance(part, list) and all(isinstance(n, str) for n in part)
        for part in (parameters, ordered)
    ):
        raise AdapterFileError(f"{path}: target_parameters is no list of names.")
    paths = [key.removesuffix(".lora_A.weight") for key in bare if key.endswith(".lora_A.weight")]
    try:
        found = unwrapped(paths, parameters, ordered)
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    result: dict[str, str] = {}
    for name, key in bare.items():
        inner = re.sub(r"\.lora_[AB]\.weight$", "", name)
        renamed = (
            name.replace(".base_layer.", ".")
            if inner not in found
            else found[inner] + name.removeprefix(inner)
        )
        if renamed in result:
            raise AdapterFileError(f"{path}: {key} and {result[renamed]} are of one layer.")
        result[renamed] = key
    return result, set(found.values())


def _read_gralora(
    path: Path, config: Mapping[str, Any], shapes: Shapes, get: Loader, experts: Collection[str]
) -> tuple[AdapterFile, set[str]]:
    names = [key.rpartition(".")[0] for key in shapes if _last(key) == "gralora_A"]
    given = {field: config[field] for field in LAYER_FIELDS if field in config}
    configs = {name: layer_config(path, name, given) for name in names}
    check_shapes(path, configs, shapes)
    owned = {key for name, each in configs.items() for key in layer_keys(name, each)}
    return AdapterFile(configs, {key: get(key) for key in owned}, format="peft"), owned


def _read_lora(
    path: Path, config: Mapping[str, Any], shapes: Shapes, get: Loader, experts: Collection[str]
) -> tuple[AdapterFile, set[str]]:
    _refuse_variants(path, config, shapes)
    rank_of = pattern(path, config.get("rank_pattern"), config.get("r", 8), "rank_pattern")
    alpha_of = pattern(path, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    configs, tensors, owned = {}, {}, set()
    base: dict[str, BaseWeight] = {}
    for key in [key for key in shapes if key.endswith(("lora_A.weight", "lora_embedding_A"))]:
        embedding = key.endswith("lora_embedding_A")
        name = re.sub(r"\.?lora_(A\.weight|embedding_A)$", "", key)
        pair = (
            _embedding_keys(name)
            if embedding
            else [join(name, f"lora_{letter}.weight") for letter in "AB"]
        )
        down, up = (shapes.get(each, ()) for each in pair)
        groups = (
            down[0] // up[1]
            if len(down) > 2 and len(up) > 1 and up[1] and not down[0] % up[1]
            else 1
        )
        fits = (
            len(down) >= 2 and len(up) == len(down) and 0 not in down + up and not set(up[2:]) - {1}
        )
        if not fits or down[0] != up[1] * groups or up[0] % groups or down[1] % groups:
            raise AdapterFileError(
                f"{path}: {name!r} has lora_A of shape {down} and lora_B of {up}: no pair of"
                " matrices or of kernels."
            )
        if embedding:
            base[name] = BaseWeight((down[1], up[0]), "unknown", False, None, "embedding")
        if len(down) > 2:
            kernel = (down[1] // groups, *down[2:])
            base[name] = BaseWeight((up[0], *kernel), "unknown", False, None, "convolution")
        alpha, r = alpha_of(name), rank_of(name) if name in experts else down[0] // groups
        if name in experts and (not isinstance(r, int) or r < 1 or down[0] % r or len(down) > 2):
            raise AdapterFileError(
                f"{path}: {name!r} has lora_A of shape {down}, no multiple of its rank {r!r}."
            )
        fields = {
            "r": r,
            "alpha": alpha,
            "gralora_k": 1,
            "gralora_dropout": config.get("lora_dropout", 0.0),
        }
        configs[name] = layer_config(path, name, fields)
        factor = (
            (r * groups) ** 0.5 / groups if config.get("use_rslora") else 1 / groups
        )  # rsLoRA's scaling is alpha / √r
        if factor != 1:
            configs[name] = layer_config(
                path, name, {**fields, "alpha": configs[name].alpha * factor}
            )
        A, B = (get(key).flatten(1) for key in pair)
        if groups > 1:
            A, B = own_channels(path, name, A, groups), rearrange(B, "(g o) r -> g o r", g=groups)
        A, B = unstacked(A, B, r) if name in experts else (B.mT, A.mT) if embedding else (A, B)
        A, B = rearrange(A, "... r i -> ... 1 i r"), rearrange(B, "... o r -> ... 1 r o")
        tensors.update(adapter_keys(name, {"A": A.contiguous(), "B": B.contiguous()}))
        owned.update(pair)
    return unpacked(AdapterFile(configs, tensors, base=base, format="lora")), owned


READERS = {"GRALORA": _read_gralora, "LORA": _read_lora}
"""By PEFT's `peft_type`."""

PEFT = Format(Path.is_dir, read_folder, write_peft)
LORA = Format(Path.is_dir, read_folder, write_lora)


def _refuse_variants(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    for field, value in config.items():
        if field not in HARMLESS and value:
            raise AdapterFileError(
                f"{path}: {field}={value!r} is a variant of LoRA; only plain LoRA can be read."
            )
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterFileError(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} changed the base weights"
            " too, so the adapter alone is not the whole update. Let PEFT convert it:"
            " save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for key in shapes:
        if "lora_" in _last(key.removesuffix(".weight")) and not key.endswith(PAIRS):
            raise AdapterFileError(
                f"{path}: {key} belongs to a variant of LoRA; only plain LoRA can be read."
            )


def _sort_out(file: AdapterFile, keys: Iterable[str], saved: Any) -> None:
    """Tell from their names what the tensors beside the adapters are: whole modules that were
    saved, or biases.
    """
    wanted = (
        tuple(name for name in saved if isinstance(name, str)) if isinstance(saved, list) else ()
    )
    modules: dict[str, None] = {}
    for key in keys:
        owner = key.rpartition(".")[0]
        parts = owner.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        root = next((path for path in above if path.endswith(wanted)), None)
        if root is None and _last(key) == "bias":
            file.biases.append(key)
        else:
            modules[root or owner] = None
    file.modules_to_save = list(modules)


def _write(
    file: AdapterFile,
    path: Path,
    fields: Mapping[str, Any],
    some_biases: str,
    tensors: Mapping[str, Tensor],
    attentions: Collection[str] = (),
    experts: Collection[str] = (),
) -> None:
    """Write a folder. `attentions` are layers that belong to a target, `experts` parameters: no
    targets of their own.
    """
    if "" in file.configs or any("." not in name for name in experts):
        raise ValueError(
            "the model itself is the adapted layer, or holds it as a parameter; PEFT can't name"
            " that. Put it into a module, and inject there."
        )
    file, tokens = for_peft(dataclasses.replace(file, tensors=dict(tensors)))
    adapted = {join(name, "bias") for name in file.configs}
    bias = "none" if not file.biases else some_biases if adapted.issuperset(file.biases) else "all"
    layers = [name for name in file.configs if name not in experts]
    layouts = {file.base[name].fan_in_fan_out for name in layers if name in file.base}
    config = {
        **fields,
        "base_model_name_or_path": file.base_name,
        "bias": bias,
        "fan_in_fan_out": layouts == {True},
        "inference_mode": True,
        "modules_to_save": _named_by_end(file.modules_to_save, file.module_names) or None,
        "target_modules": _target_modules(
            [n for n in layers if n not in attentions], file.module_names
        ),
        "task_type": None,
        **({"target_parameters": list(experts)} if experts else {}),
        **({"trainable_token_indices": tokens} if tokens else {}),
    }
    renamed = {
        PREFIX + _renamed(key, adapted, attentions): tensor
        for key, tensor in unshared(file.tensors).items()
    }

    def write(folder: Path) -> None:
        write_tensors(
            renamed,
            folder / WEIGHTS,
            {"format": "pt", **({EXPERTS: json.dumps(list(experts))} if experts else {})},
        )
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not (path / "README.md").exists():
            write_card(file, folder, fields["peft_type"])

    write_folder(path, write, keep_others=True)


def _renamed(key: str, adapted: Collection[str], attentions: Collection[str]) -> str:
    """`key` with PEFT's wrapper in it: of the layer whose bias it is, or of the attention whose
    out_proj.
    """
    if key in adapted:
        return key.removesuffix("bias") + "base_layer.bias"
    layer = key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    return (
        key.replace("out_proj.lora_", "base_layer.out_proj.lora_") if layer in attentions else key
    )


def _target_modules(targets: list[str], names: list[str]) -> list[str] | str:
    """The full names; or, where PEFT would match more by their ends, the regular expression for
    exactly them.
    """
    chosen = set(targets)
    ends = tuple(f".{name}" for name in targets)
    if any(name.endswith(ends) for name in names if name not in chosen):
        return "|".join(map(re.escape, targets))
    return targets


def _named_by_end(saved: list[str], names: list[str]) -> list[str]:
    inside = tuple(f"{name}." for name in saved)
    more = [
        n for n in names if n.endswith(tuple(saved)) and n not in saved and not n.startswith(inside)
    ]
    if more:
        raise ValueError(
            f"PEFT finds modules_to_save by the ends of names, and {', '.join(saved)} would find"
            f' {more[0]!r} as well. Rename the module, or save with format="gralora".'
        )
    return saved


def _embedding_keys(name: str) -> list[str]:
    return [join(name, f"lora_embedding_{letter}") for letter in "AB"]


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _last(key: str) -> str:
    return key.rpartition(".")[2]
