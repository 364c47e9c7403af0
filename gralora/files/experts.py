"""Fused experts in LoRA folders: as PEFT has them under `target_parameters`, or each expert for
itself.

PEFT (0.21.2, `lora.ParamWrapper`) stacks the pairs of all experts: lora_A (experts · R, in), lora_B
(out, R · experts), in which the expert is the last axis of B. Its keys name the module, not the
parameter: the first parameter of a module that is adapted is `<module>.base_layer.lora_A`, the last
`<module>.lora_A`. vLLM reads the same for models whose own experts are one 3-D weight
(`model_manager.py`, `_stack_moe_lora_weights`). For all others vLLM and SGLang want a pair for
every expert under the names that the checkpoint gives it: `<module>.3.gate_proj.lora_A`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from gralora.files.own import AdapterFile, kind_of, out_in, pop_layer
from gralora.files.pairs import Pair, padded, pair_config, pair_of, put_pair
from gralora.layers.class_change import join

FUSED = ("gate_up_proj", "down_proj")
"""The parameters of fused experts as transformers names and orders them."""

APART = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)")


class Wrapped(NamedTuple):
    """One parameter of fused experts in PEFT's keys: where its pair stands, and which it is."""

    path: str
    parameter: str


def wrapped(names: Collection[str]) -> list[Wrapped]:
    """Where PEFT puts the pairs of these parameters, given in the order in which their modules have
    them.
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return [
        Wrapped(module + ".base_layer" * (len(own) - 1 - index), name)
        for module, own in modules.items()
        for index, name in enumerate(_sorted(own))
    ]


def unwrapped(
    paths: Collection[str], parameters: Collection[str], ordered: Collection[str]
) -> dict[str, str]:
    """The reverse: which parameter each path of a pair in PEFT's keys means; layers that are none
    are left out.

    Args:
        parameters: PEFT's `target_parameters`: whole names, or their ends.
        ordered: whole names in the order of their modules, where the folder says it.
    """
    depths: dict[str, list[str]] = {}
    for path in paths:
        depths.setdefault(re.sub(r"(\.base_layer)+$", "", path), []).append(path)
    found: dict[str, str] = {}
    for module, own in depths.items():
        ends = [
            each
            for each in parameters
            if "." in each and f".{module}".endswith(f".{each.rpartition('.')[0]}")
        ]
        names = [name for name in ordered if name.rpartition(".")[0] == module]
        if not names:
            names = _sorted(list({join(module, each.rpartition(".")[2]): None for each in ends}))
            if len(names) > 1 and not all(name.rpartition(".")[2] in FUSED for name in names):
                raise ValueError(
                    f"which of the parameters {', '.join(names)} each pair is of can't be known."
                )
        if ends and len(names) != len(own):
            raise ValueError(
                f"{module!r} has {len(own)} pairs for the parameters {', '.join(names)}."
            )
        if ends:
            found.update(zip(sorted(own, key=len, reverse=True), names, strict=True))
    return found


def _sorted(names: list[str]) -> list[str]:
    """In the order of `FUSED`, where all are of it."""
    last = {name: name.rpartition(".")[2] for name in names}
    if not set(last.values()) <= set(FUSED):
        return names
    return sorted(names, key=lambda name: FUSED.index(last[name]))


def apart(file: AdapterFile) -> AdapterFile:
    """A file with k = 1 in which every expert has pairs of its own, gate and up each one, under a
    checkpoint's names.
    """
    result = dataclasses.replace(
        file, configs=dict(file.configs), tensors=dict(file.tensors), base=dict(file.base)
    )
    for name in file.configs:
        if kind_of(file, name) == "experts":
            _take_apart(result, name)
    return result


def _take_apart(file: AdapterFile, name: str) -> None:
    module, _, parameter = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if parameter == FUSED[0] else (parameter,)
    if len(parts) > 1 and name in file.base and file.base[name].fan_in_fan_out:
        raise ValueError(
            f"{name!r} is stored (in, out), where gate and up may lie interleaved: its experts"
            " can't be written one by one. Servers take such a model's as experts=\"fused\"."
        )
    downs, ups, config = pair_of(file, name)
    pop_layer(file, name)
    file.base.pop(name, None)
    for expert, (down, up) in enumerate(zip(downs, ups, strict=True)):
        for part, own in zip(parts, up.chunk(len(parts)), strict=True):
            put_pair(file, f"{module}.{expert}.{part}", Pair(down, own, config))


def together(file: AdapterFile, known: Collection[str]) -> None:
    """The reverse of `apart`, in place, for a model (names in `known`) that has its experts in one
    parameter.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in file.configs:
        match = APART.fullmatch(name)
        if match and name not in known and join(match["module"], FUSED[1]) in known:
            parts = found.setdefault(match["module"], {})
            parts.setdefault(match["part"], {})[int(match["expert"])] = name
    for module, parts in found.items():
        if "down_proj" in parts:
            _fuse(file, join(module, FUSED[1]), [parts["down_proj"]])
        if "gate_proj" in parts and "up_proj" in parts:
            _fuse(file, join(module, FUSED[0]), [parts["gate_proj"], parts["up_proj"]])


def _fuse(file: AdapterFile, name: str, parts: list[dict[int, str]]) -> None:
    """One adapter of fused experts out of those of each; the parts' outputs one behind the
    other.
    """
    if not _can_fuse(file, parts):
        return  # then loading names the layers that the model lacks
    pairs = []
    dropout = file.configs[parts[0][0]].gralora_dropout
    for expert in range(len(parts[0])):
        names = [part[expert] for part in parts]
        pairs.append(_side_by_side([pair_of(file, own).folded() for own in names]))
        for own in names:
            pop_layer(file, own)
    rank = max(down.shape[-2] for down, _ in pairs)
    downs, ups = zip(*(padded(down, up, rank) for down, up in pairs), strict=True)
    config = pair_config(rank, rank, dropout)
    put_pair(file, name, Pair(torch.stack(downs), torch.stack(ups), config))


def _can_fuse(file: AdapterFile, parts: list[dict[int, str]]) -> bool:
    """Whether every expert has a LoRA pair of the same sizes."""
    names = [name for part in parts for name in part.values()]
    plain = all(
        file.configs[name].gralora_k == 1
        and file.configs[name].hybrid_r == 0
        and kind_of(file, name) == "linear"
        for name in names
    )
    complete = all(part.keys() == set(range(len(parts[0]))) for part in parts)
    sizes_of_parts = [{out_in(file, name) for name in part.values()} for part in parts]
    inputs = {n_in for sizes in sizes_of_parts for _, n_in in sizes}
    return plain and complete and len(inputs) == 1 and all(len(s) == 1 for s in sizes_of_parts)


def _side_by_side(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """down and up of one pair with the outputs of all."""
    downs, ups = [pair.down for pair in pairs], [pair.up for pair in pairs]
    if all(torch.equal(downs[0], down) for down in downs):
        return downs[0], torch.cat(ups)
    blocks: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    return torch.cat(downs), blocks
