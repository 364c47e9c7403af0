"""Modules that change class, under tools that set their forward."""

import abc
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gralora
from gralora.layers.base import gralora_layers

from ..models import (
    Doubled,
    Experts,
    assert_same,
    fingerprint,
    mlp,
    random_config,
    relative,
    same_bits,
)

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
        for targets in (["jit"], ".*"):
            with pytest.raises(ValueError, match=r"'jit' is a \w+, .*: it is TorchScript"):
                gralora.inject(model, targets, random_config())
        gralora.inject(model, "all-linear", random_config())
        assert [name for name, _ in gralora_layers(model)] == ["fc"]
        gralora.unload(model)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_3d_parameter_within_torchscript_is_no_target():
    model = nn.Sequential(torch.jit.trace(Experts(dtype=None), torch.randn(2, 8)), nn.Linear(8, 8))
    gralora.inject(model, "all-linear", random_config())
    with pytest.raises(ValueError, match="match no module of this model"):
        gralora.inject(model, ["up"], random_config(), adapter_name="b")


class Abstract(abc.ABC, nn.Linear):
    """Its made class has a metaclass of its own."""


PARAMETRIZATIONS = {
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer.eval()),
}


@pytest.mark.parametrize("build", [nn.Linear, Abstract, Doubled])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrization_from_before_inject_can_be_removed_while_an_adapter_is_on(name, build):
    model = nn.Sequential(PARAMETRIZATIONS[name](build(16, 16)))
    before, base = fingerprint(model), model(X)
    gralora.unload(gralora.inject(model, ["0"], random_config()))
    assert_same(fingerprint(model), before)
    gralora.inject(model, ["0"], random_config())
    y = model(X)
    assert relative(y, base) > 1e-3
    assert same_bits(copy.deepcopy(model)(X), y)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is gralora.adapted_class(build)
    assert type(model[0]._parameters["weight"]) is nn.Parameter
    torch.testing.assert_close(model(X), y)
    if build is not Doubled:
        gralora.merge(model)
        torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
        gralora.unmerge(model)
    gralora.unload(model)
    assert type(model[0]) is build
    torch.testing.assert_close(model(X), base)


@pytest.mark.parametrize("build", [nn.Linear, Abstract])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_unload_takes_our_class_from_beneath_a_later_parametrization(name, build):
    model = nn.Sequential(build(16, 16))
    gralora.inject(model, ["0"], random_config())
    PARAMETRIZATIONS[name](model[0])
    y = model(X)
    with gralora.disable_adapter(model):
        base = model(X)
    assert relative(y, base) > 1e-3
    gralora.unload(model)
    assert same_bits(model(X), base)
    assert not any("Gralora" in cls.__name__ for cls in type(model[0]).__mro__)
    assert parametrize.type_before_parametrizations(model[0]) is build
    assert "gralora_adapters" not in dict(model[0].named_children())
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is build
    torch.testing.assert_close(model(X), base)


def test_parametrizations_before_and_after_inject_come_off_in_any_order():
    for order in (("weight", "bias"), ("bias", "weight")):
        for unloaded in (0, 1, 2):
            layer = parametrizations.weight_norm(nn.Linear(16, 16))
            gralora.inject(layer, "", random_config())
            parametrize.register_parametrization(layer, "bias", nn.Tanh())
            for step, name in enumerate([*order, None]):
                if step == unloaded:
                    gralora.unload(layer)
                if name is not None:
                    parametrize.remove_parametrizations(layer, name)
            assert type(layer) is nn.Linear
            assert set(dict(layer.named_parameters())) == {"weight", "bias"}


def test_a_parametrized_head_can_be_saved_with_an_adapter():
    model = nn.ModuleDict(
        {"a": nn.Linear(16, 16), "head": parametrizations.weight_norm(nn.Linear(16, 4))}
    )
    before, base = fingerprint(model), model["head"](X)
    gralora.inject(model, ["a"], random_config(modules_to_save=["head"]))
    gralora.inject(model, ["a"], random_config(modules_to_save=["head"]), adapter_name="b")
    assert same_bits(model["head"](X), base)
    gralora.unload(model)
    assert_same(fingerprint(model), before)


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
