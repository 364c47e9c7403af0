"""PEFT's folders: GraLoRA as GraLoRA, and GraLoRA as the plain LoRA that it is."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gralora.config import GraloraConfig
from gralora.files.atomic import write_folder
from gralora.files.card import write_card
from gralora.files.experts import unwrapped, wrapped
from gralora.files.lora import packed, unpacked
from gralora.files.own import (
    KINDS,
    LAYER_FIELDS,
    AdapterFile,
    AdapterFileError,
    BaseWeight,
    Format,
    Header,
    check_dtype,
    check_shapes,
    kind_of,
    layer_config,
    layer_keys,
    opened,
    out_in,
    parse_json,
    read_json,
    tensors_beside,
    unshared,
    write_tensors,
)
from gralora.files.pairs import (
    PairReader,
    Stored,
    groups_of,
    in_peft_layout,
    lora_keys,
    pair_of,
    stacked,
)
from gralora.files.patterns import pattern
from gralora.files.tokens import for_peft, from_peft
from gralora.layers.class_change import join

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LARGEST_CONFIG = 2**24  # bytes
EXPERTS = "gralora_parameters"
"""In the weights' metadata: parameters of fused experts in the order of their modules, which PEFT's
config does not tell.
"""

HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_rslora",
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
    fields |= {"peft_type": "GRALORA", "init_weights": True}
    _write(file, path, fields, "gralora_only", file.tensors)


def write_lora(file: AdapterFile, path: Path) -> None:
    """A folder that PEFT, and all that reads its folders, reads as plain LoRA; `file` has k = 1
    throughout.
    """
    projections = [name for name in file.configs if kind_of(file, name) == "attention"]
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
    experts = wrapped([name for name in file.configs if kind_of(file, name) == "experts"])
    paths = {parameter: path for path, parameter in experts}
    tensors = tensors_beside(file)
    for name in file.configs:
        tensors.update(_peft_pair(file, name, paths))
    parameters = [parameter for _, parameter in experts]
    _write(file, path, _lora_fields(file), "lora_only", tensors, attentions, parameters)


def _peft_pair(file: AdapterFile, name: str, paths: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of one layer; `paths` says where PEFT has the pairs of fused experts."""
    down, up = in_peft_layout(file, name, pair_of(file, name))
    match kind_of(file, name):
        case "embedding":  # PEFT's is the transposed map
            keys, down, up = _embedding_keys(name), up.mT.contiguous(), down.mT.contiguous()
        case "experts":
            keys, (down, up) = lora_keys(paths[name]), stacked(down, up)
        case _:
            keys = lora_keys(name)
    return dict(zip(keys, (down, up), strict=True))


def _lora_fields(file: AdapterFile) -> dict[str, Any]:
    """What a LoraConfig says of the layers' ranks and scalings."""
    ranks, alphas = {}, {}
    for name, config in file.configs.items():
        groups = groups_of(file, name)  # PEFT counts the ranks of all groups
        ranks[name], alphas[name] = config.r * groups, config.alpha * groups
    common = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)
    r, alpha = common[0][0] if common else (1, 1)
    dropouts = {config.gralora_dropout for config in file.configs.values()}
    if len(dropouts) > 1 or any(kind_of(file, name) == "experts" for name in file.configs):
        dropouts = {0.0}  # PEFT's experts take none
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(dropouts), 0.0),
        "rank_pattern": {_exactly(name): own for name, own in ranks.items() if own != r},
        "alpha_pattern": {_exactly(name): own for name, own in alphas.items() if own != alpha},
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


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
    targets = [name for name in file.configs if name not in experts and name not in attentions]
    adapted = {join(name, "bias") for name in file.configs}
    config = {
        **fields,
        "base_model_name_or_path": file.base_name,
        "bias": _bias(file, adapted, some_biases),
        "fan_in_fan_out": _fan_in_fan_out(file, experts),
        "inference_mode": True,
        "modules_to_save": _named_by_end(file.modules_to_save, file.module_names) or None,
        "target_modules": _target_modules(targets, file.module_names),
        "task_type": None,
    }
    metadata = {"format": "pt"}
    if experts:
        config["target_parameters"] = list(experts)
        metadata[EXPERTS] = json.dumps(list(experts))
    if tokens:
        config["trainable_token_indices"] = tokens
    renamed = {
        PREFIX + _renamed(key, adapted, attentions): tensor
        for key, tensor in unshared(file.tensors).items()
    }

    def write(folder: Path) -> None:
        write_tensors(renamed, folder / WEIGHTS, metadata)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not (path / "README.md").exists():
            write_card(file, folder, fields["peft_type"])

    write_folder(path, write, keep_others=True)


