"""Modules that change class, under tools that set their forward."""

import copy

import pytest
import torch
from torch import nn

import gralora

from ..models import assert_same, fingerprint, mlp, random_config, same_bits

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def test_a_forward_that_accelerate_set_before_inject_is_kept_and_the_adapter_acts():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = mlp(16, 16)
    base = model(X)
    add_hook_to_module(model[0], Counting())
    gralora.inject(model, ["0"], random_config())
    y = model(X)
    assert Counting.calls == 1
    assert not torch.allclose(y, base)
    add_hook_to_module(model[0], Counting())  # replaced
    assert same_bits(model(X), y)
    assert Counting.calls == 2
    add_hook_to_module(model[0], Counting(), append=True)
    assert same_bits(model(X), y)
    remove_hook_from_module(model[0])
    assert same_bits(model(X), y)
    assert same_bits(gralora.unload(model)(X), base)


def test_hooks_of_accelerate_before_inject_survive_unload_and_those_after_too():
    from accelerate.hooks import ModelHook, add_hook_to_module

    for order in ("before", "after"):
        model = mlp(16, 16)
        base = model(X)
        if order == "before":
            add_hook_to_module(model[0], ModelHook())
        before = fingerprint(model)
        gralora.inject(model, ["0"], random_config())
        if order == "after":
            add_hook_to_module(model[0], ModelHook())
        assert not torch.allclose(model(X), base)
        assert not torch.allclose(copy.deepcopy(model)(X), base)
        gralora.unload(model)
        assert same_bits(model(X), base)
        if order == "before":
            assert_same(fingerprint(model), before)


@pytest.mark.parametrize("when", ["before inject", "after inject"])
def test_compiled_before_or_after_inject(when):
    model = mlp(16, 16)
    if when == "before inject":
        compiled = torch.compile(model, backend="eager")
        base = compiled(X)
        gralora.inject(model, ["0"], random_config())
    else:
        base = model(X)
        gralora.inject(model, ["0"], random_config())
        compiled = torch.compile(model, backend="eager")
    assert not torch.allclose(compiled(X), base)
    torch.testing.assert_close(compiled(X), model(X))
    gralora.unload(model)
    torch.testing.assert_close(compiled(X), base)


def test_inject_into_a_compiled_model_itself():
    compiled = torch.compile(mlp(16, 16), backend="eager")
    base = compiled(X)
    gralora.inject(compiled, "all-linear", random_config())
    assert not torch.allclose(compiled(X), base)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_or_traced_module_is_no_target_and_says_so():
    for make in (torch.jit.script, lambda m: torch.jit.trace(m, X)):
        model = nn.ModuleDict({"jit": make(nn.Linear(16, 16)), "fc": nn.Linear(16, 16)})
        with pytest.raises(ValueError, match=r"'jit' is a \w+ \(torch.*\); adaptable are"):
            gralora.inject(model, ["jit"], random_config())


def test_a_layer_called_past_its_call_operator():
    layer = nn.Linear(16, 16)
    base = layer(X)
    gralora.inject(layer, "", random_config())
    for call in (
        layer.forward,
        lambda x: nn.Module.__call__(layer, x),
        lambda x: type(layer).forward(layer, x),
    ):
        assert not torch.allclose(call(X), base)
