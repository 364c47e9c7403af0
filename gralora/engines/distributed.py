"""What PyTorch's own distributed engines need of adapters.

`DistributedDataParallel` and `fully_shard` take parameters as they find them, so adapters must be
there before. Under `parallelize_module` a weight is a tensor spread over processes (a `DTensor`),
and its adapters are spread to fit: where the number of processes divides k, each process holds
whole blocks, and the adapter adds no communication of its own.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gralora.engines.walk import modules, named_modules
from gralora.maths import functional


def is_spread(tensor: object) -> bool:
    """Whether a tensor is spread over processes."""
    module = sys.modules.get(
        "torch.distributed.tensor"
    )  # where it has not been imported, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def layout(tensor: Tensor | None) -> object:
    """How a tensor is spread, for comparison; None if it is not."""
    return (
        (cast(Any, tensor).device_mesh, cast(Any, tensor).placements) if is_spread(tensor) else None
    )


def whole(tensor: Tensor) -> Tensor:
    """The plain tensor, gathered from all processes if it is spread; all of them must call."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_spread(tensor) else tensor


def copy_into(own: Tensor, values: Tensor) -> None:
    """own.copy_(values), of values that every process has whole; where `own` is spread, rank 0's
    count.
    """
    if is_spread(own) and not is_spread(values):
        from torch.distributed.tensor import distribute_tensor

        spread = cast(Any, own)
        values = distribute_tensor(
            values.to(own.device, own.dtype), spread.device_mesh, spread.placements
        )
    own.copy_(values)


