"""PyTorch's distributed engines on two processes: each must give what one process gives."""

import copy
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gralora
from gralora.engines.distributed import write_once
from gralora.layers.base import gralora_layers

from ..models import everything, gpt2, llama, random_config, relative, same_bits, ten_losses
from ..processes import WORLD

warnings.filterwarnings(
    "ignore", "FSDP2-wrapped module .* returned a view tensor"
)  # so does one of plain layers


class Layers(nn.Module):
    """Two blocks to shard one by one, and a head that is saved whole."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def data(width=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 5, width, generator=generator), torch.randn(8, 5, 4, generator=generator)


def mine(rank, tensor):
    """This process's part of a batch."""
    return tensor.chunk(WORLD)[rank]


def adapted(dtype=None, **config):
    """A model with two adapters, the same on every process; the second is inactive."""
    torch.manual_seed(0)
    model = Layers().to(dtype)
    config = {"modules_to_save": ["head"], "bias": "gralora_only", **config}
    gralora.inject(model, r"blocks\.\d\.[02]", random_config(**config), adapter_name="a")
    gralora.inject(model, ["blocks.0.0"], random_config(gralora_k=4), adapter_name="b")
    return model


def shard(model, mesh, policy=None):
    policy = policy or MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(
        model,
        mesh=mesh,
        mp_policy=replace(policy, output_dtype=torch.float32 if policy.param_dtype else None),
    )


def mean_over_processes(losses):
    total = torch.tensor(losses)
    distributed.all_reduce(total)
    return (total / WORLD).tolist()


def refused(call, *parts):
    with pytest.raises(ValueError, match=".*".join(parts)):
        call()


# DistributedDataParallel


def _ddp(rank):
    model, (x, target) = adapted(), data()
    alone = copy.deepcopy(model)
    nn.functional.mse_loss(alone(x), target).backward()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # a second step raises if a parameter of the first was waited for in vain
        model.zero_grad()
        nn.functional.mse_loss(wrapped(mine(rank, x)), mine(rank, target)).backward()
    grads = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(grads)
    assert len(grads) == 4 * 2 + 4 + 2
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        mean_over_processes(ten_losses(wrapped, mine(rank, x), mine(rank, target))),
        ten_losses(alone, x, target),
        rtol=1e-4,
        atol=0,
    )
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_ddp_gives_the_gradients_of_one_process(processes):
    first, second = processes.run(_ddp)
    assert all(same_bits(first[name], second[name]) for name in first)


def _ddp_refuses(rank):
    model = adapted()
    wrapped = DistributedDataParallel(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    refused(
        lambda: gralora.inject(wrapped, ["blocks.0.0"], adapter_name="c"),
        "under DistributedDataParallel already",
        "First inject",
    )
    refused(
        lambda: gralora.set_adapter(wrapped, "b"), "would not see the gradients", "wrap it anew"
    )
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    gralora.set_adapter(wrapped, "a")
    with gralora.disable_adapter(wrapped):
        wrapped(data()[0])
    gralora.set_adapter(model, "b")
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    x, target = (mine(rank, each) for each in data())
    nn.functional.mse_loss(wrapped(x), target).backward()
    return model.blocks[0][0].gralora_adapters["b"].A.grad


def test_ddp_refuses_what_it_would_pass_over(processes):
    first, second = processes.run(_ddp_refuses)
    assert same_bits(first, second) and first.abs().sum() > 0


def _ddp_initializes(rank, method):
    x, target = data()
    loss = {"forward": lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])}
    alone = adapted(init_weights=True)
    gralora.initialize(
        alone, method, zip(x.chunk(WORLD), target.chunk(WORLD)), adapter_name="a", **loss
    )
    found = []
    for wrap in (False, True):
        model = adapted(init_weights=True)
        wrapped = DistributedDataParallel(model) if wrap else model
        gralora.initialize(
            wrapped, method, [(mine(rank, x), mine(rank, target))], adapter_name="a", **loss
        )
        found.append(gralora.adapter_state_dict(model, "a"))
    expected = gralora.adapter_state_dict(alone, "a")
    for state in found:
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)
    empty = (
        [] if rank else [(x, target)]
    )  # one process without data is no failure, and none fails alone
    gralora.initialize(adapted(init_weights=True), method, empty, adapter_name="a", **loss)
    refused(
        lambda: gralora.initialize(
            adapted(init_weights=True), method, [], adapter_name="a", **loss
        ),
        "batches is empty",
    )
    return found[0]


