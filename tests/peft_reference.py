"""The real `peft`, with the tensors of a gralora model copied in."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.gralora.layer import GraloraLayer as PeftLayer
from torch import nn

from gralora import GraloraConfig
from gralora.layers.base import gralora_layers


def peft_config(config: GraloraConfig, targets: list[str] | str) -> peft.GraloraConfig:
    known = {f.name for f in dataclasses.fields(peft.GraloraConfig)}
    fields = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in known
    }
    fields["fan_in_fan_out"] = False
    if fields["modules_to_save"]:
        fields["modules_to_save"] = list(fields["modules_to_save"])
    return peft.GraloraConfig(**{**fields, "target_modules": targets})


def peft_model(base: nn.Module, config: GraloraConfig, targets: list[str] | str) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of Conv1D's layout
        return peft.get_peft_model(copy.deepcopy(base), peft_config(config, targets))


def peft_layers(model: nn.Module) -> dict[str, PeftLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PeftLayer)
    }


def peft_tensors(layer: PeftLayer) -> list[torch.Tensor]:
    tensors = [layer.gralora_A["default"], layer.gralora_B["default"]]
    if layer.hybrid_r["default"]:
        tensors += [
            layer.gralora_A_general["default"].weight,
            layer.gralora_B_general["default"].weight,
        ]
    return tensors


def our_tensors(layer: nn.Module) -> list[torch.Tensor]:
    return [t for t in layer.gralora_adapters["default"].tensors if t is not None]


def pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(our tensor, their tensor) for every adapter tensor of the two models."""
    layers, reference = dict(gralora_layers(ours)), peft_layers(theirs)
    assert list(layers) == list(reference)
    return [
        pair
        for name in layers
        for pair in zip(our_tensors(layers[name]), peft_tensors(reference[name]), strict=True)
    ]


def copy_to_peft(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            other.copy_(mine)


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without PEFT's warnings, of Conv1D's layout and of tied weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """A copy of `base` with the adapter in `folder`, as PEFT loads it."""
    model: nn.Module = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(base), folder)
    return model.eval()
