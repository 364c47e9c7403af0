"""mlx-lm's folder, read by mlx-lm itself."""

import copy
import json

import pytest
import torch

import gralora
from gralora.files.checkpoint import read_adapter

from ..llama_cpp import small_model
from ..models import random_config, relative
from ..needs import needs

mlx = needs("mlx.core")
needs("mlx_lm")
TOKENS = [[5, 9, 33, 2, 60, 17]]


def expected(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def in_mlx(base, adapter, tmp_path):
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    base.save_pretrained(tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.eval()
    return torch.tensor(model(mlx.array(TOKENS)).tolist())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_mlx_computes_what_pytorch_does(name, tmp_path):
    base = small_model(name)
    rules = {
        r".*\.0\..*_proj": random_config(alpha=2, gralora_dropout=0.1),
        "all-linear": random_config(r=8, gralora_k=4, hybrid_r=2, alpha=1),
    }
    model = gralora.inject(copy.deepcopy(base), rules).eval()
    gralora.save_adapter(model, tmp_path / "mlx", format="mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (
        config["lora_parameters"]["rank"] == 34
        and "self_attn.q_proj" in config["lora_parameters"]["keys"]
    )
    assert relative(in_mlx(base, None, tmp_path), expected(base)) < 1e-3
    assert relative(in_mlx(base, tmp_path / "mlx", tmp_path), expected(model)) < 1e-3
    assert relative(expected(base), expected(model)) > 0.1
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "mlx").eval()
    assert relative(expected(again), expected(model)) < 1e-5


def test_embeddings_heads_and_one_scale(tmp_path):
    base = small_model("llama")
    model = gralora.inject(
        copy.deepcopy(base), ["embed_tokens", "lm_head", "v_proj"], random_config(alpha=3)
    ).eval()
    gralora.save_adapter(model, tmp_path / "mlx", format="mlx", rank=8, dtype=torch.float16)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    assert config["rank"] == 8 and sorted(config["keys"]) == [
        "lm_head",
        "model.embed_tokens",
        "self_attn.v_proj",
    ]
    assert relative(in_mlx(base, tmp_path / "mlx", tmp_path), expected(model)) < 5e-3
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "mlx").eval()
    assert relative(expected(again), expected(model)) < 5e-3
    assert relative(expected(base), expected(model)) > 0.1


def test_what_it_cannot_hold_and_what_is_none_is_refused(tmp_path):
    from ..layers.test_experts import mixtral

    for model, targets, config, why in (
        (
            small_model("llama"),
            ["q_proj"],
            {"modules_to_save": ["lm_head"]},
            "trains 'lm_head' as well, which can't be saved with format='mlx'",
        ),
        (mixtral(), ["down_proj"], {}, "of kind 'experts', can't be saved with format='mlx'"),
        (
            torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1)),
            ["0"],
            {},
            "'0', of kind 'convolution', can't be saved .*mlx-lm adapts linear layers",
        ),
    ):
        gralora.inject(model, targets, random_config(**config))
        with pytest.raises(ValueError, match=why):
            gralora.save_adapter(model, tmp_path / "a", format="mlx")
    assert not list(tmp_path.iterdir())
    from safetensors.torch import save_file

    folder = tmp_path / "own"
    folder.mkdir()
    a, b = torch.randn(4, 2), torch.randn(2, 4)
    for config, tensors, why in (
        ({"fine_tune_type": "full"}, {"x.lora_a": a}, "describes no LoRA"),
        ({"lora_parameters": {"scale": 1}}, {"x.lora_a": a}, "holds 'x.lora_a' without 'x.lora_b'"),
        (
            {"lora_parameters": {"scale": 1}},
            {"x.lora_a": a, "x.lora_b": a + 1},
            "has a pair of shapes",
        ),
        ({"lora_parameters": {"scale": "1"}}, {"x.lora_a": a, "x.lora_b": b}, "a scale of '1'"),
        (
            {"lora_parameters": {"scale": 1}},
            {"x.lora_a": a.long(), "x.lora_b": b},
            "x.lora_a is of type I64",
        ),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapters.safetensors")
        with pytest.raises(gralora.AdapterFileError, match=why):
            read_adapter(folder)
