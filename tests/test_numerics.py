"""At the edges of the numbers and of the shapes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig

from .models import assert_same, fingerprint, mlp, random_config, relative, same_bits


def reference(layer, x):
    delta = gralora.delta_weight(layer).double()
    return F.linear(x.double(), layer.weight.double() + delta, layer.bias.double())


@pytest.mark.parametrize("gradients", [True, False])
def test_float16_does_not_overflow_inside_the_adapter(gradients):
    layer = gralora.inject(nn.Linear(64, 64, dtype=torch.float16), "", random_config(r=8, alpha=8))
    adapter = layer.gralora_adapters["default"]
    with torch.no_grad():  # z is far beyond float16's 65,504, the update is not
        adapter.A.fill_(1000.0)
        adapter.B.fill_(1e-6)
    x = torch.full((2, 64), 10.0, dtype=torch.float16, requires_grad=gradients)
    assert (x.float().unflatten(-1, (2, 32)).sum(-1) * 1000).max() > 65_504
    y = layer(x)
    assert y.isfinite().all()
    assert relative(y.double(), reference(layer, x)) < 2e-3
    if gradients:
        y.float().sum().backward()
        assert x.grad.isfinite().all() and adapter.B.grad.isfinite().all()
        assert adapter.B.grad.max() > 65_504


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_merge_that_overflows_is_refused_and_changes_nothing(dtype):
    model = gralora.inject(mlp(16, 16, 8, dtype=dtype), "all-linear", random_config(alpha=8))
    with torch.no_grad():
        model[2].gralora_adapters["default"].A.fill_(
            1.0
        )  # whatever was drawn: sums must not cancel
        model[2].gralora_adapters["default"].B.fill_(1e30 if dtype is torch.float16 else 3e38)
    before = fingerprint(model)
    for merge in (gralora.merge, gralora.merge_and_unload):
        with pytest.raises(ValueError, match="not finite"):
            merge(model)
        assert_same(fingerprint(model), before)
    gralora.merge(model, safe=False)
    assert not model[2].weight.isfinite().all()
    gralora.unmerge(model)
    assert_same(fingerprint(model), before)


def test_the_largest_alpha_and_weight_are_still_numbers():
    layer = gralora.inject(nn.Linear(8, 8), "", GraloraConfig(r=2, alpha=1e30))
    gralora.set_adapter(layer, {"default": 1e6})
    x = torch.randn(2, 8)
    assert same_bits(layer(x), F.linear(x, layer.weight, layer.bias))  # B is zero
    for alpha in (1.01e30, 1e300):
        with pytest.raises(ValueError, match="at most 1e.30"):
            GraloraConfig(alpha=alpha)
    with pytest.raises(ValueError, match="at most 1e.06"):
        gralora.set_adapter(layer, {"default": 1e7})


def test_denormal_numbers_are_not_lost():
    layer = gralora.inject(nn.Linear(8, 8, bias=False), "", random_config(r=2, alpha=2))
    adapter = layer.gralora_adapters["default"]
    with torch.no_grad():
        layer.weight.zero_()
        adapter.A.fill_(1e-20)
        adapter.B.fill_(1e-20)
    delta = gralora.delta_weight(layer)
    assert (delta > 0).all() and (delta < torch.finfo(torch.float32).tiny).all()
    x = torch.ones(1, 8)
    y = layer(x)
    assert (y > 0).all()
    gralora.merge(layer)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("r", "k"), [(8, 1), (8, 8), (16, 8), (64, 8), (1, 1)])
def test_the_extreme_ranks_and_cuts(r, k):
    layer = nn.Linear(8, 8, dtype=torch.float64)
    gralora.inject(layer, "", random_config(r=r, gralora_k=k))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, reference(layer, x))
    y.sum().backward()
    assert layer.gralora_adapters["default"].A.grad.shape == (k, 8 // k, r)
    gralora.merge(layer)
    torch.testing.assert_close(layer(x), y)
    assert torch.linalg.matrix_rank(gralora.delta_weight(layer)) == min(8, k * r)


INPUTS = {
    "no rows": lambda: torch.randn(0, 8),
    "no rows, three axes": lambda: torch.randn(2, 0, 8),
    "one number a token": lambda: torch.randn(8),
    "five axes": lambda: torch.randn(1, 2, 1, 3, 8),
    "transposed": lambda: torch.randn(8, 5).t(),
    "strided": lambda: torch.randn(5, 16)[:, ::2],
    "every other row": lambda: torch.randn(10, 8)[::2],
    "expanded": lambda: torch.randn(1, 8).expand(5, 8),
    "expanded features": lambda: torch.randn(5, 1).expand(5, 8),
    "channels last": lambda: (
        torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    ),
    "a view with an offset": lambda: torch.randn(100)[3:43].view(5, 8),
}


@pytest.mark.parametrize("grad", ["of input and adapter", "of the adapter", "of the input", "none"])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_layout_and_need_of_gradients(kind, grad):
    layer = gralora.inject(nn.Linear(8, 12), "", random_config(r=4, hybrid_r=1))
    parameters = gralora.adapter_parameters(layer)
    x = INPUTS[kind]()
    x = x.detach().requires_grad_("input" in grad)
    for parameter in parameters:
        parameter.requires_grad_("adapter" in grad)
    y = layer(x)
    torch.testing.assert_close(y.double(), reference(layer, x), rtol=1e-4, atol=1e-5)
    assert y.requires_grad == (grad != "none")
    if grad == "none":
        return
    y.square().sum().backward()
    for needed, tensors in (("input" in grad, [x]), ("adapter" in grad, parameters)):
        assert all((t.grad is not None) == needed for t in tensors)
    if "input" in grad:
        twin = x.detach().double().requires_grad_()
        reference(layer, twin).square().sum().backward()
        torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Conv2d(8, 8, 3, padding=1), lambda: nn.MultiheadAttention(8, 2, batch_first=True)],
)
def test_convolutions_and_attention_take_what_their_base_takes(make):
    layer = make()
    conv = isinstance(layer, nn.Conv2d)
    shapes = [(0, 8, 4, 4), (2, 8, 4, 4), (8, 4, 4)] if conv else [(2, 5, 8), (5, 8), (1, 1, 8)]
    run = (lambda m, x: m(x)) if conv else (lambda m, x: m(x, x, x, need_weights=False)[0])
    adapted = gralora.inject(make(), "", random_config())
    for shape in shapes:
        x = torch.randn(shape)
        for each in (
            x,
            x.transpose(-1, -2).contiguous().transpose(-1, -2),
            x[:1].expand(shape) if shape[0] else x,
        ):
            assert run(adapted, each).shape == run(layer, each).shape
            assert run(adapted, each).isfinite().all()


def test_an_adapter_that_diverged_spreads_nan_and_does_not_hide_it():
    layer = gralora.inject(nn.Linear(8, 8), "", random_config())
    with torch.no_grad():
        layer.gralora_adapters["default"].A[0, 0, 0] = float("nan")
    assert layer(torch.randn(2, 8)).isnan().any()
    with pytest.raises(ValueError, match="not finite"):
        gralora.merge(layer)
