"""Models without memory: injected on the meta device, and given memory and values afterwards."""

import copy
import time

import pytest
import torch
from torch import nn

import gralora
from gralora.layers.base import gralora_layers

from ..models import Block, Everything, X, bert, gpt2, random_config, relative, same_bits


def on_meta(make):
    with torch.device("meta"):
        return make()


def reset(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
@pytest.mark.parametrize(
    "within", [True, False], ids=["injected within the device block", "after it"]
)
@pytest.mark.parametrize("make", [Block, Everything])
def test_meta_to_empty_reset_load_equals_a_model_built_in_memory(make, within, tmp_path):
    torch.manual_seed(0)
    targets, config = (
        (r"q|mlp\.0" if make is Block else r"block\.q|attention|conv|experts\.up|embed"),
        {"hybrid_r": 2},
    )
    near = gralora.inject(make().eval(), targets, random_config(**config))
    gralora.save_adapter(near, tmp_path / "adapter")
    model = on_meta(
        lambda: gralora.inject(make(), targets, random_config(**config)) if within else make()
    ).eval()
    if not within:
        gralora.inject(model, targets, random_config(**config))
    assert all(p.is_meta for p in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in near.named_parameters()
    }
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    reset(model)
    for _, layer in gralora_layers(model):
        for p in layer.gralora_adapters.parameters():
            assert p.isfinite().all() and p.abs().sum() > 0
    base = {name: tensor for name, tensor in near.state_dict().items() if "gralora_" not in name}
    model.load_state_dict(base, strict=False)
    gralora.load_adapter(model, tmp_path / "adapter")
    assert same_bits(model(X), near(X))
    with gralora.disable_adapter(near):
        assert relative(near(X), model(X)) > 1e-3


def test_reset_draws_what_inject_draws():
    model = gralora.inject(
        on_meta(lambda: nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))),
        "all-linear",
        random_config(),
    )
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    for _, layer in gralora_layers(model):
        layer.gralora_adapters["default"].reset_parameters()
    near = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    torch.manual_seed(5)
    gralora.inject(near, "all-linear", random_config())
    for (name, p), (_, other) in zip(
        gralora.adapter_state_dict(model).items(), gralora.adapter_state_dict(near).items()
    ):
        assert same_bits(p, other), name


def test_nothing_is_loaded_into_tensors_without_memory(tmp_path):
    near = gralora.inject(Block(), "all-linear", random_config())
    gralora.save_adapter(near, tmp_path / "adapter")
    model = on_meta(Block)
    with pytest.raises(ValueError, match="meta device.*First to_empty, then load"):
        gralora.load_adapter(model, tmp_path / "adapter")
    assert not [name for name, _ in model.named_parameters() if "gralora" in name]
    gralora.inject(model, "all-linear", random_config())
    with pytest.raises(ValueError, match="meta device"):
        gralora.load_adapter_state_dict(model, gralora.adapter_state_dict(near))
    with pytest.raises(TypeError, match="meta device"):
        gralora.merge(model)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_models_of_transformers(make):
    model = gralora.inject(on_meta(make), "all-linear", random_config())
    gralora.set_adapter(model, "default")
    assert gralora.count_parameters(model) == gralora.count_parameters(
        gralora.inject(make(), "all-linear", random_config())
    )
    assert len(gralora.summary(copy.deepcopy(model))) == len(list(gralora_layers(model)))
    gralora.unload(model)
    assert all(p.is_meta for p in model.parameters())


def test_seventy_billion_parameters_are_injected_in_seconds():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    model = on_meta(
        lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, vocab_size=128256, **sizes))
    )
    start = time.perf_counter()
    gralora.inject(model, "all-linear", gralora.GraloraConfig(r=64, gralora_k=4))
    assert time.perf_counter() - start < 30
    trainable, total = gralora.count_parameters(model)
    assert total - trainable == 70_553_706_496 and trainable == 828_375_040
