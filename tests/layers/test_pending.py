"""Gradients belong to what acted in the forward, whatever acts by the backward."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gralora

from ..models import mlp, random_config, randomize_, relative

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def two(wrap=False):
    model = mlp(16, 24, 16)
    if wrap:
        model = Checkpointed(model, wrap)
    for name in "ab":
        gralora.inject(model, "all-linear", random_config(), adapter_name=name)
    randomize_(model)
    return model


class Checkpointed(nn.Module):
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        return checkpoint(
            self.inner, x.clone().requires_grad_(), use_reentrant=self.how == "reentrant"
        )


def gradients(model, name):
    return [
        None if p.grad is None else p.grad.clone() for p in gralora.adapter_parameters(model, name)
    ]


def separately(model, name):
    other = copy.deepcopy(model)
    gralora.set_adapter(other, name)
    other.zero_grad()
    other(X).square().sum().backward()
    return gradients(other, name)


@pytest.mark.parametrize("plain", [False, True])
def test_one_backward_after_several_switches_reaches_all_that_acted(plain, monkeypatch):
    from gralora.maths import autograd

    if plain:
        monkeypatch.setattr(autograd, "usable", lambda *args: False)
    model = two()
    wanted = {name: separately(model, name) for name in "ab"}
    loss = 0
    for name in ("a", "b", "a"):
        gralora.set_adapter(model, name)
        loss = loss + model(X).square().sum()
    gralora.set_adapter(model, "b")
    loss.backward()
    for name, times in (("a", 2), ("b", 1)):
        for grad, other in zip(gradients(model, name), wanted[name], strict=True):
            assert relative(grad, times * other) < 1e-6
    assert [p.requires_grad for p in gralora.adapter_parameters(model, "a")] == [False] * 4


def test_saved_modules_and_biases_too():
    model = mlp(16, 24, 16)
    for name in "ab":
        gralora.inject(
            model,
            ["0"],
            random_config(bias="gralora_only", modules_to_save=["2"]),
            adapter_name=name,
        )
    wanted = separately(model, "a")
    gralora.set_adapter(model, "a")
    loss = model(X).square().sum()
    gralora.set_adapter(model, "b")
    loss.backward()
    for grad, other in zip(gradients(model, "a"), wanted, strict=True):
        assert relative(grad, other) < 1e-6
    assert gradients(model, "b") == [None] * 5


def test_what_is_trained_is_said_independently_of_what_acts():
    model = two()

    def trains():
        own = {n: gralora.adapter_parameters(model, n) for n in "ab"}
        return {n: {p.requires_grad for p in parameters} for n, parameters in own.items()}

    gralora.set_adapter(model, "a", trainable=["a", "b"])
    assert trains() == {"a": {True}, "b": {True}}
    gralora.set_adapter(model, ["a", "b"], trainable="b")
    assert trains() == {"a": {False}, "b": {True}}
    gralora.set_adapter(model, {"a": 0.5}, trainable=False)
    assert trains() == {"a": {False}, "b": {False}}
    assert not model(X).requires_grad
    gralora.set_adapter(model, "b", trainable=True)
    assert trains() == {"a": {False}, "b": {True}}
    with pytest.raises(KeyError, match="no adapter 'c' in this model"):
        gralora.set_adapter(model, "a", trainable=["c"])


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_under_checkpointing_a_backward_before_each_switch_is_right(how):
    model = two(how)
    for name in ("a", "b", "a"):
        wanted = separately(two_like(model), name)
        gralora.set_adapter(model, name)
        model.zero_grad()
        model(X).square().sum().backward()
        for grad, other in zip(gradients(model, name), wanted, strict=True):
            assert relative(grad, other) < 1e-6


def two_like(model):
    other = copy.deepcopy(model)
    other.forward = other.inner
    return other


def test_copies_and_pickles_of_a_switched_model():
    model = two()
    gralora.set_adapter(model, "b")
    model(X).square().sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
        gralora.set_adapter(other, "a")
        other(X).sum().backward()
