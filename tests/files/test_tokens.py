"""Token rows in files that somebody else has written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import gralora

from ..command_line import run
from ..model.test_tokens import NEW, trained
from ..models import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*was trained on another base")


def written(tmp_path):
    torch.manual_seed(0)
    model = trained(llama())
    gralora.save_adapter(model, tmp_path / "lora", format="lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("said", [None, [1], [1, "2", 3], {"other": NEW}, [1, 1, 2], [-1, 2, 3]])
def test_a_folder_that_does_not_say_which_tokens_is_refused(said, tmp_path):
    folder = written(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": NEW}
    config["trainable_token_indices"] = said
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(gralora.AdapterFileError, match="tokens of 'model.embed_tokens'"):
        gralora.load_adapter(llama(), folder)


def test_a_list_is_of_the_one_embedding(tmp_path):
    folder = written(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["trainable_token_indices"] = NEW
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = gralora.load_adapter(llama(), folder)
    assert model.model.embed_tokens.gralora_saved["default"].indices.tolist() == NEW


def test_rows_of_another_width_or_without_indices_are_refused(tmp_path):
    torch.manual_seed(0)
    gralora.save_adapter(trained(llama()), tmp_path / "a.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    for key, value, why in (
        ("model.embed_tokens.trainable_tokens", torch.randn(3, 16), "shapes differ"),
        ("model.embed_tokens.trainable_tokens", torch.randn(2, 32), "no row for each of them"),
        (
            "model.embed_tokens.token_indices",
            torch.tensor([1.0, 2.0, 3.0]),
            "no row for each of them",
        ),
    ):
        tensors = load_file(tmp_path / "a.safetensors")
        tensors[key] = value
        save_file(tensors, tmp_path / "b.safetensors", metadata)
        with pytest.raises(gralora.AdapterFileError, match=why):
            gralora.load_adapter(llama(), tmp_path / "b.safetensors")


def test_a_tied_checkpoint_takes_no_adapter_of_the_embedding_alone(tmp_path):
    from gralora.__main__ import main

    from ..models import random_config

    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    gralora.save_adapter(
        gralora.inject(base, ["embed_tokens"], random_config()), tmp_path / "a.safetensors"
    )
    assert (
        main(
            [
                "merge",
                str(tmp_path / "base"),
                str(tmp_path / "a.safetensors"),
                str(tmp_path / "out"),
            ]
        )
        == 1
    )
    assert not (tmp_path / "out").exists()
    untied = llama(tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "untied")
    model = gralora.inject(untied, ["embed_tokens"], random_config())
    gralora.save_adapter(model, tmp_path / "b.safetensors")
    assert (
        main(
            [
                "merge",
                str(tmp_path / "untied"),
                str(tmp_path / "b.safetensors"),
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    embedding = model.model.embed_tokens
    torch.testing.assert_close(merged, embedding.weight + gralora.delta_weight(embedding))


def test_a_checkpoint_without_the_tokens_is_refused_on_disk(tmp_path, capsys):
    model = trained(llama())
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    weights = {key: t.contiguous() for key, t in llama().state_dict().items()}
    short = {
        **weights,
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:10].contiguous(),
    }
    lacking = {key: t for key, t in weights.items() if "embed_tokens" not in key}
    for tensors, why in (
        (short, "has 10 tokens, and the adapter trains token 17"),
        (lacking, "of which the adapter trains"),
    ):
        save_file(tensors, tmp_path / "base.safetensors")
        assert (
            run(
                "merge",
                tmp_path / "base.safetensors",
                tmp_path / "a.safetensors",
                tmp_path / "out.safetensors",
            )
            == 1
        )
        assert why in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