@pytest.mark.parametrize("method", ["eva", "gradient"])
def test_a_start_out_of_data_is_that_of_all_processes_data(processes, method):
    first, second = processes.run(_ddp_initializes, method)
    assert all(same_bits(first[name], second[name]) for name in first)


def _spread_are_refused(rank):
    mesh, x = init_device_mesh("cpu", (WORLD,)), data()[0]
    sharded = shard(adapted(), mesh)
    refused(
        lambda: gralora.initialize(sharded, "eva", [x], adapter_name="a"),
        "spread over processes: initialize first",
    )
    refused(lambda: gralora.prepare_hotswap(sharded, 8, "a"), "fully_shard")
    parallel = parallelize_module(
        Layers().blocks[0], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    config = random_config(init_weights="loftq")
    refused(
        lambda: gralora.inject(parallel, ["0"], config, reference=Layers().blocks[0]),
        "spread over processes",
    )
    gralora.inject(parallel, ["0", "2"], random_config(init_weights=True))
    refused(lambda: gralora.prepare_hotswap(parallel, 8), "spread over processes")
    refused(
        lambda: gralora.initialize(parallel, "eva", [x]), "spread over processes: initialize first"
    )


def test_starts_and_room_are_refused_where_an_adapter_is_spread(processes):
    processes.run(_spread_are_refused)


def _ddp_saves(rank, folder):
    model = adapted()
    wrapped = DistributedDataParallel(model)
    gralora.save_adapter(wrapped.module, folder / "adapter", "a")
    distributed.barrier()
    assert [path.name for path in folder.iterdir()] == ["adapter"]
    distributed.barrier()
    gralora.save_adapter(wrapped.module, folder / f"rank{rank}", "a")  # and by nobody else
    distributed.barrier()
    return sorted(path.name for path in folder.iterdir())


def test_rank_0_writes(processes, tmp_path):
    assert processes.run(_ddp_saves, tmp_path) == [["adapter", "rank0"]] * WORLD


# fully_shard


@pytest.fixture(params=["float32", "bfloat16 base", "mixed precision"])
def precision(request):
    return request.param


def _fsdp(rank, precision):
    mesh = init_device_mesh("cpu", (WORLD,))
    dtype = torch.bfloat16 if precision == "bfloat16 base" else None
    model = adapted(dtype, bias="none", **({"modules_to_save": None} if dtype else {}))
    alone, (x, target) = copy.deepcopy(model), data()
    x, target = x.to(dtype), target.to(dtype)
    shard(
        model,
        mesh,
        MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if precision == "mixed precision"
        else None,
    )
    assert all(isinstance(p.data, type(model.head.weight.data)) for p in model.parameters())
    for name in ("a", "b"):
        gralora.set_adapter(model, name)
        gralora.set_adapter(alone, name)
        losses = mean_over_processes(ten_losses(model, mine(rank, x), mine(rank, target)))
        expected = ten_losses(alone, x, target)
        assert expected[-1] < 0.95 * expected[0]
        tolerance = 1e-4 if precision == "float32" else 2e-2
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)


def test_fsdp_gives_the_losses_of_one_process(processes, precision):
    processes.run(_fsdp, precision)


def _gathered(model, call):
    """call(), and the sizes of what it gathered."""
    with CommDebugMode() as communication:
        result = call()
    counts = communication.get_comm_counts()
    return result, sum(count for op, count in counts.items() if "all_gather" in str(op))


