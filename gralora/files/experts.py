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
from einops import rearrange
from torch import Tensor

from gralora.config import GraloraConfig
from gralora.files.own import AdapterFile, layer_keys, layer_tensors
from gralora.layers.class_change import join
from gralora.model.state import adapter_keys

FUSED = ("gate_up_proj", "down_proj")
"""The parameters of fused experts as transformers names and orders them."""

APART = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)")


class Wrapped(NamedTuple):
    """One parameter of fused experts in PEFT's keys: where its pair stands, and which it is."""

    path: str
    parameter: str


def is_experts(file: AdapterFile, name: str) -> bool:
    grouped = (
        name in file.base and file.base[name].kind == "convolution"
    )  # groups lie on a leading axis as well
    return layer_tensors(file, name)[0].dim() > 3 and not grouped


def refuse_experts(file: AdapterFile, what: str) -> None:
    """Raise ValueError if some adapter is one of fused experts, whose tensors have an axis more."""
    for name in file.configs:
        if is_experts(file, name):
            raise ValueError(
                f"{name!r} holds adapters of fused experts, which {what} can't express."
                ' format="lora" can, and "gralora".'
            )


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
    last = [name.rpartition(".")[2] for name in names]
    return (
        sorted(names, key=lambda name: FUSED.index(name.rpartition(".")[2]))
        if set(last) <= set(FUSED)
        else names
    )


def stacked(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(experts, R, in), (experts, out, R) -> PEFT's (experts · R, in), (out, R · experts)."""
    return (
        rearrange(down, "e r i -> (e r) i").contiguous(),
        rearrange(up, "e o r -> o (r e)").contiguous(),
    )


def unstacked(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The reverse of `stacked`."""
    return rearrange(down, "(e r) i -> e r i", r=rank), rearrange(up, "o (r e) -> e o r", r=rank)


def apart(file: AdapterFile) -> AdapterFile:
    """A file with k = 1 in which every expert has pairs of its own, gate and up each one, under a
    checkpoint's names.
    """
    configs, tensors, base = dict(file.configs), dict(file.tensors), dict(file.base)
    for name in [name for name in file.configs if is_experts(file, name)]:
        module, _, parameter = name.rpartition(".")
        known = base.pop(name, None)
        if parameter == FUSED[0] and known is not None and known.fan_in_fan_out:
            raise ValueError(
                f"{name!r} is stored (in, out), where gate and up may lie interleaved: its experts"
                " can't be written one by one. Servers take such a model's as experts=\"fused\"."
            )
        A, B, _, _ = layer_tensors(file, name)
        config = configs.pop(name)
        for key in layer_keys(name, config):
            del tensors[key]
        for expert, (down, up) in enumerate(zip(A, B, strict=True)):
            halves = up.chunk(2, -1) if parameter == FUSED[0] else [up]
            parts = ("gate_proj", "up_proj") if parameter == FUSED[0] else (parameter,)
            for part, own in zip(parts, halves, strict=True):
                path = f"{module}.{expert}.{part}"
                configs[path] = config
                tensors.update(adapter_keys(path, {"A": down.contiguous(), "B": own.contiguous()}))
    return dataclasses.replace(file, configs=configs, tensors=tensors, base=base)


def together(file: AdapterFile, known: Collection[str]) -> None:
    """The reverse of `apart`, in place, for a model (names in `known`) that has its experts in one
    parameter.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in file.configs:
        match = APART.fullmatch(name)
        if match and name not in known and join(match["module"], FUSED[1]) in known:
            found.setdefault(match["module"], {}).setdefault(match["part"], {})[
                int(match["expert"])
            ] = name
    for module, parts in found.items():
        if "down_proj" in parts:
            _fuse(file, join(module, FUSED[1]), [parts["down_proj"]])
        halves = [parts[part] for part in ("gate_proj", "up_proj") if part in parts]
        if len(halves) == 2 and halves[0].keys() == halves[1].keys():
            _fuse(file, join(module, FUSED[0]), halves)


def _fuse(file: AdapterFile, name: str, parts: list[dict[int, str]]) -> None:
    """One adapter of fused experts out of those of each; the parts' outputs one behind the
    other.
    """
    if any(sorted(part) != list(range(len(part))) for part in parts):
        return  # some expert has none: the error names those that the model lacks
    pairs = []
    for expert in range(len(parts[0])):
        names = [part[expert] for part in parts]
        downs, ups = zip(*(layer_tensors(file, own)[:2] for own in names), strict=True)
        ups = tuple(up * file.configs[own].scaling for own, up in zip(names, ups, strict=True))
        if all(torch.equal(downs[0], down) for down in downs):
            pairs.append((downs[0], torch.cat(ups, -1)))
        else:  # each part keeps ranks of its own
            blocks: Tensor = torch.block_diag(*(up[0] for up in ups))  # type: ignore[no-untyped-call]
            pairs.append((torch.cat(downs, -1), blocks[None]))
    rank = max(down.shape[-1] for down, _ in pairs)
    dropout = file.configs[parts[0][0]].gralora_dropout
    for own in [own for part in parts for own in part.values()]:
        for key in layer_keys(own, file.configs.pop(own)):
            del file.tensors[key]
    A = torch.stack([_padded(down, rank, -1) for down, _ in pairs])
    B = torch.stack([_padded(up, rank, -2) for _, up in pairs])
    file.configs[name] = GraloraConfig(r=rank, alpha=rank, gralora_k=1, gralora_dropout=dropout)
    file.tensors.update(adapter_keys(name, {"A": A, "B": B}))


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)
