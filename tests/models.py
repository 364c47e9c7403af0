"""Models that several tests share: plain PyTorch ones, and tiny ones of real architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gralora import GraloraConfig, GraloraConv1D, inject, set_adapter, unload
from gralora.layers.base import gralora_layers


class Block(nn.Module):
    """Attention-like: q, k and v share one input; a tied and a shared layer; a list; a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, dim=-1) @ self.v(x)
        return self.head(self.norm(x + self.mlp(mixed)))


class Doubled(nn.Linear):
    """A subclass with a forward of its own, at module level so that pickle finds it."""

    def forward(self, input):
        return 2 * super().forward(input)


class Experts(nn.Module):
    """Experts in one parameter, all of whose tokens go to all of them."""

    def __init__(self, transposed=False, dtype=torch.float64):
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(
            torch.randn(3, 8, 12, dtype=dtype) if transposed else torch.randn(3, 12, 8, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.randn(1, 1, 12, dtype=dtype))

    def forward(self, x):
        return (
            sum(x @ (self.up[e] if self.is_transposed else self.up[e].mT) for e in range(3))
            + self.bias
        )


class Everything(nn.Module):
    """One of every kind of layer, adapted twice, with a saved head, trained biases."""

    def __init__(self):
        super().__init__()
        self.block, self.attention = Block(), nn.MultiheadAttention(16, 4, batch_first=True)
        self.conv, self.conv1d, self.experts = (
            nn.Conv1d(16, 16, 3, padding=1),
            GraloraConv1D(16, 16),
            Experts(dtype=None),
        )
        unload(self.conv1d)
        self.embed, self.head = nn.Linear(16, 8), nn.Linear(12, 4)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.conv1d(x + self.conv(x.mT).mT)
        return self.head(self.experts(self.embed(x))) + self.block(x)


def pair() -> tuple[nn.Module, nn.Module]:
    """Two models of the same base weights."""
    torch.manual_seed(5)
    one, two = Block(), Block()
    two.load_state_dict(one.state_dict())
    return one, two


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
"""An input of `Everything`."""


def everything(bias="gralora_only"):
    model = Everything().eval()
    targets = r"block\.(q|mlp\.0)|attention|conv1?d?|experts\.up|embed"
    config = random_config(alpha=4, bias=bias, modules_to_save=["head"])
    inject(model, targets, config, adapter_name="a")
    inject(
        model, ["block.q", "attention", "conv", "up"], random_config(gralora_k=1), adapter_name="b"
    )
    assert len(list(gralora_layers(model))) == 2 + 4 + 2 + 1 + 1
    return model


def two_adapters():
    model = mlp(16, 24, 8)
    inject(model, ["0", "2"], random_config(), adapter_name="a")
    inject(model, ["2"], random_config(r=8, gralora_k=4, hybrid_r=2, alpha=3), adapter_name="a_b")
    return model


def mlp(*widths: int, dtype: torch.dtype | None = None, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def bert(**kwargs: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    return BertModel(BertConfig(vocab_size=64, **sizes, **kwargs)).eval()


def gpt2(**kwargs: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **kwargs)
    ).eval()


def llama(**kwargs: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes, **kwargs)
    ).eval()


def opt(**kwargs: Any) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    positions = {"word_embed_proj_dim": 32, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=64, **sizes, **positions, **kwargs)).eval()


def t5(**kwargs: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes, **kwargs)
    return T5ForConditionalGeneration(config).eval()


def vit(**kwargs: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    return ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, **sizes, **kwargs)
    ).eval()


TOKENS = torch.arange(24).reshape(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    """The tensors that a transformers model returns (logits; or hidden states and pooled output),
    as one.
    """
    config = model.config
    if config.model_type == "vit":
        out = model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16))
    else:
        out = model(TOKENS, **({"decoder_input_ids": TOKENS} if config.is_encoder_decoder else {}))
    out = [value for value in out.to_tuple() if isinstance(value, torch.Tensor)]
    return torch.cat([value.flatten() for value in out])


def random_config(**kwargs: Any) -> GraloraConfig:
    """A config whose adapter acts from the start."""
    return GraloraConfig(**{"r": 4, "gralora_k": 2, "alpha": 8, "init_weights": False, **kwargs})


MIXED = {
    "q": random_config(r=2, gralora_k=1, alpha=3.5),
    "k|v": random_config(r=8, gralora_k=4, gralora_dropout=0.25),
    "mlp.*[02]": random_config(r=6, gralora_k=2, hybrid_r=3),
}
"""Layers of a `Block` that differ in r, k, alpha and dropout."""


ROWS = ["a", "b", None, "a", "c", None, "b", "b"]
"""Of `four_adapters`, one for each row of a batch."""


def four_adapters(model: nn.Module, targets: Any = "all-linear") -> nn.Module:
    """a and b on all layers, c of another r and k on some, d active and in no row."""
    inject(model, targets, random_config(alpha=16), adapter_name="a")
    inject(model, targets, random_config(r=8, gralora_k=4, hybrid_r=2), adapter_name="b")
    some = [name for name, _ in gralora_layers(model)][::2]
    inject(model, some, random_config(gralora_k=1), adapter_name="c")
    inject(model, some, random_config(), adapter_name="d")
    set_adapter(model, "d")
    return model


def randomize_(model: nn.Module, scale: float = 0.3) -> None:
    """Give every adapter of `model` random values, so that each has an effect."""
    with torch.no_grad():
        for _, layer in gralora_layers(model):
            for parameter in layer.gralora_adapters.parameters():
                parameter.normal_(std=scale)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that must be the same again: classes, parameters and buffers bit for bit, identity,
    hooks, requires_grad.
    """
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": {
            name: [
                list(getattr(module, register))
                for register in ("_forward_hooks", "_forward_pre_hooks")
            ]
            for name, module in model.named_modules()
        },
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in before:
        if key == "tensors":
            assert list(now[key]) == list(before[key])
            for name, tensor in before[key].items():
                assert same_bits(now[key][name], tensor), name
        else:
            assert now[key] == before[key], key


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit: NaN is itself here, and 0 is not -0."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def ten_losses(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor, weight_decay: float = 0.01
) -> list[float]:
    """Ten steps of AdamW on whatever requires gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
