"""What an optimiser takes: the trained parameters in groups, each with a rate of its own."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from gralora.layers.base import gralora_layers
from gralora.model.control import adapter_parameters
from gralora.model.saved import saved_modules
from gralora.model.tokens import TokenRows


def adapter_parameter_groups(
    model: nn.Module, lr: float, *, b_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters that are trained now, as groups for any optimiser of PyTorch's form.

    B's rate is `b_ratio` times A's (LoRA+, arXiv 2402.12354). Weight decay falls on neither biases,
    nor norms of saved modules, nor rows of tokens.

    Args:
        lr: of A, and of what is trained beside the adapters.
        b_ratio: LoRA+'s λ. 1 is plain training; its authors advise 16 for LoRA, with an `lr` that
            is lowered.
        weight_decay: of the weights.

    Returns:
        dicts with "name" ("A", "B", "saved", "undecayed"; those that are not empty), "params", "lr"
        and "weight_decay".

    Raises:
        ValueError: a number is out of range, or nothing is trained.
    """
    for name, value, least in (
        ("lr", lr, 0),
        ("b_ratio", b_ratio, None),
        ("weight_decay", weight_decay, 0),
    ):
        legal = (
            isinstance(value, (int, float))
            and math.isfinite(value)
            and (value > 0 if least is None else value >= 0)
        )
        if not legal or isinstance(value, bool):
            rule = "a finite number above 0" if least is None else "a finite number of at least 0"
            raise ValueError(f"{name}={value!r} is not legal: it must be {rule}.")
    adapters = [
        a
        for _, layer in gralora_layers(model)
        for a in map(layer.gralora_adapters.__getitem__, layer.gralora_adapters)
    ]
    down = {id(p) for a in adapters for p in (a.A, a.A_general)}
    up = {id(p) for a in adapters for p in (a.B, a.B_general)}
    undecayed = {id(a.bias) for a in adapters}
    for _, saved in saved_modules(model):
        for copy in saved.gralora_saved.children():
            rows = isinstance(copy, TokenRows)
            undecayed |= {id(p) for p in copy.parameters() if rows or p.dim() < 2}  # biases, norms
    names = ("A", "B", "undecayed", "saved")
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for parameter in adapter_parameters(model):
        if parameter.requires_grad:
            where = [id(parameter) in known for known in (down, up, undecayed)]
            groups[names[where.index(True) if any(where) else 3]].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            "no adapter of this model is trained: set_adapter(model, name) makes one active, and"
            " trains it."
        )
    rates = {"B": lr * b_ratio}
    decays = {"undecayed": 0.0}
    return [
        {
            "name": name,
            "params": own,
            "lr": rates.get(name, lr),
            "weight_decay": decays.get(name, weight_decay),
        }
        for name, own in groups.items()
        if own
    ]