def _bias(file: AdapterFile, adapted: Collection[str], some_biases: str) -> str:
    """PEFT's word for the biases of the file."""
    if not file.biases:
        return "none"
    return some_biases if set(file.biases) <= set(adapted) else "all"


def _fan_in_fan_out(file: AdapterFile, experts: Collection[str]) -> bool:
    layers = [name for name in file.configs if name not in experts and name in file.base]
    return {file.base[name].fan_in_fan_out for name in layers} == {True}


def _renamed(key: str, adapted: Collection[str], attentions: Collection[str]) -> str:
    """`key` with PEFT's wrapper in it: of the layer whose bias it is, or of the attention whose
    out_proj.
    """
    if key in adapted:
        return key.removesuffix("bias") + "base_layer.bias"
    layer = key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    if layer in attentions:
        return key.replace("out_proj.lora_", "base_layer.out_proj.lora_")
    return key


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


def read_folder(path: Path) -> AdapterFile:
    """Read a folder of PEFT's: GraLoRA, or plain LoRA as GraLoRA with k = 1. Variants of LoRA are
    refused by name.
    """
    config = _read_config(path)
    read = READERS[config["peft_type"]]
    with opened(path / WEIGHTS) as header:
        inner, experts = _without_wrappers(path, config, header)
        for key, dtype in inner.dtypes.items():
            if _last(key.removesuffix(".weight")).startswith(("lora_", "gralora_")):
                check_dtype(path, key, dtype)
        file, used = read(path, config, inner, experts)
        used = used | _read_embeddings(file, inner)
        file.tensors.update({key: inner.get(key) for key in inner.shapes if key not in used})
    tokens = from_peft(file, config)
    rest = [key for key in inner.shapes if key not in used and key in file.tensors]
    _sort_out(file, rest, config.get("modules_to_save") or [])
    file.modules_to_save += tokens
    _describe_base(file, config)
    return file


def _read_config(path: Path) -> dict[str, Any]:
    if (path / PICKLE).exists():
        raise AdapterFileError(
            f"{path} holds {PICKLE}, a pickle, which can run any code and is never opened. Save the"
            f" adapter with PEFT's save_pretrained (which writes {WEIGHTS}), and remove the pickle."
        )
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise AdapterFileError(f"{path} is no folder of an adapter: it lacks {name}.")
    size = (path / CONFIG).stat().st_size
    if size > LARGEST_CONFIG:
        raise AdapterFileError(f"{path / CONFIG} is {size} bytes long: no config of an adapter.")
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise AdapterFileError(
            f"{path}: peft_type={kind!r} is not known; known are {', '.join(READERS)}."
        )
    return config


def _without_wrappers(
    path: Path, config: Mapping[str, Any], header: Header
) -> tuple[Header, Collection[str]]:
    """The file with the names of its keys without PEFT's wrappers, and which parameters of fused
    experts are among these.
    """
    # `base_layer` and `modules_to_save` are wrappers, `original_module` is the base's own
    inside = (".original_module.", ".modules_to_save.")
    keys = [key for key in header.shapes if not any(each in key for each in inside)]
    bare = {key.removeprefix(PREFIX): key for key in keys}
    parameters = config.get("target_parameters") or []
    ordered = parse_json(path, f"the metadata {EXPERTS!r}", header.metadata.get(EXPERTS, "[]"))
    for part in (parameters, ordered):
        if not isinstance(part, list) or not all(isinstance(name, str) for name in part):
            raise AdapterFileError(f"{path}: target_parameters is no list of names.")
    paths = [key.removesuffix(".lora_A.weight") for key in bare if key.endswith(".lora_A.weight")]
    try:
        found = unwrapped(paths, parameters, ordered)
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    full: dict[str, str] = {}
    for name, key in bare.items():
        inner = re.sub(r"\.lora_[AB]\.weight$", "", name)
        if inner in found:
            renamed = found[inner] + name.removeprefix(inner)
        else:
            renamed = name.replace(".base_layer.", ".")
        if renamed in full:
            raise AdapterFileError(f"{path}: {key} and {full[renamed]} are of one layer.")
        full[renamed] = key
    shapes = {name: header.shapes[key] for name, key in full.items()}
    dtypes = {name: header.dtypes[key] for name, key in full.items()}
    result = Header(header.metadata, shapes, dtypes, lambda name: header.get(full[name]))
    return result, set(found.values())


