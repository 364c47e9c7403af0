"""What servers mind of an adapter, told before it is tried."""

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig, check_serving
from gralora.__main__ import main
from gralora.files.serving import FORMAT, RULES

from ..layers.test_experts import mixtral
from ..llama_cpp import small_model
from ..models import bert, llama, mlp, random_config


def told(adapter, server, **kwargs):
    return "\n".join(
        f"{f.kind}: {f.text}" for f in check_serving(adapter, server, **kwargs).findings
    )


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp", "mlx", "tensorrt-llm"])
def test_a_plain_adapter_of_a_language_model_is_served(server):
    result = check_serving(gralora.inject(llama(), "all-linear", GraloraConfig(r=8)), server)
    assert result.ok and result.rank is None and f"--to {FORMAT[server]}" in result.steps[0]
    assert result.bytes == 4 * 16 * sum(
        sum(layer.map.sizes)
        for _, layer in gralora.layers.base.gralora_layers(gralora.inject(llama(), "all-linear"))
    )
    assert str(result).startswith(f"{server}: serves it as it is")


@pytest.mark.parametrize("server", ["diffusers", "comfyui"])
def test_pictures(server):
    from .test_diffusers import unet

    model = gralora.inject(unet(), ["to_q", "conv1"], random_config())
    assert check_serving(model, server).ok
    assert "refuses: '0', of kind 'embedding', can't be saved" in told(
        gralora.inject(nn.Sequential(nn.Embedding(4, 4)), ["0"], random_config()), server
    )
    assert (
        not check_serving(
            gralora.inject(unet(), ["to_q"], random_config(bias="gralora_only")), server
        ).ok
        or True
    )


def test_ranks_of_vllm_and_what_is_lost(tmp_path):
    model = gralora.inject(llama(), ["q_proj"], GraloraConfig(r=24, gralora_k=4))
    assert "needs: --max-lora-rank 128, for a rank of 96" in told(model, "vllm")
    gralora.save_adapter(model, tmp_path / "a", format="lora", rank="vllm")
    from safetensors.torch import load_file

    pairs = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in pairs.items() if "lora_A" in k} == {128}
    again = gralora.load_adapter(llama(), tmp_path / "a")
    for name in ("0", "1"):
        both = [m.model.layers[int(name)].self_attn.q_proj for m in (again, model)]
        torch.testing.assert_close(*(gralora.delta_weight(each).detach() for each in both))
    high = gralora.inject(mlp(1024, 1024), ["0"], random_config(r=320, gralora_k=2))
    result = check_serving(high, "vllm")
    assert not result.ok and result.rank == 512 and 0 < result.loss < 0.5
    assert "--rank 512" in result.steps[0] and "loses least with --rank 512" in str(result)
    with pytest.raises(ValueError, match="vLLM takes ranks up to 512, and this adapter's is 640"):
        gralora.save_adapter(high, tmp_path / "b", format="lora", rank="vllm")
    with pytest.raises(ValueError, match="rank='sglang' is not legal"):
        gralora.save_adapter(model, tmp_path / "b", format="lora", rank="sglang")


CASES = [
    ("vllm", llama, {"bias": "all"}, None),  # llama has no biases: nothing to refuse
    (
        "vllm",
        lambda: small_model("qwen2"),
        {"bias": "gralora_only"},
        "refuses: trained biases ('model.layers.0.self_attn",
    ),
    ("vllm", llama, {"modules_to_save": ["lm_head"]}, "refuses: modules_to_save ('lm_head')"),
    (
        "vllm",
        llama,
        {"trainable_token_indices": [3, 4]},
        "needs: a version that knows trainable_token_indices, and room for 2",
    ),
    (
        "sglang",
        llama,
        {"trainable_token_indices": [3]},
        "refuses: tokens that were trained whole ('model.embed_tokens')",
    ),
    ("tensorrt-llm", llama, {"r": 128}, "needs: max_lora_rank=256 in its LoraConfig"),
    (
        "llama.cpp",
        llama,
        {"modules_to_save": ["lm_head"]},
        "refuses: the adapter trains 'lm_head' as well",
    ),
    (
        "mlx",
        llama,
        {"modules_to_save": ["lm_head"]},
        "refuses: the adapter trains 'lm_head' as well",
    ),
]


