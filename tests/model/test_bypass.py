"""Parents that read a weight and never call its layer."""

import pytest
import torch
from torch import nn

import gralora
from gralora.layers.base import gralora_layers

from ..models import assert_same, fingerprint, random_config

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Reads(nn.Module):
    """Computes with a weight, and never calls the layer; or does both; or only asks for its type."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(16, 16), how

    def forward(self, x):
        return self.deeper(x)

    def deeper(self, x):
        return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)


class Alias(Reads):
    def deeper(self, x):
        weight = self.fc.weight
        return x.to(self.fc.weight.dtype) @ weight.mT


class Calls(Reads):
    def deeper(self, x):
        x = x.to(self.fc.weight.dtype).to(self.fc.weight.device)
        return self.fc.forward(x) if self.how == "forward" else self.fc(x) + self.fc.weight.square().mean()


@pytest.mark.parametrize("cls", [Reads, Alias])
def test_a_parent_that_reads_the_weight_and_never_calls_the_layer_is_refused_by_name(cls):
    model = nn.Sequential(cls(""), nn.Linear(16, 16))
    before = fingerprint(model)
    text = f"'0.fc' has its weight read by the forward of {cls.__name__}, which never calls it: an adapter would have no effect"
    for targets in (["fc"], r".*fc", lambda name, module: isinstance(module, nn.Linear)):
        with pytest.raises(ValueError, match=text):
            gralora.inject(model, targets, random_config())
    assert_same(fingerprint(model), before)
    gralora.inject(model, "all-linear", random_config())
    assert [name for name, _ in gralora_layers(model)] == ["1"]
    alone = cls("")
    gralora.inject(alone.fc, "", random_config())  # the parent is not in sight: see README, Limits


@pytest.mark.parametrize("how", ["call", "forward"])
def test_a_parent_that_calls_the_layer_in_any_way_is_adapted(how):
    model = Calls(how)
    base = model(X)
    gralora.inject(model, ["fc"], random_config())
    assert not torch.allclose(model(X), base)


def test_a_layer_shared_by_one_that_calls_and_one_that_reads_is_adapted():
    model = nn.ModuleDict({"calls": Calls("call"), "reads": Reads("")})
    model["reads"].fc = model["calls"].fc
    base = model["calls"](X)
    gralora.inject(model, ["calls.fc"], random_config())
    assert not torch.allclose(model["calls"](X), base)


def test_a_parent_whose_source_is_not_at_hand_is_not_judged():
    space = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x @ self.fc.weight.mT\n", space)
    parent = space["Hidden"]()
    parent.fc = nn.Linear(16, 16)
    gralora.inject(parent, ["fc"], random_config())  # see README, Limits
    assert isinstance(parent.fc, gralora.GraloraLinear)
