"""The modules of a model, in the order of `nn.Module.named_modules`, in a fraction of its time: whole models are walked often."""

from __future__ import annotations

from torch import nn


def modules(model: nn.Module) -> list[nn.Module]:
    """Every module of `model`, itself first, each once."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                waiting.extend([child for child in reversed(module._modules.values()) if child is not None])
    return list(found.values())


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(qualified name, module) of every module of `model`, itself first under "", each once under its first name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    waiting = [("", model)]
    while waiting:
        name, module = entry = waiting.pop()
        if id(module) not in found:
            found[id(module)] = entry
            if module._modules:
                prefix = f"{name}." if name else ""
                children = reversed(module._modules.items())
                waiting.extend([(prefix + key, child) for key, child in children if child is not None])
    return list(found.values())
