"""Whole models under autocast, torch.compile, torch.export and ONNX; single layers are in
`test_autograd.py`.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gralora

from ..models import (
    TOKENS,
    Block,
    Everything,
    gpt2,
    llama,
    mlp,
    random_config,
    relative,
    ten_losses,
)
from ..needs import needs

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
NAMES = ("a", "b", "c", "d")


def compiled(model, **options):
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def several(model, names=NAMES, targets="all-linear", **config):
    for name in names:
        gralora.inject(model, targets, random_config(**config), adapter_name=name)
    return model


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("hybrid_r", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_no_adapter_of_the_same_shape_is_compiled_again(grad, hybrid_r):
    model = several(Block(), hybrid_r=hybrid_r)
    run, counter = compiled(model)
    outputs = []
    with torch.set_grad_enabled(grad):
        for name in NAMES * 2:
            gralora.set_adapter(model, name)
            outputs.append(run(X))
            torch.testing.assert_close(outputs[-1], model(X), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert all(relative(a, b) > 1e-2 for a, b in zip(outputs[:4], outputs[1:4]))
    if grad:
        gralora.set_adapter(model, "b")
        run(X).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        assert grads and all(".b." in name and grad.abs().sum() > 0 for name, grad in grads.items())
        model.zero_grad()
        model(X).sum().backward()
        for name, p in model.named_parameters():
            if name in grads:
                torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4)


def test_what_computes_something_else_is_compiled_once_more_and_is_right():
    model = several(mlp(16, 32, 16), "ab")
    gralora.inject(model, ["0"], random_config(r=8, gralora_k=4), adapter_name="other")
    run, counter = compiled(model)
    seen = []
    for names in ("a", "other", {"a": 0.5, "b": 2.0}, [], "b", "other"):
        gralora.set_adapter(model, names)
        torch.testing.assert_close(run(X), model(X), rtol=1e-4, atol=1e-5)
        seen.append(counter.frame_count)
    assert seen == [1, 2, 3, 4, 4, 4]
    gralora.set_adapter(model, "a")
    with gralora.disable_adapter(model):
        base = run(X)
        assert relative(base, run(X)) == 0
    assert relative(run(X), base) > 1e-2
    gralora.merge(model)
    torch.testing.assert_close(run(X), model(X), rtol=1e-4, atol=1e-5)
    gralora.unmerge(model)
    gralora.reblock(model, 1, "a", r=8)
    torch.testing.assert_close(run(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_is_one_graph_and_its_block_may_end_and_come_again():
    model = several(mlp(16, 24, 8).eval(), ("a", "b"))
    run, counter = compiled(model)
    with torch.no_grad():
        for rows in (["a", "b", None, "a"], ["b", "b", "a", None], ["a", "b", None, "a"]):
            with gralora.mixed_batch(model, rows):
                expected = model(X)
                torch.testing.assert_close(run(X), expected, rtol=1e-4, atol=1e-5)
            for index, name in enumerate(rows):
                gralora.set_adapter(model, [] if name is None else name)
                torch.testing.assert_close(expected[index], model(X)[index], rtol=1e-4, atol=1e-5)
            gralora.set_adapter(model, "a")
    assert counter.frame_count == 2  # one for each assignment, whenever its block is opened


@pytest.mark.parametrize("dynamic", [None, True])
def test_any_batch_size_takes_two_compilations_at_most(dynamic):
    model = several(mlp(16, 32, 16), "a")
    run, counter = compiled(model, dynamic=dynamic)
    for batch in (2, 3, 5, 7, 4):
        torch.testing.assert_close(
            run(X[:1].repeat(batch, 1, 1)), model(X[:1].repeat(batch, 1, 1)), rtol=1e-4, atol=1e-5
        )
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, llama])
def test_models_of_transformers_compile_whole(make):
    model = several(make(), "a")
    run, counter = compiled(model)
    with torch.no_grad():
        y, expected = run(TOKENS)[0], model(TOKENS)[0]
        with gralora.disable_adapter(model):
            assert relative(model(TOKENS)[0], expected) > 1e-3
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_training_compiled_by_inductor_follows_eager():
    model = several(mlp(16, 32, 16), "a")
    eager, target = copy.deepcopy(model), torch.zeros(4, 6, 16)
    losses = ten_losses(torch.compile(model, fullgraph=True), X, target)
    torch.testing.assert_close(losses, ten_losses(eager, X, target), rtol=1e-3, atol=1e-4)


# types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "half base"])
def test_half_precision_follows_float32(how, dtype):
    model = several(Block(), "a", r=8)
    exact = copy.deepcopy(model)
    x, target = X, torch.zeros(4, 6, 4)
    if how == "half base":
        for module in model.modules():  # the adapters stay in float32
            if type(module).__name__ in ("GraloraLinear", "Linear", "LayerNorm"):
                for name, p in module._parameters.items():
                    module._parameters[name] = (
                        p if p is None else nn.Parameter(p.to(dtype), requires_grad=False)
                    )
        x, target = x.to(dtype), target.to(dtype)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16, init_scale=128.0)
    optimizer, losses = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-2), []
    for _ in range(10):
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            y = model(x)
            assert y.dtype == dtype
            loss = nn.functional.mse_loss(y.float(), target.float())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in gralora.adapter_parameters(model))
    expected = ten_losses(exact, X, target.float())
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.05)
    assert losses[-1] < 0.7 * losses[0]


# export


def dynamic(model, x):
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "make", [Block, Everything, lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)]
)
def test_export_of_adapted_and_of_merged_models(make, merged):
    model = make().eval()
    base = model(X)
    gralora.inject(
        model,
        lambda name, module: isinstance(module, (nn.Linear, nn.MultiheadAttention, nn.Conv1d)),
        random_config(),
    )
    y = model(X)
    assert relative(y, base) > 1e-3
    if merged:
        gralora.merge(model)
    with torch.no_grad():
        program = dynamic(model, X)
    for x in (X, torch.cat([X, X + 1])):
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert any("gralora" in name for name in program.state_dict)
    gralora.merge_and_unload(model)
    with torch.no_grad():
        plain = dynamic(model, X)
    torch.testing.assert_close(plain.module()(X), y, rtol=1e-4, atol=1e-5)
    assert not any("gralora" in name for name in plain.state_dict)
    assert len(list(plain.graph.nodes)) < len(list(program.graph.nodes)) or merged


@pytest.mark.parametrize("how", ["merged", "merged and unloaded", "adapted"])
@pytest.mark.parametrize(
    "make", [lambda: mlp(16, 32, 16), pytest.param(Block, marks=pytest.mark.slow)]
)
def test_onnx_runs_to_equal_outputs(make, how, tmp_path):
    needs("onnxscript")
    runtime = needs("onnxruntime")
    model = make().eval()
    base = model(X)
    several(model, "a")
    y = model(X)
    if how == "merged":
        gralora.merge(model)
    elif how == "merged and unloaded":
        gralora.merge_and_unload(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=2, max=64)
        torch.onnx.export(
            model,
            (X,),
            tmp_path / "model.onnx",
            dynamo=True,
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for x in (X, X[:3]):
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert relative(torch.from_numpy(out), base[:3]) > 1e-3
    torch.testing.assert_close(torch.from_numpy(out), y[:3].detach(), rtol=1e-3, atol=1e-4)
