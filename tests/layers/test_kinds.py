"""The table of kinds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraLayer, GraloraLinear, adapted_class

from ..models import Doubled, random_config


def test_adapted_class_ends_in_the_own_forward_of_the_class():
    made = adapted_class(Doubled)
    assert made is adapted_class(Doubled)
    assert made.__name__ == "GraloraDoubled"
    assert issubclass(made, GraloraLinear) and issubclass(made, Doubled)
    assert adapted_class(nn.Linear) is GraloraLinear
    assert adapted_class(made) is made
    assert made.__mro__.index(Doubled) > made.__mro__.index(GraloraLayer)
    with pytest.raises(TypeError, match="LayerNorm cannot be adapted as a layer"):
        adapted_class(nn.LayerNorm)

    layer = Doubled(16, 8)
    x = torch.randn(3, 16)
    base = layer(x)
    gralora.inject(layer, "", random_config())
    torch.testing.assert_close(layer(x), base + F.linear(x, gralora.delta_weight(layer)))
