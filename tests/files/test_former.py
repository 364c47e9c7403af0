"""What the version before the folders wrote is read by this one: `tests/data/` was written by its
code.
"""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gralora

from ..models import X, relative

DATA = Path(__file__).parents[1] / "data"


def test_a_pickled_model_of_the_version_before_computes_the_same():
    found = pickle.loads((DATA / "pickled_before_the_folders.pkl").read_bytes())
    model = found["model"]
    assert relative(model(X), found["y"]) < 1e-6
    with gralora.disable_adapter(model):
        assert relative(model(X), found["y"]) > 1e-2
    assert gralora.adapter_names(model) == ["a", "b"]
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))
    assert not any(
        isinstance(module, gralora.GraloraLayer) for module in gralora.unload(model).modules()
    )


@pytest.mark.parametrize("name", [".safetensors", "_peft", "_lora"])
def test_adapter_files_of_the_version_before_compute_the_same(name):
    base = load_file(DATA / "base_of_saved.safetensors")
    x, y = base.pop("x"), base.pop("y")
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model.load_state_dict(base)
    assert relative(model(x), y) > 1e-2
    gralora.load_adapter(model, DATA / f"saved_before_the_folders{name}")
    assert relative(model(x), y) < 1e-6
