"""The modules of a model under the names that they have in the plain one, whatever wraps it.

In the order of `nn.Module.named_modules`, in a fraction of its time: whole models are walked often.
Wrappers that hold a module as a child (`DistributedDataParallel`, FSDP1, `torch.compile`,
`checkpoint_wrapper`) add nothing to its names.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPED = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
"""Names under which wrappers keep the module that they wrap."""


def modules(model: nn.Module) -> list[nn.Module]:
    """Every module of `model`, itself first, each once."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                waiting.extend(
                    [child for child in reversed(module._modules.values()) if child is not None]
                )
    return list(found.values())


def named_modules(
    model: nn.Module, stop_at: tuple[type[nn.Module], ...] = ()
) -> list[tuple[str, nn.Module]]:
    """(qualified name, module) of every module of `model`, itself first under "", each once under
    its first name.

    Args:
        stop_at: classes of modules whose children are left out.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    waiting = [("", model)]
    while waiting:
        name, module = entry = waiting.pop()
        if id(module) not in found:
            found[id(module)] = entry
            if module._modules and not isinstance(module, stop_at):
                waiting.extend(children(name, module))
    return list(found.values())


def all_named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same without the wrappers, each under every name that leads to it."""
    waiting = [("", model)]
    while waiting:
        name, module = entry = waiting.pop()
        if not _wraps(module):
            yield entry
        waiting.extend(children(name, module))


def children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The last first."""
    prefix = f"{name}." if name else ""
    children = reversed(module._modules.items())
    return [
        (name if key in WRAPPED or (key == "module" and _wraps(module)) else prefix + key, child)
        for key, child in children
        if child is not None
    ]


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The child of that name; asked so that a scripted module can be asked, whose registers are no
    dicts.
    """
    return module._modules[name] if name in module._modules else None  # noqa: SIM401


def _wraps(module: nn.Module) -> bool:
    return isinstance(module, (DataParallel, DistributedDataParallel)) or any(
        key in module._modules for key in WRAPPED
    )
