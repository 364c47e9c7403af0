"""The table of formats, and where adapters lie."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gralora
from gralora.files.formats import FORMATS, LORA_FORMATS, exact_rank, located, model_fields

from ..llama_cpp import small_model
from ..models import llama, random_config, relative

TOKENS = torch.arange(8)[None]
DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", ["saved.safetensors", "saved_peft", "saved_lora"])
def test_stored_adapters_compute_what_they_did_when_they_were_written(name):
    base = load_file(DATA / "base_of_saved.safetensors")
    x, y = base.pop("x"), base.pop("y")
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model.load_state_dict(base)
    assert relative(model(x), y) > 1e-2
    gralora.load_adapter(model, DATA / name)
    assert relative(model(x), y) < 1e-6


def test_every_format_of_plain_lora_is_in_the_table():
    assert set(FORMATS) > LORA_FORMATS and exact_rank(gralora.files.own.AdapterFile({}, {})) == 1


def test_an_adapter_on_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    torch.manual_seed(0)
    base = llama()
    model = gralora.inject(llama_of(base), ["q_proj"], random_config())
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    gralora.save_adapter(model, folder / "snapshots" / ("0" * 40), format="lora")
    again = gralora.load_adapter(llama_of(base), "owner/name")
    assert relative(again(TOKENS).logits, model(TOKENS).logits) < 1e-5
    for file in (folder / "snapshots" / ("0" * 40)).iterdir():
        file.unlink()
    gralora.save_adapter(model, folder / "snapshots" / ("0" * 40) / "adapter.safetensors")
    again = gralora.load_adapter(llama_of(base), "owner/name")
    assert relative(again(TOKENS).logits, model(TOKENS).logits) < 1e-5
    with pytest.raises(
        FileNotFoundError, match="no adapter at owner/other, nor on the Hugging Face hub"
    ):
        gralora.load_adapter(llama(), "owner/other")


def llama_of(base):
    model = llama()
    model.load_state_dict(base.state_dict())
    return model


def test_a_missing_package_and_a_missing_path_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'gralora\[hub\]'"):
        gralora.load_adapter(llama(), "owner/name")
    assert located(tmp_path / "none") == tmp_path / "none"
    assert located("one") == Path("one")


def test_what_is_remembered_of_a_models_config():
    fields = model_fields(small_model("gpt2").config)
    assert (
        fields["model_type"] == "gpt2"
        and fields["num_hidden_layers"] == 2
        and fields["num_attention_heads"] == 4
    )
    assert model_fields({"model_type": "gpt2", "n_layer": 3, "n_head": 5})["num_hidden_layers"] == 3
    nested = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 7},
    }
    assert model_fields(nested)["model_type"] == "gemma3_text"
    assert model_fields(None) is None and model_fields({"a": 1}) is None
