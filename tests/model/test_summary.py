"""The table of what is adapted."""

import torch
from torch import nn

import gralora

from ..models import Block, gpt2, llama, random_config


def test_one_row_per_layer_and_adapter_and_totals_below():
    model = gralora.inject(
        Block(),
        "all-linear",
        random_config(modules_to_save=["head"], bias="gralora_only"),
        adapter_name="a",
    )
    gralora.inject(
        model, ["q"], random_config(r=8, gralora_k=4, hybrid_r=2, alpha=20), adapter_name="b"
    )
    gralora.set_adapter(model, {"a": 0.5, "b": 1})
    gralora.merge(model, "b")
    rows = gralora.summary(model)
    assert [(row.layer, row.adapter) for row in rows][:3] == [("q", "a"), ("q", "b"), ("k", "a")]
    q_b = rows[1]
    assert q_b == ("q", (16, 16), "b", 8, 4, 2, 20, 2.0, (8 + 2) * 32, 1.0, 1.0)
    assert sum(row.parameters for row in rows) == sum(
        p.numel() for n, p in model.named_parameters() if "gralora_adapters" in n
    )
    text = str(rows)
    assert text == repr(rows)
    assert (
        "layer  shape    adapter  r  k  hybrid_r  alpha  scaling  parameters  active  merged"
        in text
    )
    assert any(
        line.split() == ["b", "8", "4", "2", "20", "2", "320", "yes", "yes"]
        for line in text.splitlines()
    )
    trainable, total = gralora.count_parameters(model)
    assert text.splitlines()[-1].endswith(f"{trainable:,} trainable of {total:,}")
    assert "5 layers, adapters: a, b" in text
    assert "trained in addition: head (saved), q.bias" in text


def test_shapes_of_convolutions_experts_and_projections():
    from ..models import Experts

    model = nn.ModuleDict(
        {"c": nn.Conv2d(4, 8, 3), "a": nn.MultiheadAttention(16, 4), "e": Experts()}
    )
    gralora.inject(model, ["c", "a", "up"], random_config())
    shapes = {row.layer: row.shape for row in gralora.summary(model)}
    assert shapes == {
        "c": (8, 4, 3, 3),
        **{f"a.{part}": (16, 16) for part in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "e.up": (3, 12, 8),
    }


def test_a_model_without_adapters():
    rows = gralora.summary(gpt2())
    assert len(rows) == 0 and "0 layers, adapters: none" in str(rows)


def test_repr_takes_one_line_a_layer():
    from transformers import LlamaConfig, LlamaForCausalLM

    base = llama()
    lines = len(repr(base).splitlines())
    model = gralora.inject(base, "all-linear", random_config(), adapter_name="a")
    gralora.inject(model, ["q_proj"], random_config(r=8), adapter_name="b")
    assert len(repr(model).splitlines()) == lines
    line = (
        "(q_proj): GraloraLinear(in_features=32, out_features=32, bias=False, r=4 | 8, gralora_k=2,"
        " alpha=8, active=a)"
    )
    assert line in repr(model)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
    }
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=43, **sizes))
    gralora.inject(large, "all-linear", random_config())
    assert len(gralora.summary(large)) == 301
    assert len(repr(large).splitlines()) < 60  # PyTorch folds the layers that are alike


def test_repr_of_an_attention_and_of_experts_and_of_a_saved_head():
    from ..models import Experts

    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(16, 4), "e": Experts(), "head": nn.Linear(4, 4)}
    )
    gralora.inject(model, ["q_proj", "up"], random_config(modules_to_save=["head"]))
    text, ours = repr(model), "r=4, gralora_k=2, alpha=8, active=default)"
    assert f"(gralora_q_proj): Projection(in_features=16, out_features=16, {ours}" in text
    assert f"(gralora_up): ExpertWeights(experts=3, in_features=8, out_features=12, {ours}" in text
    assert len(text.splitlines()) < 25
