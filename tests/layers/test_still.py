"""Which modules run as in eval while an adapter trains; what comes of it is in
`tests/model/test_statistics.py`.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gralora
from gralora.layers.still import StillModule

from ..models import random_config


@pytest.mark.parametrize(
    ("module", "still"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm1d(4, track_running_stats=True), True),
        (nn.InstanceNorm1d(4), False),
        (nn.BatchNorm1d(4, track_running_stats=False), False),
        (nn.LayerNorm(4), False),
        (parametrizations.spectral_norm(nn.Linear(4, 4)).parametrizations.weight[0], True),
        (nn.Embedding(4, 4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_with_running_statistics_and_spectral_norm_are_kept_still(module, still):
    assert StillModule.accepts(module) is still
    model = gralora.inject(
        nn.ModuleDict({"fc": nn.Linear(4, 4), "other": module}),
        ["fc"],
        random_config(r=2, gralora_k=1),
    )
    assert isinstance(model["other"], StillModule) is still
    assert isinstance(model["other"], type(module))
    gralora.unload(model)
    assert not isinstance(model["other"], StillModule)


def test_its_mode_is_what_it_was_after_a_forward_that_fails():
    model = gralora.inject(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ["0"], random_config(r=2, gralora_k=1)
    ).train()
    with pytest.raises(RuntimeError):
        model[1](torch.randn(2, 5))
    assert model[1].training
