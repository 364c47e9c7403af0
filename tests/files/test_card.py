"""The card of a folder that PEFT's users share."""

import gralora

from ..models import llama, random_config


def test_a_folder_says_what_it_is_of_and_a_card_of_ones_own_stays(tmp_path):
    model = llama()
    model.config._name_or_path = "owner/base"
    gralora.inject(model, ["q_proj"], random_config(r=8, gralora_k=4, alpha=3))
    for format in ("lora", "peft"):
        gralora.save_adapter(model, tmp_path / format, format=format)
        card = (tmp_path / format / "README.md").read_text()
        assert (
            "base_model: owner/base" in card and "2 layers" in card and "load_adapter(model" in card
        )
        assert ("vllm serve owner/base" in card) == (format == "lora")
    assert "r 8, k 4, alpha 3." in card
    (tmp_path / "lora" / "README.md").write_text("mine")
    gralora.save_adapter(model, tmp_path / "lora", format="lora")
    assert (tmp_path / "lora" / "README.md").read_text() == "mine"


def test_without_a_name_it_says_base(tmp_path):
    gralora.save_adapter(
        gralora.inject(llama(), ["q_proj"], random_config()), tmp_path / "a", format="peft"
    )
    text = (tmp_path / "a" / "README.md").read_text()
    assert "base_model" not in text and "`BASE`" in text