def _fsdp_files(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    model = adapted()
    alone, (x, target) = copy.deepcopy(model), data()
    shard(model, mesh)
    ten_losses(model, mine(rank, x), mine(rank, target))
    state, gathers = _gathered(model, lambda: gralora.adapter_state_dict(model, "a"))
    assert (gathers, len(state)) == (
        4 * 2 + 2 * 4 + 2,
        4 * 2 + 4 + 2,
    )  # the adapter, the biases with what it adds to them, and its head: nothing else of the base
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert {key: tuple(t.shape) for key, t in state.items()} == {
        key: tuple(t.shape) for key, t in gralora.adapter_state_dict(alone, "a").items()
    }
    for format in ("gralora", "peft", "lora"):
        gralora.save_adapter(model, folder / format, "a", format=format)
        assert (folder / format).exists()  # on every process, at once
    y = model(x)

    fresh = adapted()
    assert relative(fresh(x), y.detach()) > 1e-3
    gralora.load_adapter(fresh, folder / "gralora", "a")
    torch.testing.assert_close(fresh(x), y, rtol=1e-5, atol=1e-6)

    again = adapted()
    shard(again, mesh)
    _, gathers = _gathered(
        again, lambda: gralora.load_adapter(again, folder / "gralora", "a", trainable=True)
    )
    assert gathers == 4  # the biases of the base, to which those of the file are the sum
    torch.testing.assert_close(again(x), y, rtol=1e-5, atol=1e-6)
    # a forward without a backward leaves parameters unsharded; what is set or read now must be the
    # sharded ones
    gralora.load_adapter_state_dict(
        again, {key: torch.zeros_like(t) for key, t in state.items()}, "a"
    )
    assert again(x).abs().max() == 0  # the head is zero
    gralora.load_adapter(again, folder / "gralora", "a", trainable=True)
    again(x)
    assert all(
        type(p.data) is type(again.blocks[0][0].weight.data)
        for p in gralora.adapter_parameters(again, "a")
    )
    gralora.load_adapter_state_dict(alone, state, "a")
    expected = ten_losses(alone, x, target)
    losses = mean_over_processes(ten_losses(again, mine(rank, x), mine(rank, target)))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_fsdp_adapters_are_saved_and_loaded_whole_without_gathering_the_base(processes, tmp_path):
    processes.run(_fsdp_files, tmp_path)


def _fsdp_refuses(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    model, x = adapted(), data()[0]
    alone = copy.deepcopy(model)
    gralora.save_adapter(model, folder / "adapter", "a")
    distributed.barrier()
    shard(model, mesh)
    y = model(x)
    refused(
        lambda: gralora.inject(model, ["blocks.0.0"], adapter_name="c"),
        "the model' is under fully_shard",
        "First inject",
    )
    refused(
        lambda: gralora.load_adapter(model, folder / "adapter", "c"),
        "under fully_shard",
        "First inject",
    )
    refused(lambda: gralora.reblock(model, 1, "a"), "under fully_shard")
    refused(lambda: gralora.combine(model, ["a"], [1.0], "c"), "under fully_shard")
    with pytest.raises(
        TypeError, match=r"blocks\.0\.0.*spread over processes.*Ways out: save_adapter"
    ):
        gralora.merge(model)
    (folder / "a file").touch()
    with pytest.raises(OSError, match="a file"):  # on every process, though rank 0 alone writes
        gralora.save_adapter(model, folder / "a file" / "adapter", "a")
    assert same_bits(model(x), y)
    for name in ("b", "a"):  # biases switch with their adapter
        gralora.set_adapter(model, name)
        gralora.set_adapter(alone, name)
        torch.testing.assert_close(model(x), alone(x))
    with gralora.disable_adapter(model), gralora.disable_adapter(alone):
        torch.testing.assert_close(model(x), alone(x))
    assert same_bits(model(x), y)
    plain = FullyShardedDataParallel(Layers(), device_id=torch.device("cpu"), use_orig_params=True)
    refused(lambda: gralora.inject(plain, [r"blocks.0.0"]), "under FullyShardedDataParallel")


def test_fsdp_refuses_what_it_would_pass_over(processes, tmp_path):
    processes.run(_fsdp_refuses, tmp_path)


def _fsdp_switches(rank, folder):
    """Everything that adapts, trained, switched off and taken out: the base is read in all of
    it.
    """
    torch.manual_seed(0)
    mesh, x = init_device_mesh("cpu", (WORLD,)), torch.randn(4, 5, 16)
    model = everything("none")
    base = copy.deepcopy(model)
    alone = copy.deepcopy(model)
    gralora.unload(base)
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    expected = base(x)
    for names in ("a", {"a": 0.5, "b": 2.0}, "b", "a"):
        gralora.set_adapter(model, names)
        gralora.set_adapter(alone, names)
        torch.testing.assert_close(model(x), alone(x), rtol=1e-4, atol=1e-5)
        assert relative(model(x), expected) > 1e-2
        with gralora.disable_adapter(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    if rank == 0:
        gralora.save_adapter(alone, folder / "a", "a")
    distributed.barrier()
    gralora.load_adapter(model, folder / "a", "a", trainable=True)  # of every kind, into its shards
    torch.testing.assert_close(model(x), alone(x), rtol=1e-4, atol=1e-5)
    for each in (model, alone):
        gralora.delete_adapter(each, "b")
        gralora.set_adapter(each, "a")
    target = torch.zeros(4, 5, 4)
    losses = mean_over_processes(ten_losses(model, mine(rank, x), mine(rank, target)))
    torch.testing.assert_close(losses, ten_losses(alone, x, target), rtol=1e-4, atol=1e-4)
    gralora.unload(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if "gralora" in name]


def test_fsdp_with_every_kind_of_layer_and_a_saved_head(processes, tmp_path):
    processes.run(_fsdp_switches, tmp_path)


def _fsdp_delta(rank):
    model, mesh = adapted(hybrid_r=2), init_device_mesh("cpu", (WORLD,))
    expected = {name: layer.delta_weight("a") for name, layer in gralora_layers(model)}
    lora = gralora.to_lora(model, "a")
    shard(model, mesh)
    for name, layer in gralora_layers(model):
        delta = gralora.delta_weight(layer, "a")
        assert type(delta) is torch.Tensor
        torch.testing.assert_close(delta, expected[name])
    for key, tensor in gralora.to_lora(model, "a").items():
        assert same_bits(tensor, lora[key])

    # k blocks lie on the first axis; along the second one even k = 1 is cut evenly
    model, x = adapted(gralora_k=1, modules_to_save=None, bias="none"), data()[0]
    y = model(x)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 else None)
    A = model.blocks[0][0].gralora_adapters["a"].A
    assert A.placements == (Shard(1),) and A.to_local().shape == (1, 8, 4)
    torch.testing.assert_close(model(x), y)
    assert gralora.delta_weight(model.blocks[0][0], "a").shape == model.blocks[0][0].weight.shape


def test_fsdp_delta_weight_and_lora_pairs_are_whole(processes):
    processes.run(_fsdp_delta)


def _dcp_saves(rank, folder):
    model, (x, target) = adapted(), data()
    shard(model, init_device_mesh("cpu", (WORLD,)))
    ten_losses(model, mine(rank, x), mine(rank, target))
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    dcp.save(state, checkpoint_id=folder)
    return model(x).detach()


def test_a_distributed_checkpoint_of_two_processes_loads_in_one(processes, tmp_path):
    y, other = processes.run(_dcp_saves, tmp_path)
    assert same_bits(y, other)
    model, (x, _) = adapted(), data()
    assert relative(model(x), y) > 1e-3
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)


def _fsdp_from_meta(rank, folder):
    """Built on meta, injected, sharded, and only then given memory and values."""
    alone = adapted()
    mesh, x = init_device_mesh("cpu", (WORLD,)), data()[0]
    with torch.device("meta"):
        model = adapted()
    shard(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(rank)  # the values of rank 0 count
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    A = model.blocks[0][0].gralora_adapters["a"].A.full_tensor()
    A = A.detach()
    assert 0 < A.abs().max() <= 1 / 8**0.5
    base = {name: tensor for name, tensor in alone.state_dict().items() if "gralora_" not in name}
    set_model_state_dict(model, base, options=StateDictOptions(full_state_dict=True, strict=False))
    gralora.load_adapter_state_dict(model, gralora.adapter_state_dict(alone, "a"), "a")
    torch.testing.assert_close(model(x), alone(x), rtol=1e-5, atol=1e-6)
    return A


def test_fsdp_of_a_model_built_on_meta(processes, tmp_path):
    first, second = processes.run(_fsdp_from_meta, tmp_path)
    assert same_bits(first, second)


# parallelize_module


class Feed(nn.Module):
    """What colwise and rowwise are made for."""

    def __init__(self, bias=True, width=12):
        super().__init__()
        self.up, self.down = (
            nn.Linear(width, 2 * width, bias=bias),
            nn.Linear(2 * width, width, bias=bias),
        )

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
SPREAD = {"up": {"A": 2, "B": 0, "B_general": 0}, "down": {"A": 0, "B": 1, "A_general": 1}}
SPREAD_OF_ONE_BLOCK = {"up": {"B": 2, "B_general": 0}, "down": {"A": 1, "A_general": 1}}


def parallel(model):
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), PLAN)


