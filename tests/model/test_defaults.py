"""What is adapted and saved where nobody names anything."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import gralora
from gralora import GraloraConfig

from ..models import Block

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
}
ARCHITECTURES = {
    **{
        name: {"num_key_value_heads": 2, "pad_token_id": 0}
        for name in ("smollm3", "granite", "olmo2", "cohere", "cohere2")
    },
    **{name: {"num_key_value_heads": 2, "pad_token_id": 0} for name in ("starcoder2", "glm4")},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "deepseek_v3": {
        **{
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        **{
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        **{"num_key_value_heads": 4, "first_k_dense_replace": 1},
    },
    "qwen3_next": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
        **{
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
        },
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_key_value_heads": 2},
        **{"layer_types": ["linear_attention", "full_attention"]},
    },
    "falcon_h1": {
        **{
            "num_key_value_heads": 2,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
        **{"mamba_n_groups": 1, "mamba_expand": 1},
    },
    "gemma3n_text": {
        **{
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
        },
        **{"hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2},
        **{
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    },
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"num_key_value_heads": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "beit": {"image_size": 16, "patch_size": 4},
    "biogpt": {},
    "clip_text_model": {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "modernbert": {"pad_token_id": 0, "global_attn_every_n_layers": 2},
    "vit": {"image_size": 16, "patch_size": 4},
    "dinov2": {"image_size": 16, "patch_size": 4},
    "deit": {"image_size": 16, "patch_size": 4},
    "siglip_vision_model": {"image_size": 16, "patch_size": 4},
    "clip_vision_model": {"image_size": 16, "patch_size": 4},
    "mamba": {"state_size": 4},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 32},
    "wav2vec2": {
        **{
            "conv_dim": (16, 16),
            "conv_stride": (2, 2),
            "conv_kernel": (3, 3),
            "num_feat_extract_layers": 2,
        },
        **{
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "feat_extract_norm": "layer",
        },
    },
    "hubert": {
        **{
            "conv_dim": (16, 16),
            "conv_stride": (2, 2),
            "conv_kernel": (3, 3),
            "num_feat_extract_layers": 2,
        },
        **{
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "feat_extract_norm": "layer",
        },
    },
    "whisper": {
        **{
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "max_source_positions": 8,
        },
        **{
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 8,
            "pad_token_id": 0,
        },
    },
}


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_of_todays_architectures_act_and_are_trained(name):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[name](**{**SIZES, **ARCHITECTURES[name]})).eval()
    model.config.model_type = name
    gralora.inject(model, config=GraloraConfig(r=4))
    if name == "whisper":
        batch = {
            "input_features": torch.randn(1, 8, 16),
            "decoder_input_ids": torch.tensor([[1, 2, 3]]),
        }
    elif name in ("wav2vec2", "hubert"):
        batch = {"input_values": torch.randn(1, 200)}
    elif model.main_input_name == "pixel_values":
        batch = {"pixel_values": torch.randn(1, 3, 16, 16)}
    else:
        batch = {"input_ids": torch.arange(8)[None]}
    assert gralora.check_effect(model, **batch)  # raises where an adapter has no gradient


def test_a_new_head_that_would_stay_frozen_is_told_of_and_auto_saves_it():
    for cls, config, target, head in (
        (BertForSequenceClassification, BertConfig, "query", "classifier"),
        (LlamaForSequenceClassification, LlamaConfig, "q_proj", "score"),
    ):
        built = config(num_labels=32, pad_token_id=0, **SIZES)
        why = rf"'{head}', the head of this {cls.__name__}, looks as if nobody had trained it"
        with pytest.warns(UserWarning, match=why):
            gralora.inject(cls(built), [target], GraloraConfig(r=4))
        model = gralora.inject(cls(built), [target], GraloraConfig(r=4, modules_to_save="auto"))
        assert getattr(model, head).gralora_saved.active == "default"
        model = gralora.inject(
            cls(built), {rf".*\.{target}": GraloraConfig(r=4, modules_to_save="auto")}
        )
        assert getattr(model, head).gralora_saved.active == "default"
        trained = cls(built)
        with torch.no_grad():
            for parameter in getattr(trained, head).parameters():
                parameter.normal_(std=0.5)
        gralora.inject(trained, [target], GraloraConfig(r=4))  # no warning
        with torch.device("meta"):
            gralora.inject(cls(built), [target], GraloraConfig(r=4))  # nor where nobody can look
    assert gralora.inject(Block(), ["q"], GraloraConfig(r=4, modules_to_save="auto")) is not None
