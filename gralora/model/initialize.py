"""Starts out of data: A from what its layer gets, or from what the loss asks of its weight."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from gralora.config import STARTS_FROM_DATA, GraloraConfig
from gralora.engines.distributed import check_unwrapped, check_whole, is_spread, summed, unwrapped
from gralora.engines.walk import modules
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import GraloraLayer, gralora_layers
from gralora.layers.scope import Only, switched
from gralora.maths import starts
from gralora.model.state import all_or_nothing, check_known, check_unmerged
from gralora.model.targets import shorten

RHO = 2
"""How much larger than before a rank may become where ranks are redistributed; EVA's own default.
"""


@dataclass
class _Place:
    """One adapter that is to start anew, and what was seen of its data: Σ xᵀ x, or the gradient of
    its layer's weight.
    """

    path: str
    adapter: GraloraAdapter
    layers: list[GraloraLayer]  # that share it
    total: Tensor | None = None

    @property
    def layer(self) -> GraloraLayer:
        return self.layers[0]

    @property
    def config(self) -> GraloraConfig:
        return self.adapter.config

    def add(self, tensor: Tensor) -> None:
        self.total = tensor if self.total is None else self.total.add_(tensor)


class _Start(NamedTuple):
    """What an adapter gets."""

    config: GraloraConfig
    directions: Tensor
    general: Tensor | None


def initialize(
    model: nn.Module,
    method: str,
    batches: Iterable[Any],
    *,
    adapter_name: str = "default",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    redistribute: bool = False,
) -> None:
    """Give A of an adapter a start out of data; B stays zero, so that the model computes what it
    did. Call it before training.

    "eva" (after arXiv 2410.07170): block (i, j) begins with the leading right singular vectors of
    what input block i gets: the directions that hold most of it. Σ xᵀ x is kept for each layer, in²
    / k numbers of float64, and no activations. "gradient" (after LoRA-GA, arXiv 2407.05000): with
    the leading right singular vectors of that block of the gradient of the weight, so that the
    first step of B is the part of the full gradient nearest to it. Kept for each layer: the
    gradient.

    The directions are orthonormal; where there are fewer than the rank asks for, the rest of A
    stays as it is. What moves a part of the base into the adapter, as LoRA-GA itself, PiSSA, OLoRA
    and MiLoRA do, is left out on purpose: the base is never changed. The model runs in eval mode.
    In a process group every process calls, with data of its own.

    Args:
        batches: mappings are given to the model as keywords, tuples and lists as arguments, all
            else as the one argument.
        forward: called as forward(model, batch) instead; for "gradient" it returns the loss.
            Without it the loss is what the model returns, a number, or names `loss`.
        redistribute: for "eva": give ranks, r / k at a time, to the layers where a further
            direction holds the largest share of what the layer gets, with at most as many
            parameters as before, and no rank more than doubled. Scalings stay. The parameters are
            then new: make the optimiser afterwards.

    Raises:
        KeyError: no such adapter. ValueError: no such method; the adapter is merged, was trained,
            or is spread over processes; no batches; they don't reach a layer, or give it no
            gradient. The model is then unchanged.
    """
    if method not in STARTS_FROM_DATA:
        legal = ", ".join(map(repr, STARTS_FROM_DATA))
        raise ValueError(
            f"method={method!r} is not known; there are: {legal}. Others are set by"
            " GraloraConfig(init_weights=...)."
        )
    if redistribute and method != "eva":
        raise ValueError(
            f'redistribute is for "eva", which knows what each direction holds; {method!r} does'
            " not."
        )
    if batches is None or isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"method {method!r} needs data: batches must be an iterable of batches, such as a"
            " DataLoader."
        )
    places = _places(model, adapter_name)
    if redistribute:
        check_unwrapped(model)
    count = _watch(unwrapped(model), method, batches, places, adapter_name, forward)
    totals = [_total(method, place) for place in places]
    if not summed(torch.tensor(float(count), device=totals[0].device)):
        raise ValueError("batches is empty: there is nothing to start from.")
    for place, total in zip(places, totals, strict=True):
        place.total = summed(total)  # every process has the same, so each of them fails or none
    _check_seen(method, places)
    ranks = _redistributed(places) if redistribute else [place.config.r for place in places]
    found = [_start(method, place, r) for place, r in zip(places, ranks, strict=True)]
    with all_or_nothing(model), torch.no_grad():
        for place, start in zip(places, found, strict=True):
            _give(place, start, adapter_name)


def _places(model: nn.Module, name: str) -> list[_Place]:
    """The adapters to start anew, once each; what can't be is refused, or left as it is with a
    warning.
    """
    check_known(model, name)
    check_unmerged(model, name)
    check_whole(model)
    found: dict[int, _Place] = {}
    for path, layer in gralora_layers(model):
        if name in layer.gralora_adapters:
            adapter = layer.gralora_adapters[name]
            found.setdefault(id(adapter), _Place(path, adapter, [])).layers.append(layer)
    places = [place for place in found.values() if all(each.map.has_rows for each in place.layers)]
    for place in places:
        A, B, B_general = place.adapter.A, place.adapter.B, place.adapter.B_general
        if is_spread(A) or hasattr(A, "ds_id"):
            raise ValueError(
                f"the adapter of {place.path!r} is spread over processes: initialize first, then"
                " shard."
            )
        if A.is_meta:
            raise ValueError(
                f"the adapter of {place.path!r} is on the meta device, or offloaded: nothing to"
                " start."
            )
        place.adapter.check_values()
        if B.any() or (B_general is not None and B_general.any()):
            raise ValueError(
                f"adapter {name!r} is not at its start: B of {place.path!r} is not zero. Inject it"
                " anew."
            )
    if not places:
        raise ValueError(
            f"adapter {name!r} is on no layer whose inputs are rows of a matrix product: nothing to"
            " start."
        )
    rest = [place.path for place in found.values() if place not in places]
    if rest:
        warnings.warn(
            f"{len(rest)} of {len(found)} layers start as they were: {shorten(rest)}. What they get"
            " are no rows of a matrix product (fused experts, embeddings, grouped and transposed"
            " convolutions).",
            UserWarning,
            stacklevel=3,
        )
    return places


def _watch(
    model: nn.Module,
    method: str,
    batches: Iterable[Any],
    places: list[_Place],
    name: str,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> int:
    """Run the model on every batch, while the places add up what they see; returns how many there
    were.
    """
    probes: list[tuple[_Place, Tensor, Tensor]] = []

    def hook(place: _Place) -> Callable[..., Tensor | None]:
        def see(adapter: nn.Module, args: tuple[Any, ...], update: Tensor) -> Tensor | None:
            x = args[0].detach()
            if method == "eva":
                rows = place.layer.rows(x, update)[0]
                blocks = 1 if place.config.hybrid_r else place.config.gralora_k
                place.add(starts.gram_of_blocks(_exactly(rows), blocks))
                return None
            if not torch.is_grad_enabled():
                return None
            probe = torch.zeros_like(update).requires_grad_()
            probes.append((place, x, probe))
            return update + probe

        return see

    count = 0
    hooks = [place.adapter.register_forward_hook(hook(place)) for place in places]
    try:
        containers = [layer.gralora_adapters for _, layer in gralora_layers(model)]
        with (
            _evaluating(model),
            switched(containers, Only(name)),
            torch.compiler.set_stance("force_eager"),
        ):
            for batch in batches:
                count += 1
                with torch.set_grad_enabled(method == "gradient"):
                    out = _run(model, batch) if forward is None else forward(model, batch)
                if method == "gradient":
                    _add_gradients(_loss(out), probes)
                    probes.clear()
    finally:
        for handle in hooks:
            handle.remove()
    return count


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss(out: Any) -> Tensor:
    loss = (
        out
        if isinstance(out, Tensor)
        else out.get("loss")
        if isinstance(out, Mapping)
        else getattr(out, "loss", None)
    )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            "the model returns no loss for these batches: a number, or something with a `loss`."
            " Give the labels with the batch, or forward=lambda model, batch: loss."
        )
    if not loss.requires_grad:
        raise ValueError(
            "these batches give no gradient: the loss does not depend on any adapted layer."
        )
    return loss


def _add_gradients(loss: Tensor, probes: list[tuple[_Place, Tensor, Tensor]]) -> None:
    found = (
        torch.autograd.grad(loss.sum(), [probe for *_, probe in probes], allow_unused=True)
        if probes
        else ()
    )
    for (place, x, _), gradient in zip(probes, found, strict=True):
        if gradient is not None:
            dtype = _wide(place.adapter.A.dtype)
            rows, outputs = (tensor.to(dtype) for tensor in place.layer.rows(x, gradient))
            place.add(outputs.t() @ rows)


def _exactly(rows: Tensor) -> Tensor:
    return rows.to(
        torch.float32 if rows.device.type == "mps" else torch.float64
    )  # which has no float64


def _total(method: str, place: _Place) -> Tensor:
    """What a place has added up, or zeros of that shape: a batch need not reach every layer in
    every process.
    """
    if place.total is not None:
        return place.total
    (n_in, n_out), A = place.layer.map.sizes, place.adapter.A
    blocks = 1 if place.config.hybrid_r else place.config.gralora_k
    shape = (blocks, n_in // blocks, n_in // blocks) if method == "eva" else (n_out, n_in)
    return (
        _exactly(A.new_zeros(shape))
        if method == "eva"
        else A.new_zeros(shape, dtype=_wide(A.dtype))
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_seen(method: str, places: list[_Place]) -> None:
    unseen = [place.path for place in places if place.total is None or not place.total.any()]
    if unseen:
        what = "get no input, or only zeros," if method == "eva" else "get no gradient"
        raise ValueError(
            f"{len(unseen)} of {len(places)} layers {what} from these batches: {shorten(unseen)}."
        )
    broken = [
        place.path
        for place in places
        if place.total is not None and not place.total.isfinite().all()
    ]
    if broken:
        raise ValueError(f"what these batches give is not finite at {shorten(broken)}.")


def _blocks(place: _Place) -> Tensor:
    """Σ xᵀ x of every input block."""
    assert place.total is not None
    k = place.config.gralora_k
    if len(place.total) == k:
        return place.total
    whole = rearrange(place.total[0], "(i m) (h n) -> i h m n", i=k, h=k)
    return torch.stack([whole[i, i] for i in range(k)])


def _start(method: str, place: _Place, r: int) -> _Start:
    assert place.total is not None
    config, general = place.config, None
    k, hybrid_r = config.gralora_k, config.hybrid_r
    if method == "eva":
        directions = starts.leading_directions(_blocks(place), r // k)[0]
        general = starts.leading_directions(place.total, hybrid_r)[0][0] if hybrid_r else None
    else:
        directions = starts.leading_of_blocks(place.total, k, r // k)
        general = starts.leading_of_blocks(place.total, 1, hybrid_r)[0, 0] if hybrid_r else None
    return _Start(
        config if r == config.r else replace(config, r=r).scaled(config.scaling),
        directions,
        general,
    )


def _give(place: _Place, start: _Start, name: str) -> None:
    old = new = place.adapter
    if start.config is not old.config:
        new = place.layer.map.new_adapter(start.config, old.A.dtype)
        new.copy_bias_from(old)
        for parameter in new.parameters():
            parameter.requires_grad_(old.A.requires_grad)
        for layer in place.layers:
            layer.gralora_adapters.add(name, new)
    new.A.copy_(starts.down_from_directions(start.directions, start.config.r, new.A.detach()))
    if start.general is not None and new.A_general is not None:
        new.A_general[: len(start.general)] = start.general.to(new.A_general)


def _redistributed(places: list[_Place]) -> list[int]:
    """A rank for every place: r / k at a time to where a further direction holds the largest share,
    as parameters last.
    """
    ks = [place.config.gralora_k for place in places]
    costs = [k * sum(place.layer.map.sizes) for k, place in zip(ks, places, strict=True)]
    before = [place.config.r // k for k, place in zip(ks, places, strict=True)]
    shares = []
    for place, s in zip(places, before, strict=True):
        gram = _blocks(place)
        values = starts.leading_directions(gram, RHO * s)[1].sum(0)
        shares.append(values / gram.diagonal(dim1=-2, dim2=-1).sum().cpu())
    ranks = [1] * len(places)
    left = sum(cost * s for cost, s in zip(costs, before, strict=True)) - sum(costs)
    queue = [(-float(own[1]), index) for index, own in enumerate(shares) if len(own) > 1]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        if costs[index] > left:
            continue
        left -= costs[index]
        ranks[index] += 1
        if ranks[index] < len(shares[index]):
            heapq.heappush(queue, (-float(shares[index][ranks[index]]), index))
    return [s * k for s, k in zip(ranks, ks, strict=True)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in modules(model)]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