def counts(call):
    with CommDebugMode() as communication:
        call()
    return {str(op): count for op, count in communication.get_comm_counts().items()}


def _tensor_parallel(rank, k, hybrid_r, bias):
    torch.manual_seed(0)
    alone = Feed(bias)
    model, base, x = (
        parallel(copy.deepcopy(alone)),
        parallel(copy.deepcopy(alone)),
        torch.randn(4, 5, 12),
    )
    config = random_config(r=12, gralora_k=k, hybrid_r=hybrid_r)
    torch.manual_seed(rank)  # the initial values of rank 0 count
    gralora.inject(model, "all-linear", config)
    gralora.inject(alone, "all-linear", config)
    state = gralora.adapter_state_dict(model)
    gralora.load_adapter_state_dict(alone, state)
    expected = {1: SPREAD_OF_ONE_BLOCK, 3: {"up": {}, "down": {}}}.get(k, SPREAD)
    for name, layer in gralora_layers(model):
        for letter, p in layer.gralora_adapters["default"].named_parameters():
            axis = expected[name].get(letter)
            assert p.placements == (Replicate() if axis is None else Shard(axis),), (name, letter)
    with torch.no_grad():
        of_base = counts(lambda: base(x))
        if k != 3:
            assert counts(lambda: model(x)) == of_base  # whole blocks: nothing to exchange
    y, other = model(x), alone(x)
    torch.testing.assert_close(y, other)
    assert relative(base(x), other) > 1e-2
    y.square().sum().backward()
    other.square().sum().backward()
    grads = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.placements == p.placements
            torch.testing.assert_close(p.grad.full_tensor(), grads[name], rtol=1e-4, atol=1e-4)
    target = torch.zeros(4, 5, 12)
    torch.testing.assert_close(
        ten_losses(model, x, target), ten_losses(alone, x, target), rtol=1e-4, atol=1e-5
    )

    return state["up.gralora_A"]