def spread_like(
    weight: Tensor, transposed: bool, k: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter, by name, spread so that each process has what its share of
    `weight` needs.

    Args:
        weight: spread, of shape (out, in), or (in, out) if `transposed`.
    """
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

    mesh = cast(DTensor, weight).device_mesh
    chosen: dict[str, list[Placement]] = {name: [] for name in tensors}
    shares = {"in": 1, "out": 1}
    for index, placement in enumerate(cast(DTensor, weight).placements):
        axes: dict[str, int] = {}
        if placement.is_shard():
            side = "out" if (cast(Any, placement).dim == 1) == transposed else "in"
            shares[side] *= mesh.size(index)
            blocks = (
                _AXES[side] if k % shares[side] == 0 else _AXES_OF_ONE_BLOCK[side] if k == 1 else {}
            )
            axes = {**blocks, **_AXES_OF_GENERAL[side]} if blocks else {}
        for name in tensors:
            chosen[name].append(Shard(axes[name]) if name in axes else Replicate())
    return {name: distribute_tensor(tensor, mesh, chosen[name]) for name, tensor in tensors.items()}


# along which axis a tensor of the adapter is cut where the weight is cut along its inputs or its
# outputs
_AXES = {"in": {"A": 0, "B": 1}, "out": {"A": 2, "B": 0}}
_AXES_OF_ONE_BLOCK = {"in": {"A": 1}, "out": {"B": 2}}
_AXES_OF_GENERAL = {"in": {"A_general": 1}, "out": {"B_general": 0}}


def spread_update(
    x: Tensor, tensors: Sequence[Tensor | None], scaling: float, dropout: float
) -> Tensor:
    """`functional.gralora_update` of spread tensors, placed by `spread_like`: each process computes
    its own blocks.

    The result is placed as the base's is: a share of the outputs where the weight is cut along
    them, and a summand of all outputs where it is cut along its inputs.
    """
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    A, B, A_general, B_general = (cast(DTensor | None, tensor) for tensor in tensors)
    assert A is not None and B is not None
    mesh, last = A.device_mesh, x.dim() - 1
    if not is_spread(x):
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    given, wanted, results = cast(DTensor, x).placements, list[Placement](), list[Placement]()
    for now, a, b in zip(given, A.placements, B.placements):
        if b.is_shard(1) or a.is_shard(1):  # cut along the inputs
            wanted.append(Shard(last))
            results.append(Partial())
        elif b.is_shard():
            wanted.append(Replicate())
            results.append(Shard(last))
        else:  # each process does the same, or the same for its own tokens
            wanted.append(Replicate() if now.is_partial() or now.is_shard(last) else now)
            results.append(wanted[-1])
    x = cast(DTensor, x).redistribute(placements=wanted)

    def local(tensor: Tensor) -> Tensor:
        """This process's part; what all of them have whole gets a share of its gradient from
        each.
        """
        spread = cast(DTensor, tensor)
        placements = zip(spread.placements, wanted, results)
        shared = [
            Partial() if p.is_replicate() and not (w.is_replicate() and r.is_replicate()) else p
            for p, w, r in placements
        ]
        return spread.redistribute(placements=spread.placements).to_local(grad_placements=shared)

    y = functional.gralora_update(
        local(functional.dropped(x, dropout)), local(A), local(B), scaling=scaling
    )
    if A_general is not None and B_general is not None:
        dropped = local(functional.dropped(x, dropout))
        y = y + F.linear(F.linear(dropped, local(A_general)), local(B_general)) * scaling
    return DTensor.from_local(y, mesh, results, run_check=False)


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError if an engine has taken the parameters of `model` already: it would pass over
    new ones.
    """
    for name, module in named_modules(model):
        engine = engine_of(module)
        if engine is not None:
            raise ValueError(
                f"{name or 'the model'!r} is under {engine} already, which would not see the"
                f" gradients of a new adapter. First inject (or load_adapter), then {engine}."
                " Values of an adapter that is there can be loaded at any time."
            )


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if an engine holds parameters of `model` in pieces that only it can put
    together.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for _, module in named_modules(model):
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            if module.training_state.name != "SUMMON_FULL_PARAMS":
                raise ValueError(
                    "the model is under FullyShardedDataParallel, which has flattened its"
                    " parameters. Do this within `with"
                    " FullyShardedDataParallel.summon_full_params(model):`."
                )


@contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Within it those of `tensors` that DeepSpeed ZeRO-3 keeps in pieces are whole, and whether
    there are any.
    """
    pieces = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not pieces:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces):
        yield True


def reshard(model: nn.Module) -> None:
    """Leave nothing of a model under `fully_shard` unsharded, as a forward without a backward does.

    What is read from an unsharded parameter, or set on it, is lost with it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in modules(model):
            if isinstance(module, fsdp.FSDPModule):
                cast(Any, module).reshard()


@contextmanager
def no_more_trained(model: nn.Module) -> Iterator[None]:
    """Raise ValueError if within the block a parameter begins to be trained whose gradients an
    engine would not see.
    """
    wrapped = any(isinstance(module, DistributedDataParallel) for module in modules(model))
    frozen = (
        [parameter for parameter in model.parameters() if not parameter.requires_grad]
        if wrapped
        else []
    )
    yield
    if any(parameter.requires_grad for parameter in frozen):
        raise ValueError(
            "the model is under DistributedDataParallel, which would not see the gradients of"
            " parameters that were frozen when it was made. Set the adapter in the module itself,"
            " then wrap it anew."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within `DistributedDataParallel`, which minds forwards without a backward."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same on each of them; in a group all must call."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def write_once(write: Callable[[], None], *, together: bool) -> None:
    """Run `write` on rank 0 alone.

    Args:
        together: all processes are here: they wait until it is written, and where it fails, all of
            them raise.
    """
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not grouped or torch.distributed.get_rank() == 0
    if not grouped or not together:
        if first:
            write()
        return
    failure: list[Exception | None] = [None]
    if first:
        try:
            write()
        except Exception as error:
            failure[0] = _portable(error)
    torch.distributed.broadcast_object_list(failure)
    # gloo frees a collective's tensors on a thread of its own, which aborts where the interpreter
    # is ending (pytorch issue 190489): a script that ends with the save shall have one more round
    # trip for that
    torch.distributed.barrier()
    if failure[0] is not None:
        raise failure[0]


def _portable(error: Exception) -> Exception:
    """The error, or one with its text where it can't be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return OSError(f"{type(error).__name__}: {error}")
    return error


def engine_of(module: nn.Module) -> str | None:
    """The engine that a module is, which has taken the parameters beneath it; None if it is
    none.
    """
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        return "FullyShardedDataParallel"
    return "fully_shard" if fsdp is not None and isinstance(module, fsdp.FSDPModule) else None
