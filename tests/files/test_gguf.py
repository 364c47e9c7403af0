"""llama.cpp's file, served by llama.cpp itself."""

import copy

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.__main__ import main
from gralora.files import gguf as ours
from gralora.files.checkpoint import read_adapter

from ..llama_cpp import served, small_model, write_model
from ..models import bert, mlp, random_config, relative
from ..needs import needs

needs("gguf")
needs("xllamacpp")
TOKENS = [5, 9, 33, 2, 60, 17, 17, 8]


def expected(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)


def adapted(base, **config):
    """Every linear layer but the head, layers of different rank, k and scaling."""
    model = copy.deepcopy(base)
    rules = {
        r".*\.0\..*(_proj|c_attn|c_fc)": random_config(alpha=2, **config),
        "all-linear": random_config(r=8, gralora_k=4, hybrid_r=2, alpha=1, **config),
    }
    return gralora.inject(model, rules).eval()


@pytest.mark.parametrize("name", ours.ARCHITECTURES)
def test_llama_cpp_computes_what_pytorch_does(name, tmp_path):
    base = small_model(name)
    model = adapted(base)
    write_model(base, tmp_path / "base.gguf")
    gralora.save_adapter(model, tmp_path / "adapter.gguf", format="gguf")
    with served(tmp_path / "base.gguf") as plain:
        assert (plain.log_probabilities(TOKENS) - expected(base)).abs().max() < 1e-3
    with served(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as server:
        found = server.log_probabilities(TOKENS)
    assert (found - expected(model)).abs().max() < 1e-3
    assert (expected(base) - expected(model)).abs().max() > 0.1
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "adapter.gguf").eval()
    assert (expected(again) - expected(model)).abs().max() < 1e-4


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_order_of_rows_is_seen(wrong, tmp_path, monkeypatch):
    base = small_model("llama")
    model = gralora.inject(
        copy.deepcopy(base), ["q_proj", "k_proj"], random_config(alpha=32)
    ).eval()
    write_model(base, tmp_path / "base.gguf")
    if wrong:
        monkeypatch.setattr(ours, "permuted", lambda up, heads, back=False: up)
    gralora.save_adapter(model, tmp_path / "adapter.gguf", format="gguf")
    with served(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as server:
        difference = (server.log_probabilities(TOKENS) - expected(model)).abs().max()
    assert difference > 1e-2 if wrong else difference < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_ranks_and_embeddings(dtype, tmp_path):
    base = small_model("qwen2", tie_word_embeddings=False)
    model = gralora.inject(
        copy.deepcopy(base), ["embed_tokens", "lm_head", "v_proj"], random_config(hybrid_r=2)
    ).eval()
    write_model(base, tmp_path / "base.gguf")
    gralora.save_adapter(model, tmp_path / "adapter.gguf", format="gguf", dtype=dtype)
    size = (tmp_path / "adapter.gguf").stat().st_size
    with served(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as server:
        found = server.log_probabilities(TOKENS)
    assert (found - expected(model)).abs().max() < {
        torch.float32: 1e-3,
        torch.float16: 3e-3,
        torch.bfloat16: 3e-2,
    }[dtype]
    assert (expected(base) - expected(model)).abs().max() > 0.1
    gralora.save_adapter(model, tmp_path / "padded.gguf", format="gguf", rank=16, dtype=dtype)
    assert (tmp_path / "padded.gguf").stat().st_size > size
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "padded.gguf").eval()
    assert again.model.layers[0].self_attn.v_proj.gralora_adapters["default"].A.dtype == dtype
    assert relative(expected(again), expected(model)) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_converted_from_a_file_that_knows_its_model_or_with_the_bases_config(tmp_path, capsys):
    base = small_model("llama")
    model = adapted(base)
    write_model(base, tmp_path / "base.gguf")
    gralora.save_adapter(model, tmp_path / "own.safetensors")
    gralora.save_adapter(model, tmp_path / "lora", format="lora")
    base.config.save_pretrained(tmp_path / "model")
    assert (
        main(
            ["convert", str(tmp_path / "own.safetensors"), str(tmp_path / "a.gguf"), "--to", "gguf"]
        )
        == 0
    )
    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "b.gguf"), "--to", "gguf"]) == 1
    assert "what model the adapter is of is not known" in capsys.readouterr().err
    convert = [
        "convert",
        str(tmp_path / "lora"),
        str(tmp_path / "b.gguf"),
        "--to",
        "gguf",
        "--dtype",
        "float32",
    ]
    assert main([*convert, "--base", str(tmp_path / "model")]) == 0
    for file in ("a.gguf", "b.gguf"):
        with served(tmp_path / "base.gguf", tmp_path / file) as server:
            assert (server.log_probabilities(TOKENS) - expected(model)).abs().max() < 1e-3
    assert main(["info", str(tmp_path / "a.gguf")]) == 0
    assert "blk.0.attn_q.weight" in capsys.readouterr().out