@pytest.mark.parametrize(
    ("k", "hybrid_r", "bias"),
    [(2, 0, True), (2, 3, True), (4, 0, False), (1, 0, True), (1, 2, False), (3, 2, True)],
)
def test_tensor_parallel_equals_one_process(processes, k, hybrid_r, bias):
    first, second = processes.run(_tensor_parallel, k, hybrid_r, bias)
    assert same_bits(first, second)


def _tensor_parallel_files(rank, folder):
    torch.manual_seed(0)
    alone = Feed()
    model, x = parallel(copy.deepcopy(alone)), torch.randn(4, 5, 12)
    for each in (model, alone):
        gralora.inject(each, "all-linear", random_config(gralora_dropout=0.5), adapter_name="a")
        gralora.inject(
            each, ["down"], random_config(r=12, gralora_k=3, hybrid_r=1), adapter_name="b"
        )
    model.eval()
    alone.eval()
    names = {"a": 0.5, "b": 2.0}
    for name in names:
        gralora.load_adapter_state_dict(alone, gralora.adapter_state_dict(model, name), name)
    gralora.combine(model, list(names), list(names.values()), "c")
    for each in (model, alone):
        gralora.set_adapter(each, names)
    y = model(x)
    torch.testing.assert_close(y, alone(x))
    gralora.set_adapter(model, "c")
    torch.testing.assert_close(model(x), y)
    gralora.save_adapter(model, folder / "c", "c")
    gralora.load_adapter(alone, folder / "c", "c")
    gralora.set_adapter(alone, "c")
    torch.testing.assert_close(alone(x), y)
    fresh = parallel(Feed()).eval()
    fresh.load_state_dict(
        {name: p for name, p in model.state_dict().items() if "gralora" not in name}
    )
    gralora.load_adapter(fresh, folder / "c")
    torch.testing.assert_close(fresh(x), y)
    for (_, layer), (_, plain) in zip(gralora_layers(model), gralora_layers(alone)):
        torch.testing.assert_close(
            gralora.delta_weight(layer, "c"), gralora.delta_weight(plain, "c")
        )
    gralora.reblock(model, 1, "c", r=24)
    with pytest.raises(TypeError, match="'up' is spread over processes"):
        gralora.merge(model)
    with gralora.disable_adapter(model):
        base = model(x)
    assert relative(base, y) > 1e-2
    with gralora.mixed_batch(model, ["a", None, "b", "a"]):
        refused(lambda: model(x), "mixed_batch does not support layers .* sharded")
    gralora.unload(model)
    assert same_bits(model(x), base)


