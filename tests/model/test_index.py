"""A layer that was rebuilt after inject has lost its adapter: what is missing is named before
anything is written.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import gralora

from ..models import Block, mlp, random_config


def rebuilt(model, name):
    parent, _, own = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), own, nn.Linear(old.in_features, old.out_features))
    return model


@pytest.mark.filterwarnings("ignore:.*was trained on another base")
def test_what_has_vanished_is_named_and_nothing_is_written(tmp_path):
    model = gralora.inject(Block(), "all-linear", random_config(bias="gralora_only"))
    gralora.save_adapter(model, tmp_path / "whole")
    rebuilt(rebuilt(model, "q"), "mlp.0")
    for format in ("gralora", "peft", "lora"):
        with pytest.raises(
            ValueError,
            match=(r"2 of what adapter 'default' was injected into are there no more: q, mlp\.0"),
        ):
            gralora.save_adapter(model, tmp_path / "left", format=format)
        assert not (tmp_path / "left").exists()
    gralora.save_adapter(model, tmp_path / "left", allow_missing=True)
    fresh = gralora.load_adapter(Block(), tmp_path / "left")
    assert len(gralora.summary(fresh)) == len(gralora.summary(model)) == 4


def test_the_record_goes_with_the_model_and_ends_with_the_adapter(tmp_path):
    model = gralora.inject(
        nn.ModuleDict({"inner": mlp(16, 24, 8)})["inner"], "all-linear", random_config()
    )
    outer = nn.ModuleDict({"inner": model})
    gralora.inject(outer, [r"inner.2"], random_config(), adapter_name="b")
    for other in (
        outer,
        copy.deepcopy(outer),
        pickle.loads(pickle.dumps(outer)),
        gralora.shared_copy(outer),
    ):
        gralora.save_adapter(other, tmp_path / "a")
        rebuilt(other, "inner.2")
        for name in ("default", "b"):
            with pytest.raises(ValueError, match=r"inner\.2"):
                gralora.save_adapter(other, tmp_path / "a", name)
    gralora.delete_adapter(outer, "default")
    gralora.inject(outer, "all-linear", random_config())
    gralora.save_adapter(outer, tmp_path / "a")
    gralora.unload(outer)
    assert not [m for m in outer.modules() if "_gralora_record" in m.__dict__]
    gralora.load_adapter(outer, tmp_path / "a")
    gralora.save_adapter(outer, tmp_path / "a")


def test_a_layer_that_is_the_model_itself_and_one_that_another_name_leads_to(tmp_path):
    layer = gralora.inject(nn.Linear(16, 8), "", random_config())
    gralora.save_adapter(layer, tmp_path / "a")
    model = nn.ModuleDict({"a": layer, "b": layer})
    gralora.save_adapter(model, tmp_path / "a")
    fresh = nn.ModuleDict({"a": nn.Linear(16, 8)})
    fresh["a"].load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(3, 16)
    assert torch.equal(gralora.load_adapter(fresh, tmp_path / "a")["a"](x), layer(x))
