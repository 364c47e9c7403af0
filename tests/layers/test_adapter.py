"""One adapter: its name, and its first values."""

import pytest
import torch

import gralora
from gralora import GraloraConfig

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