def test_what_llama_cpp_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path):
    llama = lambda **more: small_model("llama", **more)  # noqa: E731
    cases = [
        (bert(), ["query"], {}, "model_type='bert' is not covered"),
        (mlp(8, 8), ["0"], {}, "what model the adapter is of is not known"),
        (
            llama(attention_bias=True),
            ["q_proj"],
            {"bias": "gralora_only"},
            "trains 'model.layers.0.self_attn.q_proj.bias'",
        ),
        (llama(), ["q_proj"], {"modules_to_save": ["lm_head"]}, "trains 'lm_head' as well"),
        (
            llama(),
            ["q_proj"],
            {"trainable_token_indices": [3]},
            "trains 'model.embed_tokens' as well",
        ),
        (
            llama(tie_word_embeddings=True),
            ["embed_tokens"],
            {},
            "'model.embed_tokens' is tied to its head",
        ),
        (
            llama(tie_word_embeddings=True),
            ["lm_head"],
            {},
            "'lm_head' is tied to its head or embedding",
        ),
    ]
    for model, targets, config, why in cases:
        gralora.inject(model, targets, random_config(**config))
        with pytest.raises(ValueError, match=why):
            gralora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    model = llama()
    model.extra = nn.Linear(64, 64)
    gralora.inject(model, ["extra"], random_config())
    with pytest.raises(ValueError, match="architecture 'llama' has no weight for 'extra'"):
        gralora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    from ..layers.test_experts import mixtral

    moe = gralora.inject(mixtral(), ["down_proj"], random_config())
    moe.config.model_type = "llama"
    with pytest.raises(
        ValueError, match="of kind 'experts', can't be saved .*llama.cpp's LoRA file"
    ):
        gralora.save_adapter(moe, tmp_path / "a.gguf", format="gguf")
    with pytest.raises(ValueError, match=r"dtype=torch.int8 is not legal"):
        gralora.save_adapter(
            gralora.inject(llama(), ["q_proj"], random_config()), tmp_path / "a", dtype=torch.int8
        )
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    import gguf

    model = gralora.inject(small_model("llama"), ["q_proj"], random_config())
    gralora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    with pytest.raises(
        gralora.AdapterFileError,
        match="for models that llama.cpp calls 'llama', and this is 'qwen2'",
    ):
        gralora.load_adapter(small_model("qwen2"), tmp_path / "a.gguf")
    with pytest.raises(gralora.AdapterFileError, match="what model the adapter is of is not known"):
        gralora.load_adapter(mlp(8, 8), tmp_path / "a.gguf")
    with pytest.raises(
        gralora.AdapterFileError, match="'blk.1.attn_q.weight', which this model lacks"
    ):
        gralora.load_adapter(small_model("llama", num_hidden_layers=1), tmp_path / "a.gguf")
    with pytest.raises(
        gralora.AdapterFileError, match="64 outputs for .*, which in this model has"
    ):
        gralora.load_adapter(small_model("llama", num_attention_heads=64), tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for cut in (4, 30, 200, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(gralora.AdapterFileError):
            read_adapter(tmp_path / "cut.gguf")
    write_model(small_model("llama"), tmp_path / "base.gguf")
    with pytest.raises(gralora.AdapterFileError, match="is a GGUF file, but no LoRA adapter"):
        read_adapter(tmp_path / "base.gguf")

    def written(tensors):
        writer = gguf.GGUFWriter(tmp_path / "own.gguf", "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()

    a, b = torch.randn(2, 4), torch.randn(4, 2)
    for tensors, why in (
        ({"x.lora_a": a}, "holds 'x.lora_a' without 'x.lora_b'"),
        ({"x.lora_a": a, "x.lora_b": a}, "has a pair of shapes"),
        ({"x.lora_a": a, "x.lora_b": b, "y": b}, "holds 'y', which is not part of a LoRA pair"),
        ({"x.lora_a": a.double(), "x.lora_b": b}, "is of type F64; legal are F32, F16, BF16"),
    ):
        written(tensors)
        with pytest.raises(gralora.AdapterFileError, match=why):
            read_adapter(tmp_path / "own.gguf")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    model = gralora.inject(small_model("llama"), ["q_proj"], random_config())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"need the package gguf: pip install 'gralora\[gguf\]'"):
        gralora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("SmolLM2")
def test_smollm2_itself(tmp_path):
    from benchmarks.jobs.chat import base_file, load_chat

    file, config = base_file(), GraloraConfig(r=8, alpha=8, init_weights=False)
    model = gralora.inject(load_chat().model(), "all-linear", config).eval()
    tokens = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        for parameter in gralora.adapter_parameters(model):
            parameter.mul_(0.5)
        wanted = model(tokens).logits[0, -1].log_softmax(-1)
        with gralora.disable_adapter(model):
            plain = model(tokens).logits[0, -1].log_softmax(-1)
    gralora.save_adapter(model, tmp_path / "a.gguf", format="gguf")
    with served(file, tmp_path / "a.gguf") as server:
        found = server.log_probabilities(tokens[0].tolist(), model.config.vocab_size)
    with served(file) as server:
        without = server.log_probabilities(tokens[0].tolist(), model.config.vocab_size)
    # its base is quantised to 4 bits, and computed in 8 there: what the adapter changes is the same
    # up to that
    best = wanted.topk(500).indices
    changes = torch.stack([(found - without)[best], (wanted - plain)[best]])
    assert torch.corrcoef(changes)[0, 1] > 0.8 and changes[1].std() > 0.3
    assert found.argmax() == wanted.argmax()
