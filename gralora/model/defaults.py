"""What is adapted, and what is saved beside it, where the user names nothing: read off the
architectures themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from gralora.config import AUTO, GraloraConfig
from gralora.engines.walk import child_of, named_modules

# The attention projections, by `model.config.model_type`; where PEFT has a choice for LoRA it is
# that choice, so that a user who moves here adapts the same layers. fmt: off
_Q_V_PROJ = (
    "bart",
    "beit",
    "biogpt",
    "clip",
    "clip_text_model",
    "clip_vision_model",
    "cohere",
    "cohere2",
    "deit",
    "dinov2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "glm4",
    "gpt_neo",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "hubert",
    "lfm2",
    "llama",
    "llama4",
    "llama4_text",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "siglip",
    "siglip_text_model",
    "siglip_vision_model",
    "smollm3",
    "stablelm",
    "starcoder2",
    "swin",
    "t5gemma",
    "vit",
    "wav2vec2",
    "whisper",
)
# fmt: on
_QUERY_VALUE = ["albert", "bert", "camembert", "electra", "layoutlm", "roberta", "xlm-roberta"]
_QUERY_KEY_VALUE = [
    "RefinedWeb",
    "RefinedWebModel",
    "bloom",
    "chatglm",
    "falcon",
    "gpt_neox",
    "persimmon",
]
DEFAULT_TARGETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(_Q_V_PROJ, ("q_proj", "v_proj")),
    **dict.fromkeys(_QUERY_VALUE, ("query", "value")),
    **dict.fromkeys(_QUERY_KEY_VALUE, ("query_key_value",)),
    **dict.fromkeys(("t5", "mt5", "mpnet"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), r".*\.(q_proj|q_a_proj|q_b_proj|kv_b_proj)"),
    **dict.fromkeys(("mamba", "mamba2"), ("in_proj", "out_proj")),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "falcon_h1": ("q_proj", "v_proj", "in_proj", "out_proj"),
    "gemma3n": r".*language_model\..*\.(q_proj|v_proj)",
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "modernbert": ("Wqkv",),
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}

HEADS = (
    "classifier",
    "score",
    "qa_outputs",
    "classification_head",
    "pre_classifier",
    "logits_proj",
    "summary",
)
"""Heads that transformers puts on a model for a task; PEFT's task types save the first three."""

_TASK = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)$")


def default_targets(model: nn.Module) -> str | tuple[str, ...]:
    """What is adapted in a `transformers` model when nothing is named, by its
    `config.model_type`.
    """
    config = getattr(model, "config", None)
    model_type = (
        config.get("model_type")
        if isinstance(config, Mapping)
        else getattr(config, "model_type", None)
    )
    if model_type not in DEFAULT_TARGETS:
        known = (
            f"model_type={model_type!r} has no default"
            if model_type
            else "this model has no config.model_type"
        )
        raise ValueError(
            f"no targets given, and {known}. Name the layers: a regular expression, a list of"
            " names, or "
            f'"all-linear". Defaults exist for: {", ".join(sorted(DEFAULT_TARGETS))}.'
        )
    return DEFAULT_TARGETS[model_type]


def task_heads(model: nn.Module) -> list[str]:
    """The heads that a model has for a task: those of its own children that `HEADS` names, or
    None.
    """
    own = getattr(type(model), "_base_class", type(model)).__name__
    return [name for name in HEADS if _TASK.search(own) and child_of(model, name) is not None]


def settled(model: nn.Module, config: GraloraConfig) -> GraloraConfig:
    """The config with the model's own heads where it says "auto"."""
    if config.modules_to_save != AUTO:
        return config
    return replace(config, modules_to_save=tuple(task_heads(model)) or None)


def untrained(model: nn.Module, name: str) -> bool:
    """Whether a head was never trained, as far as its values tell: biases of zero, or weights as
    they are initialised.
    """
    parameters = [
        p for _, m in named_modules(model.get_submodule(name)) for p in m._parameters.values()
    ]
    tensors = [p.detach() for p in parameters if p is not None]
    if not tensors or any(
        t.is_meta or not t.is_floating_point() or type(t) is not Tensor for t in tensors
    ):
        return False
    biases = [t for t in tensors if t.dim() == 1]
    if biases:
        return not any(bool(t.any()) for t in biases)
    std = float(getattr(getattr(model, "config", None), "initializer_range", 0.0) or 0.0)
    return std > 0 and all(
        abs(float(t.float().std()) / std - 1) < 0.05 for t in tensors if t.numel() > 500
    )


def peft_layers(model: nn.Module) -> list[str]:
    """The names of PEFT's own layers in a model."""
    return [
        name
        for name, module in named_modules(model)
        if any(
            cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.")
            for cls in type(module).__mro__
        )
    ]