def test_tensor_parallel_adapters_combine_save_load_and_unload(processes, tmp_path):
    processes.run(_tensor_parallel_files, tmp_path)


def _parallelised_later(rank):
    torch.manual_seed(0)
    mesh, x = init_device_mesh("cpu", (WORLD,)), torch.randn(4, 12)
    for name, style in PLAN.items():
        model = gralora.inject(Feed(), "all-linear", random_config())
        y = model(x)
        parallelise = partial(parallelize_module, model, mesh, {name: style})
        refused(parallelise, "is adapted", "First parallelise", "then inject")
        assert same_bits(model(x), y)
        model = gralora.inject(Feed(), ["down" if name == "up" else "up"], random_config())
        parallelize_module(model, mesh, {name: style})  # not adapted


def test_parallelising_an_adapted_layer_is_refused_with_the_right_order_told(processes):
    processes.run(_parallelised_later)


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.feed, self.how = Feed(), None

    def forward(self, x):
        return self.how(x, self.feed.up)


def _sharded_and_read(rank):
    """Another module reads a weight that is sharded: its form and products, but not its values."""
    torch.manual_seed(0)
    mesh, x = init_device_mesh("cpu", (WORLD,)), torch.randn(4, 12)
    model = Reading()
    parallelize_module(model.feed, mesh, PLAN)
    gralora.inject(model, ["up"], random_config())
    up = model.feed.up

    def form(x, up):
        weight = up.weight
        return weight.shape, weight.dtype, weight.device, weight.requires_grad

    model.how = form
    assert model(x)[:3] == (up.weight.shape, up.weight.dtype, up.weight.device)
    called = up(x)
    model.how = lambda x, up: nn.functional.linear(x, up.weight, up.bias)
    found = model(distribute_tensor(x, mesh, [Replicate()]))
    torch.testing.assert_close(found.full_tensor().chunk(WORLD, -1)[rank], called)
    for values in (
        lambda x, up: up.weight * 2,
        lambda x, up: up.weight.full_tensor(),
        lambda x, up: up.weight.to_local(),
        lambda x, up: up.weight.t().sum(),
    ):
        model.how = values
        refused(lambda: model(x), "the weight of .*GraloraLinear", "is sharded over processes")
    with gralora.disable_adapter(model):
        model.how = lambda x, up: up.weight
        assert model(x) is up.weight


def test_a_sharded_weight_that_another_module_reads_names_its_layer(processes):
    processes.run(_sharded_and_read)