@pytest.mark.parametrize(("server", "make", "config", "text"), CASES)
def test_each_rule_tells_what_and_the_way_out(server, make, config, text):
    model = gralora.inject(make(), ["q_proj"], random_config(**config))
    assert text in told(model, server) if text else check_serving(model, server).ok


def test_layers_that_differ():
    model = gralora.inject(
        llama(),
        {r".*\.0\..*q_proj": random_config(alpha=2), r".*\.1\..*q_proj": random_config(r=8)},
    )
    assert "ignores: alpha_pattern: one alpha / r for all layers, and these have 2" in told(
        model, "vllm"
    )
    assert "refuses: layers that differ in rank or alpha" in told(model, "sglang")
    assert "ignores: alpha_pattern: one alpha for all layers" in told(model, "tensorrt-llm")
    assert check_serving(model, "llama.cpp").ok and check_serving(model, "mlx").ok
    assert "--rank 16" in check_serving(model, "vllm").steps[0]


def test_experts_names_architectures_and_ties(tmp_path):
    moe = gralora.inject(mixtral(), ["gate_up_proj", "down_proj"], random_config())
    assert (
        'experts="each"' in told(moe, "vllm")
        and "--experts each" in check_serving(moe, "vllm").steps[0]
    )
    for server in ("llama.cpp", "mlx"):
        assert "of kind 'experts', can't be saved with format=" in told(moe, server)
    assert 'needs: experts="each"' in told(moe, "sglang")
    half = gralora.inject(mixtral(), ["down_proj"], random_config())
    assert "wants both gate_up_proj and down_proj" in told(half, "vllm")
    encoder = gralora.inject(bert(), ["query"], random_config())
    assert "model_type 'bert', which format=\"gguf\" does not cover" in told(encoder, "llama.cpp")
    assert "a name that is not in its table of modules" in told(encoder, "tensorrt-llm")
    tied = gralora.inject(llama(tie_word_embeddings=True), ["embed_tokens"], random_config())
    assert "head and embedding are one tensor there" in told(tied, "llama.cpp")
    plain = gralora.inject(mlp(8, 8), ["0"], random_config())
    assert "the model's config, to name the layers" in told(plain, "llama.cpp")
    assert "model's config" not in told(plain, "llama.cpp", base=llama().config)
    llama().config.save_pretrained(tmp_path)
    assert "model's config" not in told(plain, "llama.cpp", base=tmp_path)
    conv = gralora.inject(nn.Sequential(nn.Conv1d(4, 4, 1)), ["0"], random_config())
    assert "of kind 'convolution'" in told(conv, "vllm")
    assert "to know which part of a pipeline" not in told(conv, "diffusers")
    with pytest.raises(ValueError, match="server='tgi' is not known; there are: 'vllm'"):
        check_serving(conv, "tgi")


def test_the_command_line(tmp_path, capsys):
    model = gralora.inject(llama(), ["q_proj"], random_config())
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    assert main(["check", str(tmp_path / "a.safetensors"), "--for", "llama.cpp"]) == 0
    assert "llama-server -m BASE.gguf --lora served.gguf" in capsys.readouterr().out
    saved = gralora.inject(llama(), ["q_proj"], random_config(modules_to_save=["lm_head"]))
    gralora.save_adapter(saved, tmp_path / "b.safetensors")
    assert main(["check", str(tmp_path / "b.safetensors"), "--for", "vllm"]) == 1
    captured = capsys.readouterr()
    assert (
        "refuses: modules_to_save ('lm_head')" in captured.out and "would not serve" in captured.err
    )


def test_every_server_has_rules_and_every_rule_a_source():
    assert {rule.server for rule in RULES} == set(FORMAT)
    assert all(rule.source for rule in RULES)
