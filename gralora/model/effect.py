"""Whether every adapter that should act does: tried, not read off the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gralora.engines.walk import modules
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import gralora_layers
from gralora.model.index import known_adapters, missing, replaced_since_inject


def check_effect(
    model: nn.Module, *args: Any, forward: Callable[..., Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """Run one forward and backward, and raise if an active adapter was not used, got no gradient,
    or changes nothing.

    Some adapters are dead for reasons that no look at the model shows: a layer that was superseded
    at run time, one behind a branch that is not taken, one whose weight a loss reads outside of any
    forward. Call this once before a training. The model, its gradients, its buffers and the random
    state are as before.

    Args:
        args, kwargs: of the model's forward: a small batch, as training has it.
        forward: called with them instead of the model, where what is trained is more than its
            forward, as a loss that reads the head's weight.

    Returns:
        the norm of the gradient that each adapted layer's active adapters got, by layer.

    Raises:
        ValueError: names every adapter without an effect on this batch, and what was seen. Or: no
            adapter is active.
    """
    active = [
        (path, name, layer.gralora_adapters[name])
        for path, layer in gralora_layers(model)
        for name in layer.gralora_adapters.active
        if name not in layer.gralora_adapters.merged
    ]
    if not active:
        known = ", ".join(known_adapters(model)) or "none"
        raise ValueError(
            "no adapter acts beside the weights of this model, so there is nothing to check; it"
            f" has: {known}."
        )
    gone = missing(model, known_adapters(model))
    if gone:
        raise ValueError(replaced_since_inject(gone))
    parameters = [p for _, _, adapter in active for p in adapter.parameters()]
    run = model if forward is None else forward
    with _untouched(model, parameters):
        out = list(_tensors(_again(run, args, kwargs)))
        found = (
            torch.autograd.grad(_loss(out), parameters, allow_unused=True)
            if _differentiable(out)
            else ()
        )
        gradients = {
            id(p): None if g is None else float(g.norm())
            for p, g in zip(parameters, found, strict=bool(found))
        }
        norms: dict[str, float] = {}
        problems = []
        for path, name, adapter in active:
            own = [gradients.get(id(p)) for p in adapter.parameters()]
            norms[path] = norms.get(path, 0.0) + sum(norm or 0.0 for norm in own)
            if not any(own):
                used = any(norm is not None for norm in own)
                problems.append(
                    f"{name!r} on {path!r} {_seen(run, args, kwargs, out, adapter, used)}"
                )
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(active)} adapters have no effect on this batch, or get no"
            " gradient:\n"
            + "\n".join(problems)
            + "\nLeave such layers out with exclude_modules, or see to it that the forward calls"
            " them or reads their weight."
        )
    return norms


def _seen(
    run: Callable[..., Any],
    args: Any,
    kwargs: Any,
    out: list[Tensor],
    adapter: GraloraAdapter,
    used: bool,
) -> str:
    """What is wrong with an adapter that got no gradient: what does the output do when its values
    change?
    """
    with torch.no_grad():
        noise = _distance(out, list(_tensors(_again(run, args, kwargs))))
        values = [parameter.clone() for parameter in adapter.parameters()]
        generator = torch.Generator().manual_seed(0)
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
        try:
            moved = _distance(out, list(_tensors(_again(run, args, kwargs))))
        finally:
            for parameter, value in zip(adapter.parameters(), values, strict=True):
                parameter.copy_(value)
    if moved > noise:
        return (
            "changes the output, but gets no gradient (its layer runs without gradients, or its"
            " output is detached)."
        )
    return "was used, but changes nothing when its values change." if used else "was not used."


def _again(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with torch.random.fork_rng(), torch.set_grad_enabled(torch.is_grad_enabled()):
        torch.manual_seed(0)
        return run(*args, **kwargs)


def _tensors(out: Any) -> Iterator[Tensor]:
    """The floating tensors in what a model returns; its loss alone, where it names one."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
        return
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        yield loss
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors(value)


def _differentiable(out: list[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in out)


def _loss(out: list[Tensor]) -> Tensor:
    """A number that depends on every entry in a way of its own: sums are often constant, as behind
    a norm or a softmax.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [
        t.float() * torch.randn(t.shape, generator=generator).to(t.device)
        for t in out
        if t.requires_grad
    ]
    return torch.stack([part.sum() for part in parts]).sum()


def _distance(out: list[Tensor], other: list[Tensor]) -> float:
    same = [
        (a.detach(), b.detach()) for a, b in zip(out, other, strict=False) if a.shape == b.shape
    ]
    return max((float((a - b).abs().max()) for a, b in same if a.numel()), default=0.0)


@contextmanager
def _untouched(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients on for `parameters`, and afterwards everything as before."""
    trained = [(parameter, parameter.requires_grad) for parameter in parameters]
    buffers = [
        (buffer, buffer.clone())
        for m in modules(model)
        for buffer in m._buffers.values()
        if buffer is not None
    ]
    try:
        with torch.enable_grad():
            for parameter, _ in trained:
                parameter.requires_grad_(True)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
