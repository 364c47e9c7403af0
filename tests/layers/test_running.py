"""Who is running; what follows from it is in `test_lazy_weight`."""

import sys
import types

import pytest
import torch
from torch import nn

from gralora.layers.running import forward_runs


class Asking(nn.Module):
    def __init__(self, about=None):
        super().__init__()
        self.__dict__["about"] = about

    def forward(self, x):
        return forward_runs(self.__dict__["about"])

    def training_step(self):
        return forward_runs(None)

    def elsewhere(self):
        return forward_runs(None)


def test_a_forward_runs_within_a_call_and_a_training_step_and_nowhere_else():
    module = Asking()
    assert module(torch.ones(1)) is True and module.training_step() is True
    assert module.elsewhere() is False and forward_runs(None) is False


def test_the_innermost_forward_counts():
    module = Asking()
    module.__dict__["about"] = module
    assert module(1) is False
    assert Asking(about=module)(1) is True
    assert nn.Sequential(module)(1) is False


SOURCE = """
from torch import nn
from gralora.layers.running import forward_runs


class Model(nn.Module):
    def forward(self):
        return asked()


def asked():
    return forward_runs(None)
"""


@pytest.mark.parametrize(
    ("name", "is_engine"),
    [
        ("model", False),
        ("accelerated_models.head", False),
        ("accelerate_models", False),
        ("my.accelerate", False),
        ("deepspeed_utils", False),
        ("deepspeedchat.models", False),
        ("diffusers.hooks_of_mine", False),
        ("diffusers.models", False),
        ("torch.distributed_models", False),
        ("torch.nn.parallel_layers", False),
        ("Accelerate.hooks", False),
        ("", False),
        ("accelerate", True),
        ("accelerate.hooks", True),
        ("deepspeed.runtime.zero", True),
        ("diffusers.hooks", True),
        ("torch.distributed.fsdp", True),
        ("torch.nn.parallel.distributed", True),
    ],
)
def test_an_engine_is_known_by_the_exact_name_of_its_package(name, is_engine, monkeypatch):
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(SOURCE, module.__dict__)
    assert module.Model()() is not is_engine