def _spread_kinds(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    conv = nn.Conv1d(4, 4, 3)
    conv.weight = nn.Parameter(distribute_tensor(conv.weight.detach(), mesh, [Shard(0)]))
    refused(
        lambda: gralora.inject(nn.Sequential(conv), ["0"], random_config()),
        "'0' has its weight spread over processes",
    )

    torch.manual_seed(0)
    layer, x = gralora.GraloraConv1D(8, 12, config=random_config()), torch.randn(3, 12)
    gralora.unload(layer)
    alone = copy.deepcopy(layer)
    for axis in (0, 1):  # stored (in, out)
        model = copy.deepcopy(alone)
        model.weight = nn.Parameter(distribute_tensor(alone.weight.detach(), mesh, [Shard(axis)]))
        model.bias = nn.Parameter(distribute_tensor(alone.bias.detach(), mesh, [Replicate()]))
        gralora.inject(model, "", random_config())
        one = gralora.inject(copy.deepcopy(alone), "", random_config())
        gralora.load_adapter_state_dict(one, gralora.adapter_state_dict(model))
        assert model.gralora_adapters["default"].B.placements == (Shard(1 - axis),)
        y = model(distribute_tensor(x, mesh, [Shard(1) if axis == 0 else Replicate()]))
        torch.testing.assert_close(y.full_tensor(), one(x))


def test_spread_weights_of_other_kinds(processes):
    processes.run(_spread_kinds)


def _sharded_and_parallel(rank):
    """Both at once on a mesh of 1 x 2: tensor parallel first, then inject, then shard."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "model"))
    alone = Feed()
    model, x = parallelize_module(copy.deepcopy(alone), mesh["model"], PLAN), torch.randn(4, 5, 12)
    for each in (model, alone):
        gralora.inject(each, "all-linear", random_config())
    gralora.load_adapter_state_dict(alone, gralora.adapter_state_dict(model))
    fully_shard(model, mesh=mesh["data"])
    target = torch.zeros(4, 5, 12)
    torch.testing.assert_close(
        ten_losses(model, x, target), ten_losses(alone, x, target), rtol=1e-4, atol=1e-5
    )
    for key, tensor in gralora.adapter_state_dict(model).items():
        torch.testing.assert_close(
            tensor, gralora.adapter_state_dict(alone)[key], rtol=1e-3, atol=1e-4
        )


def test_tensor_parallel_and_fully_shard_together(processes):
    processes.run(_sharded_and_parallel)


def _transformers(rank):
    """Models that were not built for this: GPT-2 under FSDP2, Llama under tensor parallelism."""
    mesh, tokens = init_device_mesh("cpu", (WORLD,)), torch.arange(16).reshape(2, 8)
    torch.manual_seed(0)
    model = gralora.inject(gpt2(), ["c_attn", "c_proj", "c_fc"], random_config())
    alone = copy.deepcopy(model)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(mine(rank, tokens), labels=mine(rank, tokens)).loss
    loss.backward()
    alone(tokens, labels=tokens).loss.backward()
    grads = {name: p.grad for name, p in alone.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.full_tensor(), grads[name], rtol=1e-3, atol=1e-5)

    model = llama()
    alone = copy.deepcopy(model)
    for layer in model.model.layers:
        parallelize_module(
            layer.mlp,
            mesh,
            {
                "gate_proj": ColwiseParallel(),
                "up_proj": ColwiseParallel(),
                "down_proj": RowwiseParallel(),
            },
        )
    for each in (model, alone):
        gralora.inject(each, "all-linear", random_config(), adapter_name="default")
    gralora.load_adapter_state_dict(alone, gralora.adapter_state_dict(model))
    torch.testing.assert_close(model(tokens).logits, alone(tokens).logits, rtol=1e-4, atol=1e-5)


def test_models_of_transformers(processes):
    processes.run(_transformers)


def _weights_of_language_models(rank):
    """Fused experts, an embedding, single tokens and a head that is tied to them, under DDP and
    FSDP2.
    """
    from ..layers.test_experts import mixtral

    mesh, tokens = init_device_mesh("cpu", (WORLD,)), torch.arange(16).reshape(2, 8)
    for how, targets, tokens_trained in (
        ("ddp", ["embed_tokens", "gate_up_proj", "down_proj"], None),
        ("ddp", ["gate_up_proj", "down_proj"], [3, 9]),
        ("fsdp", ["embed_tokens", "gate_up_proj", "down_proj"], None),
        ("fsdp", ["gate_up_proj", "down_proj"], [3, 9]),
    ):
        torch.manual_seed(0)
        model = mixtral()
        if tokens_trained:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        gralora.inject(model, targets, random_config(trainable_token_indices=tokens_trained))
        alone = copy.deepcopy(model)
        if how == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        run = DistributedDataParallel(model, find_unused_parameters=True) if how == "ddp" else model
        run(mine(rank, tokens)).logits.square().mean().backward()
        alone(tokens).logits.square().mean().backward()
        grads = {name: p.grad for name, p in alone.named_parameters()}
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 8 + (1 if tokens_trained else 2)
        for name, p in model.named_parameters():
            if p.requires_grad:
                grad = p.grad.full_tensor() if how == "fsdp" else p.grad
                torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-5)
        state, wanted = gralora.adapter_state_dict(model), gralora.adapter_state_dict(alone)
        assert state.keys() == wanted.keys() and all(
            same_bits(state[key], wanted[key]) for key in wanted
        )


def test_experts_embeddings_and_tokens_give_the_gradients_of_one_process(processes):
    processes.run(_weights_of_language_models)


class Unspeakable(OSError):
    def __reduce__(self):
        raise TypeError("not to be sent")


def _fails_to_write(rank):
    def write():
        raise Unspeakable("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_once(write, together=True)
    calls = []
    write_once(lambda: calls.append(rank), together=True)
    return calls


def test_what_rank_0_fails_to_write_fails_on_every_rank(processes):
    assert processes.run(_fails_to_write) == [[0], []]


def _fsdp1(rank, folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 4))
    plain = copy.deepcopy(model)
    gralora.inject(model, ["0", "2"], random_config(modules_to_save=["3"]))
    x, target = torch.randn(4, 16), torch.randn(4, 4)
    reference = copy.deepcopy(model)
    losses = ten_losses(reference, x, target)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    assert ten_losses(wrapped, x, target) == pytest.approx(losses, rel=1e-4)
    for write in (
        lambda: gralora.save_adapter(wrapped, folder / "torn"),
        lambda: gralora.save_adapter(wrapped, folder / "torn", format="lora"),
        lambda: gralora.to_lora(wrapped),
    ):
        refused(
            write,
            "under FullyShardedDataParallel, which has flattened its parameters",
            "summon_full_params",
        )
    assert not (folder / "torn").exists()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        state = gralora.adapter_state_dict(wrapped)
        wanted = gralora.adapter_state_dict(reference)
        assert {key: t.shape for key, t in state.items()} == {
            key: t.shape for key, t in wanted.items()
        }
        assert all(relative(state[key], wanted[key]) < 1e-4 for key in wanted)
        gralora.save_adapter(wrapped, folder / "whole")
    distributed.barrier()
    assert relative(gralora.load_adapter(plain, folder / "whole")(x), reference(x)) < 1e-4


def test_fsdp1_is_saved_whole_within_summon_full_params_and_refused_outside(processes, tmp_path):
    processes.run(_fsdp1, tmp_path)


def test_a_tensor_that_an_engine_has_emptied_is_never_written(tmp_path):
    for format in ("gralora", "peft", "lora"):
        for shape in ((0,), (2 * 8 * 4,)):
            model = gralora.inject(nn.Sequential(nn.Linear(16, 8)), ["0"], random_config())
            adapter = model[0].gralora_adapters["default"]
            adapter._parameters["A"] = nn.Parameter(torch.zeros(shape))
            with pytest.raises(
                ValueError,
                match=r"adapter 'default' is not whole, nothing is written: 0\.gralora_A",
            ):
                gralora.save_adapter(model, tmp_path / "a", format=format)
            assert not (tmp_path / "a").exists()
    model = gralora.inject(
        nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)),
        ["0"],
        random_config(modules_to_save=["1"]),
    )
    model[1].gralora_saved["default"].weight.data = torch.zeros(0)
    with pytest.raises(ValueError, match=r"is not whole, nothing is written: 1\.weight \(0,\)"):
        gralora.save_adapter(model, tmp_path / "a")
