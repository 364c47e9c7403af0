"""One adapter: its name, and its first values."""

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.layers.adapter import GraloraAdapter

from ..models import mlp, random_config


def test_a_model_on_meta_is_injected_there_and_reset_later():
    with torch.device("meta"):
        model = mlp(16, 8)
    gralora.inject(model, ["0"], GraloraConfig(r=4))
    assert model[0].gralora_adapters["default"].A.is_meta
    model.to_empty(device="cpu")
    model[0].gralora_adapters["default"].reset_parameters()
    assert model[0].gralora_adapters["default"].B.count_nonzero() == 0


@pytest.mark.parametrize("name", ["forward", "training", "items", "a b", "ä"])
def test_any_name_without_a_dot_names_an_adapter(name):
    model = gralora.inject(mlp(16, 8), ["0"], random_config(), adapter_name=name)
    assert gralora.adapter_names(model) == [name]
    assert model(torch.randn(2, 16)).shape == (2, 8)


@pytest.mark.parametrize(("name", "error"), [("a.b", ValueError), ("", ValueError), (3, TypeError), (None, TypeError)])
def test_other_names_are_refused(name, error):
    with pytest.raises(error, match="adapter_name"):
        gralora.inject(mlp(16, 8), ["0"], adapter_name=name)


KINDS = {
    "linear": (lambda: nn.Linear(8, 8), lambda layer: layer(torch.randn(3, 8))),
    "convolution": (lambda: nn.Conv1d(8, 8, 3), lambda layer: layer(torch.randn(3, 8, 5))),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda layer: layer(*[torch.randn(3, 2, 8)] * 3)[0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_an_adapter_fire(kind):
    make, run = KINDS[kind]
    layer = gralora.inject(make(), "", random_config(gralora_dropout=0.5)) if kind != "attention" else None
    layer = layer or gralora.inject(make(), ["q_proj"], random_config(gralora_dropout=0.5))
    adapter = next(module for module in layer.modules() if isinstance(module, GraloraAdapter))
    torch.manual_seed(1)
    y = run(layer)
    seen = []
    handles = [
        adapter.register_forward_hook(lambda module, args, out: seen.append(("forward", out.shape))),
        adapter.register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape))),
        adapter.register_full_backward_hook(lambda module, into, out: seen.append(("backward", out[0].shape))),
    ]
    torch.manual_seed(1)
    again = run(layer)
    torch.testing.assert_close(again, y)
    again.sum().backward()
    assert [what for what, _ in seen] == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    run(layer)
    assert len(seen) == 3


def test_hooks_that_see_the_rows_of_a_mixed_batch_and_those_of_all_modules():
    model = gralora.inject(nn.Sequential(nn.Linear(8, 8)), ["0"], random_config())
    adapter, seen = model[0].gralora_adapters["default"], []
    with torch.no_grad(), gralora.mixed_batch(model, ["default", None, "default"]):
        handle = adapter.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model(torch.randn(3, 8))
        handle.remove()
    assert seen == [(2, 8)]
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    model(torch.randn(3, 8))
    handle.remove()
    assert adapter in seen


def test_gradients_by_sample_of_a_tool_that_rests_on_hooks():
    model = gralora.inject(nn.Linear(8, 4), "", random_config(hybrid_r=0))
    adapter, inputs, found = model.gralora_adapters["default"], [], []
    adapter.register_forward_hook(lambda module, args, out: inputs.append(args[0]))

    def by_sample(module, into, out):
        for x, grad in zip(inputs[-1], out[0], strict=True):
            with torch.enable_grad():
                y = type(module).forward(module, x)
                found.append(torch.autograd.grad(y, module.B, grad)[0])

    adapter.register_full_backward_hook(by_sample)
    x = torch.randn(3, 8)
    model(x).square().sum().backward()
    torch.testing.assert_close(sum(found), adapter.B.grad)
    for each, grad in zip(x, found, strict=True):
        model.zero_grad()
        adapter._backward_hooks.clear()
        model(each[None]).square().sum().backward()
        torch.testing.assert_close(grad, adapter.B.grad)


@pytest.mark.parametrize("mode", [False, True])
def test_every_module_below_is_in_the_mode_of_its_model(mode, tmp_path):
    def model():
        modules = {"fc": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 8)}
        return nn.ModuleDict(modules).train(mode)

    one = gralora.inject(model(), ["fc", "attention"], random_config(bias="gralora_only", modules_to_save=["head"]))
    gralora.save_adapter(one, tmp_path / "a")
    two = gralora.load_adapter(model(), tmp_path / "a")
    for each in (one, two):
        assert {name for name, module in each.named_modules() if module.training is not mode} == set()
