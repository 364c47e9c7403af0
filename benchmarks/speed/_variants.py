"""The same base model, adapted by this library, by PEFT and by loralib."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator

import loralib
import peft
import torch
from torch import nn

import gralora
from gralora.maths import autograd

OURS, PLAIN = "gralora", "gralora, plain path"
PEFT_GRALORA, PEFT_LORA, LORALIB, FROZEN = (
    "GraLoRA (PEFT)",
    "LoRA (PEFT)",
    "LoRA (loralib)",
    "frozen",
)


def build(
    base: nn.Module,
    targets: list[str] | str,
    r: int,
    k: int,
    dropout: float = 0.0,
    names: tuple[str, ...] = (),
) -> dict[str, nn.Module]:
    """Copies of `base` under the names asked for; all but `FROZEN` adapted, with random values
    where B would be zero.
    """
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        FROZEN: lambda m: m.requires_grad_(False),
        OURS: lambda m: gralora.inject(
            m, targets, gralora.GraloraConfig(r=r, gralora_k=k, gralora_dropout=dropout)
        ),
        PEFT_GRALORA: lambda m: (
            peft.get_peft_model(
                m,
                peft.GraloraConfig(
                    r=r, gralora_k=k, gralora_dropout=dropout, target_modules=targets
                ),
            ).base_model.model
        ),
        PEFT_LORA: lambda m: (
            peft.get_peft_model(
                m, peft.LoraConfig(r=r, lora_alpha=64, lora_dropout=dropout, target_modules=targets)
            ).base_model.model
        ),
        LORALIB: lambda m: _loralib(m, r),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: makers[name](copy.deepcopy(base)) for name in names}


@contextlib.contextmanager
def plain_path() -> Iterator[None]:
    """Switch the fast path off."""
    real = autograd.usable
    autograd.usable = lambda x, A: False
    try:
        yield
    finally:
        autograd.usable = real


def training_step(
    model: nn.Module, x: torch.Tensor, grad: torch.Tensor, plain: bool = False
) -> Callable[[], None]:
    """Forward and backward, gradients set aside first."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        with plain_path() if plain else contextlib.nullcontext():
            model(x).backward(grad)

    return step


def _loralib(model: nn.Module, r: int) -> nn.Module:
    (name, linear), *_ = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
    layer = loralib.Linear(linear.in_features, linear.out_features, r=r, lora_alpha=64)
    layer.load_state_dict(linear.state_dict(), strict=False)
    layer.bias.requires_grad_(False)
    setattr(model, name, layer)
    return model
