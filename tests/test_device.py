"""The core of the suite on whatever accelerator there is, and on the CPU where there is none.

What an accelerator does otherwise: its kernels round otherwise, its random numbers are its own,
work is queued on streams, and autograd runs backward in a thread of its own, which has no context
variables of ours.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gralora
from gralora.layers.base import gralora_layers

from .models import Block, everything, llama, mlp, random_config, randomize_, relative, same_bits

ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
DEVICE = ACCELERATOR or torch.device("cpu")
LOOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16, *([] if DEVICE.type == "mps" else [torch.float64])]


def synchronize():
    if ACCELERATOR is not None:
        torch.accelerator.synchronize()


def both(make):
    """The same model on the CPU and on the device."""
    torch.manual_seed(0)
    here = make()
    return here, copy.deepcopy(here).to(DEVICE)


def adapted(dtype=torch.float32, **fields):
    model = gralora.inject(
        mlp(16, 32, 8, dtype=dtype), "all-linear", random_config(**fields), dtype=dtype
    )
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"r": 8, "gralora_k": 4, "hybrid_r": 2, "use_rslora": True}],
    ids=["plain", "hybrid"],
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_outputs_and_gradients_are_those_of_the_cpu(dtype, fields, tokens):
    here, there = both(lambda: adapted(dtype, **fields))
    x = torch.randn(tokens, 16, dtype=dtype)
    grads = []
    for model, given in ((here, x.clone()), (there, x.to(DEVICE))):
        given.requires_grad_()
        y = model(given)
        with torch.no_grad():
            assert relative(model(given), y) <= LOOSE[dtype]  # decoding has a way of its own
        y.square().sum().backward()
        grads.append(
            [
                t.cpu()
                for t in (
                    y.detach(),
                    given.grad,
                    *(p.grad for p in gralora.adapter_parameters(model)),
                )
            ]
        )
    for one, other in zip(*grads, strict=True):
        assert relative(other.float(), one.float()) <= LOOSE[dtype] and one.any()


def test_every_kind_computes_as_on_the_cpu():
    here, there = both(everything)
    x = torch.randn(3, 5, 16)
    for names in ("a", "b", {"a": 0.5, "b": -1.0}, []):
        for model in (here, there):
            gralora.set_adapter(model, names)
        assert relative(there(x.to(DEVICE)).cpu(), here(x)) < 1e-4
    with gralora.disable_adapter(there):
        assert relative(there(x.to(DEVICE)).cpu(), here(x)) < 1e-4


def test_an_adapter_is_born_where_its_layer_is_with_the_same_values_as_on_the_cpu():
    found = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        model = Block().to(device)
        torch.manual_seed(1)
        gralora.inject(model, "all-linear", random_config(init_weights=True))
        assert {p.device.type for p in gralora.adapter_parameters(model)} == {device.type}
        found.append([p.detach().cpu() for p in gralora.adapter_parameters(model)])
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_dropout_draws_are_repeated_by_a_seed_and_the_same_in_backward():
    _, model = both(lambda: adapted(gralora_dropout=0.5).train())
    x = torch.randn(64, 16, device=DEVICE)
    outputs, grads = [], []
    for how in ("plain", "plain", "checkpointed"):
        model.zero_grad()
        torch.manual_seed(3)
        y = model(x) if how == "plain" else checkpoint(model, x, use_reentrant=False)
        y.sum().backward()
        outputs.append(y.detach())
        grads.append(model[0].gralora_adapters["default"].A.grad.clone())
    assert all(same_bits(outputs[0], each) for each in outputs) and all(
        same_bits(grads[0], each) for each in grads
    )
    model.eval()
    assert not torch.equal(model(x), outputs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    _, model = both(adapted)
    x = torch.randn(20, 16, device=DEVICE)
    expected = model(x)
    with torch.autocast(DEVICE.type, dtype):
        y = model(x)
    assert y.dtype is dtype
    assert relative(y.float(), expected) < 3e-2
    y.float().sum().backward()
    assert model[0].gralora_adapters["default"].B.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_is_beside_and_unmerge_gives_the_bits_back(dtype):
    _, model = both(lambda: adapted(dtype))
    x = torch.randn(20, 16, device=DEVICE, dtype=dtype)
    beside, weight = model(x), model[0].weight.detach().clone()
    gralora.merge(model)
    assert relative(model(x).float(), beside.float()) <= LOOSE[dtype]
    assert not torch.equal(model[0].weight, weight)
    gralora.unmerge(model)
    assert same_bits(model[0].weight, weight) and same_bits(model(x), beside)
    assert type(gralora.merge_and_unload(model)[0]) is nn.Linear


def test_rows_of_a_batch():
    _, model = both(
        lambda: gralora.inject(Block(), "all-linear", random_config(), adapter_name="a")
    )
    gralora.inject(model, ["q", "mlp.0"], random_config(r=8), adapter_name="b")
    x, rows = torch.randn(4, 5, 16, device=DEVICE), ["a", "b", None, "a"]
    with gralora.mixed_batch(model, rows):
        mixed = model(x)
    for index, name in enumerate(rows):
        gralora.set_adapter(model, [] if name is None else name)
        assert relative(mixed[index], model(x)[index]) < 1e-4


@pytest.mark.parametrize("block", ["disabled", "mixed"])
def test_checkpointing_within_a_block_where_backward_has_threads_of_its_own(block):
    """A forward that runs again within backward, in whatever thread, must run as it ran first."""
    _, model = both(
        lambda: gralora.inject(Block(), "all-linear", random_config(), adapter_name="a")
    )
    gralora.inject(model, ["q", "mlp.0"], random_config(), adapter_name="b")
    gralora.set_adapter(model, ["a", "b"])
    x = torch.randn(2, 5, 16, device=DEVICE, requires_grad=True)
    blocks = {
        "disabled": lambda: gralora.disable_adapter(model),
        "mixed": lambda: gralora.mixed_batch(model, ["b", "a"]),
    }
    grads = []
    for how in ("plain", "checkpointed"):
        x.grad = None
        model.zero_grad()
        with blocks[block]():
            y = model(x) if how == "plain" else checkpoint(model, x, use_reentrant=False)
            y.square().sum().backward()
            synchronize()
        grads.append(
            [
                x.grad.clone(),
                *(p.grad.clone() for p in gralora.adapter_parameters(model) if p.grad is not None),
            ]
        )
    assert len(grads[0]) == len(grads[1]) and len(grads[0]) == (
        1 if block == "disabled" else len(grads[0])
    )
    assert all(relative(other, one) < 1e-4 for one, other in zip(*grads, strict=True))


def test_what_is_moved_away_and_back_is_the_same(tmp_path):
    _, model = both(adapted)
    x = torch.randn(20, 16, device=DEVICE)
    y = model(x)
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    model.to("cpu")
    assert relative(model(x.cpu()), y.cpu()) < 1e-4
    model.to(DEVICE)
    assert same_bits(model(x), y)
    gralora.load_adapter(model, tmp_path / "a.safetensors", "again")
    gralora.set_adapter(model, "again")
    assert {p.device.type for p in gralora.adapter_parameters(model)} == {DEVICE.type}
    assert same_bits(model(x), y)


@pytest.mark.parametrize("method", ["eva", "gradient"])
def test_a_start_out_of_data_is_that_of_the_cpu(method):
    here, there = both(
        lambda: gralora.inject(mlp(16, 32, 8), "all-linear", gralora.GraloraConfig(r=4))
    )
    data = [torch.randn(8, 16) * torch.linspace(3, 0.1, 16) for _ in range(3)]
    for model, device in ((here, "cpu"), (there, DEVICE)):
        batches = [x.to(device) for x in data]
        gralora.initialize(
            model, method, batches, forward=lambda model, x: model(x).square().mean()
        )
    for (_, one), (_, other) in zip(gralora_layers(here), gralora_layers(there), strict=True):
        A, B = (each.gralora_adapters["default"].A.detach().cpu() for each in (one, other))
        assert relative(B, A) < 1e-2


def test_work_on_another_stream_and_memory_that_is_pinned():
    _, model = both(adapted)
    pinned = torch.randn(20, 16)
    pinned = pinned.pin_memory() if DEVICE.type == "cuda" else pinned
    expected = model(pinned.to(DEVICE))
    stream = torch.Stream(DEVICE) if ACCELERATOR is not None else None
    with stream or contextlib.nullcontext():
        y = model(pinned.to(DEVICE, non_blocking=True))
        y.sum().backward()
    synchronize()
    assert relative(y, expected) < 1e-5
    assert model[0].gralora_adapters["default"].A.grad.isfinite().all()


def test_a_language_model_decodes_and_trains():
    here, there = both(lambda: gralora.inject(llama(), "all-linear", random_config()))
    tokens = torch.arange(12)[None]
    for model, device in ((here, torch.device("cpu")), (there, DEVICE)):
        randomize_(model) if model is here else None
        model.load_state_dict(here.state_dict())
        given = tokens.to(device)
        model.generated = model.generate(given, max_new_tokens=8, do_sample=False).cpu()
        model(given, labels=given).loss.backward()
    assert torch.equal(here.generated, there.generated)
    gradients = ([p.grad.cpu() for p in gralora.adapter_parameters(m)] for m in (here, there))
    assert all(relative(other, one) < 1e-2 for one, other in zip(*gradients, strict=True))
