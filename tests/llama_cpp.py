"""The real llama.cpp, in process, and small models of transformers written as GGUF for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64


def _sizes(**more: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    return {
        "vocab_size": VOCABULARY,
        **sizes,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **more,
    }


def small_model(name: str, **more: Any) -> nn.Module:
    """A model of transformers with random weights, of an architecture by its `model_type`."""
    import transformers as t

    gemma = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "pad_token_id": 0}
    made = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_sizes(**more))),
        "mistral": lambda: t.MistralForCausalLM(
            t.MistralConfig(**_sizes(sliding_window=None, **more))
        ),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_sizes(**more))),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_sizes(head_dim=16, **more))),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_sizes(**gemma, **more))),
        "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_sizes(**gemma, **more))),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_sizes(pad_token_id=0, **more))),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, **more
            )
        ),
    }
    torch.manual_seed(0)
    model: nn.Module = made[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            elif "bias" in key:
                parameter.normal_(std=0.5)
    return model


def write_model(model: nn.Module, path: Path) -> None:
    """The base model as llama.cpp wants it: names, orders and conventions of its
    `convert_hf_to_gguf.py`.
    """
    import gguf

    config = model.config
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(
        config.model_type, config.model_type
    )
    writer = gguf.GGUFWriter(path, architecture)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    gpt2, gemma = config.model_type == "gpt2", config.model_type.startswith("gemma")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(4 * config.hidden_size if gpt2 else config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(width)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        writer.add_key_length(width)
        writer.add_value_length(width)
    if gemma:
        writer.add_sliding_window(config.sliding_window)
        if config.model_type == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(128)
    _add_vocabulary(gguf, writer)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    seen = set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and "lm_head" in key:
            continue
        seen.add(tensor.data_ptr())
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if gpt2 and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        if gemma and "norm" in key:
            tensor = tensor + 1
        if architecture == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            own = heads if "q_proj" in key else kv_heads
            tensor = (
                tensor.reshape(own, 2, len(tensor) // own // 2, -1)
                .swapaxes(1, 2)
                .reshape(tensor.shape)
            )
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(gguf: Any, writer: Any) -> None:
    tokens = [chr(ord("0") + i) for i in range(VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)
    writer.add_add_bos_token(False)


class Served:
    """A model in llama.cpp's own server."""

    def __init__(self, path: Path, adapter: Path | None = None, scale: float = 1.0) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
        params.cpuparams.n_threads = 1  # several wait for each other in busy loops
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), scale
            params.lora_adapters = [lora]
        self.server = xllamacpp.Server(params)

    def log_probabilities(self, tokens: list[int], count: int = VOCABULARY) -> Tensor:
        """Of the token after `tokens`, by token."""
        request = {
            "prompt": tokens,
            "max_tokens": 1,
            "logprobs": count,
            "temperature": 0.0,
            "cache_prompt": False,
        }
        answer = self.server.handle_completions({**request, "n_probs": count})
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = torch.full((count,), -torch.inf)
        for each in top:
            found[each["id"]] = each["logprob"]
        return found


@contextmanager
def served(path: Path, adapter: Path | None = None, scale: float = 1.0) -> Iterator[Served]:
    server = Served(path, adapter, scale)
    try:
        yield server
    finally:
        del server.server