def _read_gralora(
    path: Path, config: Mapping[str, Any], header: Header, experts: Collection[str]
) -> tuple[AdapterFile, set[str]]:
    names = [key.rpartition(".")[0] for key in header.shapes if _last(key) == "gralora_A"]
    given = {field: config[field] for field in LAYER_FIELDS if field in config}
    configs = {name: layer_config(path, name, given) for name in names}
    check_shapes(path, configs, header.shapes)
    used = {key for name, each in configs.items() for key in layer_keys(name, each)}
    return AdapterFile(configs, {key: header.get(key) for key in used}, format="peft"), used


def _read_lora(
    path: Path, config: Mapping[str, Any], header: Header, experts: Collection[str]
) -> tuple[AdapterFile, set[str]]:
    _refuse_variants(path, config, header)
    rank_of = pattern(path, config.get("rank_pattern"), config.get("r", 8), "rank_pattern")
    alpha_of = pattern(path, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    reader = PairReader(path, header, "lora")
    for key in header.shapes:
        end = _last(key.removesuffix(".weight"))
        if end not in ("lora_A", "lora_embedding_A"):
            continue
        name = key.removesuffix(".weight").removesuffix(end).removesuffix(".")
        down, up = (Stored(key) for key in lora_keys(name))
        kind = "experts" if name in experts else "convolution"
        if end == "lora_embedding_A":  # the transposed map
            up, down = (Stored(key, transposed=True) for key in _embedding_keys(name))
            kind = "embedding"
        reader.add(
            name,
            down,
            up,
            alpha_of(name),
            dropout=config.get("lora_dropout", 0.0),
            use_rslora=bool(config.get("use_rslora")),
            kind=kind,
            expert_rank=rank_of(name) if kind == "experts" else None,
        )
    return unpacked(reader.file), reader.used


READERS = {"GRALORA": _read_gralora, "LORA": _read_lora}
"""By PEFT's `peft_type`."""


def _read_embeddings(file: AdapterFile, header: Header) -> set[str]:
    """Remember the weights of adapted embeddings, which PEFT adds to its files; returns their
    keys.
    """
    used = set()
    for name in file.configs:
        key = join(name, "weight")
        if kind_of(file, name) == "embedding" and key in header.shapes:
            weight = header.get(key)
            shape = file.base[name].shape
            file.base[name] = BaseWeight.of(weight.dtype, shape, False, weight, "embedding")
            used.add(key)
    return used


def _describe_base(file: AdapterFile, config: Mapping[str, Any]) -> None:
    """What the config says of the weights beneath the adapters."""
    base_name, layout = config.get("base_model_name_or_path"), config.get("fan_in_fan_out")
    file.base_name = base_name if isinstance(base_name, str) else None
    if isinstance(layout, bool):
        for name in file.configs:
            weight = BaseWeight(out_in(file, name), "unknown", layout, None)
            file.base.setdefault(name, weight)


def _refuse_variants(path: Path, config: Mapping[str, Any], header: Header) -> None:
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
    for key in header.shapes:
        if "lora_" in _last(key.removesuffix(".weight")) and not key.endswith(PAIRS):
            raise AdapterFileError(
                f"{path}: {key} belongs to a variant of LoRA; only plain LoRA can be read."
            )


def _sort_out(file: AdapterFile, keys: Iterable[str], saved: Any) -> None:
    """Tell from their names what the tensors beside the adapters are: whole modules that were
    saved, or biases.
    """
    names = saved if isinstance(saved, list) else []
    wanted = tuple(name for name in names if isinstance(name, str))
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


def _embedding_keys(name: str) -> tuple[str, str]:
    return join(name, "lora_embedding_A"), join(name, "lora_embedding_B")


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


PEFT = Format(
    Path.is_dir,
    read_folder,
    write_peft,
    kinds=("linear",),
    reason="PEFT's GraLoRA adapts linear layers only",
)
LORA = Format(
    Path.is_dir,
    read_folder,
    write_lora,
    kinds=[kind for kind in KINDS if kind != "transposed convolution"],
    reason="there is no LoRA of a transposed convolution",
)
