"""Who is running; what follows from it is in `test_unevaluated`."""

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
