"""The library's own file."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

import gralora
from gralora import AdapterFileError

from ..models import MIXED, assert_same, fingerprint, pair
from ..written import GOOD, write

X = torch.linspace(-1, 1, 160).reshape(2, 5, 16)


def test_the_file_describes_itself(tmp_path):
    one, _ = pair()
    gralora.inject(one, MIXED)
    gralora.save_adapter(one, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["format"] == "gralora"
    assert metadata["format_version"] == "1"
    assert metadata["gralora_version"] == gralora.__version__
    assert json.loads(metadata["modules"])["q"] == {
        "r": 2,
        "hybrid_r": 0,
        "alpha": 3.5,
        "gralora_k": 1,
        "gralora_dropout": 0.0,
    }
    assert {
        "q.gralora_A",
        "q.gralora_B",
        "mlp.0.gralora_A_general.weight",
        "mlp.2.gralora_B_general.weight",
    } <= keys
    assert keys == set(gralora.adapter_state_dict(one))


def test_use_rslora_is_written_only_where_it_is_set(tmp_path):
    one, two = pair()
    gralora.inject(
        one, {"q": MIXED["q"], "k|v": dataclasses.replace(MIXED["k|v"], use_rslora=True)}
    )
    gralora.save_adapter(one, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        modules = json.loads(file.metadata()["modules"])
    assert {name: fields.get("use_rslora") for name, fields in modules.items()} == {
        "q": None,
        "k": True,
        "v": True,
    }
    gralora.load_adapter(two, tmp_path / "a.safetensors")
    assert torch.equal(two.eval()(X), one.eval()(X))
    assert two.v.gralora_adapters["default"].config == dataclasses.replace(
        MIXED["k|v"], use_rslora=True, init_weights=True
    )


def test_a_file_written_by_hand_loads(tmp_path):
    _, two = pair()
    y = two(X)
    assert not torch.allclose(gralora.load_adapter(two, write(tmp_path / "a"))(X), y)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 4.0}, "r=4.0 is a float"),
        ({"r": True}, "r=True is a bool"),
        ({"r": 0}, "r=0 is not legal"),
        ({"r": 10**18, "gralora_k": 1}, "at most"),
        ({"gralora_k": 3}, "gralora_k=3 does not divide r=4"),
        ({"alpha": -1}, "alpha=-1"),
        ({"alpha": "8"}, "alpha='8'"),
        ({"gralora_dropout": -1}, "gralora_dropout=-1"),
        ({"hybrid_r": 1}, "gralora_A_general"),
        ({"r": 8}, "has shape"),
        ({"gralora_k": 1}, "has shape"),
        ({"extra": 1}, "must hold exactly"),
        ({"use_rslora": True, "use_dora": False}, "must hold exactly"),
        ({"use_rslora": 1}, "use_rslora=1"),
    ],
)
def test_illegal_metadata_is_refused_before_the_model_is_touched(tmp_path, fields, text):
    _, two = pair()
    before = fingerprint(two)
    with pytest.raises(AdapterFileError, match=text):
        gralora.load_adapter(two, write(tmp_path / "a", {"q": {**GOOD, **fields}}))
    assert_same(fingerprint(two), before)
