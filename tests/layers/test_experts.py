"""Fused experts against those with W + ΔW."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers

from ..models import TOKENS, Experts, assert_same, fingerprint, random_config, randomize_, relative, same_bits


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=4, **sizes)).eval()


def qwen():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=32, num_key_value_heads=2, **sizes, **experts)).eval()


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = GptOssConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}
PARAMETERS = ["gate_up_proj", "down_proj"]
X = TOKENS % 32


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_an_adapter_of_its_own(transposed):
    model = nn.ModuleDict({"moe": Experts(transposed)})
    base, before = copy.deepcopy(model["moe"]), fingerprint(model)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gralora.inject(model, r"moe\.up", random_config(hybrid_r=1))
    assert [name for name, _ in gralora_layers(model)] == ["moe.up"]
    state = gralora.adapter_state_dict(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == {
        "moe.up.gralora_A": (3, 2, 4, 4),
        "moe.up.gralora_B": (3, 2, 4, 6),
        "moe.up.gralora_A_general.weight": (3, 1, 8),
        "moe.up.gralora_B_general.weight": (3, 12, 1),
    }
    assert len({tensor[e].sum().item() for tensor in [state["moe.up.gralora_A"]] for e in range(3)}) == 3
    y = model["moe"](x)
    assert relative(y, base(x)) > 1e-2
    layer = model["moe"].gralora_up
    expected = F.linear(x, base.up.sum(0).mT if transposed else base.up.sum(0))
    delta = layer.delta_weight()
    assert delta.shape == base.up.shape
    expected = expected + F.linear(x, delta.sum(0).mT if transposed else delta.sum(0)) + base.bias
    torch.testing.assert_close(y, expected)
    inputs, grad = [x, *layer.gralora_adapters.parameters()], torch.randn_like(y)
    for mine, theirs in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(mine, theirs)
    gralora.merge(model)
    torch.testing.assert_close(model["moe"](x), y)
    assert not torch.equal(model["moe"].up, base.up)
    gralora.unload(model)
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_transformers(name, tmp_path):
    base = MODELS[name]()
    y = base(X).logits
    model = gralora.inject(copy.deepcopy(base), r".*\.experts\.(gate_up|down)_proj", random_config(alpha=16))
    names = [layer for layer, _ in gralora_layers(model)]
    assert names == [f"model.layers.{i}.mlp.experts.{parameter}" for i in (0, 1) for parameter in PARAMETERS]
    assert {key for key in model.state_dict() if "gralora_" not in key} == set(base.state_dict())
    adapted = model(X).logits
    assert relative(adapted, y) > 1e-3
    layers = dict(gralora_layers(model))
    for alone in layers:  # each has an effect
        for path, layer in layers.items():
            layer.gralora_adapters.active = {"default": 1.0} if path == alone else {}
        assert relative(model(X).logits, y) > 1e-5, alone
    gralora.set_adapter(model, "default")
    with gralora.disable_adapter(model):
        assert same_bits(model(X).logits, y)

    path = tmp_path / "adapter.safetensors"
    gralora.save_adapter(model, path)
    assert same_bits(gralora.load_adapter(copy.deepcopy(base), path)(X).logits, adapted)
    gralora.merge(model)
    assert relative(model(X).logits, adapted) < 1e-4
    gralora.unmerge(model)
    assert same_bits(model(X).logits, adapted)
    merged = gralora.merge_and_unload(copy.deepcopy(model))
    assert type(merged) is type(base) and relative(merged(X).logits, adapted) < 1e-4
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    gralora.unload(model)
    assert same_bits(model(X).logits, y)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_in_which_transformers_runs_experts(implementation):
    model = mixtral()
    base = model(X).logits
    with contextlib.suppress(AttributeError):
        model.set_experts_implementation(implementation)
    gralora.inject(model, PARAMETERS, random_config(alpha=16))
    y = model(X).logits
    assert relative(y, base) > 1e-3
    assert relative(y, gralora.merge_and_unload(model)(X).logits) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(name):
    model = gralora.inject(
        MODELS[name]().train(), [*(f"experts.{each}" for each in PARAMETERS), "q_proj"], GraloraConfig(r=4, alpha=16)
    )
    before = {key: p.clone() for key, p in model.named_parameters() if "gralora_" not in key}
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=3e-2)
    losses = []
    for _ in range(10):
        loss = model(X, labels=X).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if "gralora_" not in key)
    moved = [
        key for key, p in model.named_parameters() if "experts" in key and "gralora_" in key and p.grad.abs().max() > 0
    ]
    assert len(moved) == 2 * 2 * 2


def test_targets_of_every_form_and_the_module_that_owns_them():
    for targets in (
        ["up"],
        ["moe.up"],
        r".*\.up",
        r"moe",
        ["moe"],
        lambda n, m: n == "moe.up",
        {"moe.up": random_config()},
    ):
        model = gralora.inject(nn.ModuleDict({"moe": Experts()}), targets, random_config())
        assert [name for name, _ in gralora_layers(model)] == ["moe.up"], targets
    model = nn.ModuleDict({"moe": Experts(), "fc": nn.Linear(8, 8)})
    gralora.inject(model, "all-linear", random_config())
    assert [name for name, _ in gralora_layers(model)] == ["fc"]


def test_what_does_not_fit_is_refused_by_name():
    model = nn.ModuleDict({"moe": Experts()})
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'moe.up' takes no gralora_dropout .* Legal here: 0"):
        gralora.inject(model, ["up"], random_config(gralora_dropout=0.1))
    with pytest.raises(
        ValueError, match=r"gralora_k=8 does not divide out_features=12 of 'moe.up' \(r=8\). Legal here: 1, 2, 4"
    ):
        gralora.inject(model, ["up"], random_config(r=8, gralora_k=8))
    with pytest.raises(ValueError, match="Nearest names: 'moe.up'"):
        gralora.inject(model, ["ups"], random_config())
    assert_same(fingerprint(model), before)


def test_layers_and_experts_of_different_k_in_one_adapter(tmp_path):
    base = mixtral()
    targets = {r".*(gate_up|down)_proj": random_config(r=8, gralora_k=4), "all-linear": random_config(r=6, gralora_k=2)}
    model = gralora.inject(copy.deepcopy(base), targets)
    assert len(list(gralora_layers(model))) == 2 * (2 + 4)
    y = model(X).logits
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    assert same_bits(gralora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")(X).logits, y)


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_several_adapters_weighted_merged_and_swapped():
    model = gralora.inject(nn.ModuleDict({"moe": Experts()}), ["up"], random_config(), adapter_name="a")
    gralora.inject(model, ["up"], random_config(r=8, gralora_k=4), adapter_name="b")
    randomize_(model)
    x, layer = torch.randn(5, 8, dtype=torch.float64), model["moe"].gralora_up
    gralora.set_adapter(model, {"a": 0.5, "b": 2.0})
    y = model["moe"](x)
    delta = 0.5 * layer.delta_weight("a") + 2 * layer.delta_weight("b")
    base = copy.deepcopy(model["moe"]._parameters["up"])
    torch.testing.assert_close(model["moe"].up, base + delta)
    gralora.merge(model, "a")
    torch.testing.assert_close(model["moe"](x), y)
    gralora.merge(model)
    torch.testing.assert_close(model["moe"](x), y)
    with pytest.raises(RuntimeError, match="moe.up holds a merged adapter"):
        model.load_state_dict({"moe.up": base, "moe.bias": model["moe"].bias}, strict=False)
    gralora.unmerge(model)
    assert same_bits(model["moe"]._parameters["up"], base)
    gralora.delete_adapter(model, "a")
    torch.testing.assert_close(model["moe"].up, base + 2 * layer.delta_weight("b"))


def test_copies_and_pickles():
    model = gralora.inject(nn.ModuleDict({"moe": Experts()}), ["up"], random_config())
    x = torch.randn(5, 8, dtype=torch.float64)
    y = model["moe"](x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(other["moe"](x), y)
        randomize_(other)
        assert not torch.equal(other["moe"](x), y)
    assert same_bits(model["moe"](x), y)


def test_half_precision_and_extract_and_export():
    model = gralora.inject(Experts(dtype=torch.bfloat16), ["up"], random_config())
    assert model.gralora_up.gralora_adapters["default"].A.dtype == torch.float32
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for format in ("lora", "peft"):
        with pytest.raises(ValueError, match="'up' holds adapters of fused experts"):
            gralora.save_adapter(model, "nowhere", format=format)
    base, errors = Experts(), {}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.up.add_(torch.randn_like(tuned.up))
    gralora.extract(base, tuned, ["up"], GraloraConfig(r=16, gralora_k=2, alpha=16), errors=errors)
    assert errors["up"] < 1e-12
    torch.testing.assert_close(base.up, tuned.up)


def test_a_file_for_another_number_of_experts_is_refused(tmp_path):
    model = gralora.inject(Experts(), ["up"], random_config())
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    other = Experts()
    other.up = nn.Parameter(torch.randn(4, 12, 8))
    with pytest.raises(gralora.AdapterFileError, match=r"up.gralora_A must have shape \(4, 2, 4, 4\)"):
        gralora.load_adapter(other, tmp_path / "a.safetensors")


def test_compiled_without_a_graph_break():
    model = gralora.inject(Experts(), ["up"], random_config())
    x = torch.randn(5, 8, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
