"""Fused experts in LoRA folders, against the real PEFT and against what vLLM's loader does with
them.
"""

import copy
import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.files.experts import unwrapped, wrapped
from gralora.files.formats import FORMATS, read_adapter

from ..layers.test_experts import gpt_oss, mixtral, qwen
from ..models import TOKENS, Experts, random_config, relative
from ..peft_reference import in_peft, quietly

MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}
BOTH = [r"gate_up_proj", "down_proj"]


def adapted(name, targets=BOTH, **config):
    torch.manual_seed(1)
    base = MODELS[name]()
    rules = {("q_proj",): random_config(r=8), tuple(targets): random_config(**config)}
    return base, gralora.inject(copy.deepcopy(base), rules).eval()


def out(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("targets", [BOTH, ["down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_them_as_target_parameters_and_we_read_them_back(name, targets, tmp_path):
    base, model = adapted(name, targets, hybrid_r=2, gralora_dropout=0.1, alpha=3)
    gralora.save_adapter(model, tmp_path / "lora", format="lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 2 * len(targets) and config["lora_dropout"] == 0.0
    assert relative(out(in_peft(base, tmp_path / "lora")), out(model)) < 1e-5
    assert (
        relative(
            out(gralora.load_adapter(copy.deepcopy(base), tmp_path / "lora").eval()), out(model)
        )
        < 1e-5
    )
    assert relative(out(base), out(model)) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_has_trained_is_read(name, tmp_path):
    torch.manual_seed(2)
    base = MODELS[name]()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={r".*experts\.down_proj": 2},
        init_lora_weights=False,
    )
    theirs = quietly(peft.get_peft_model, copy.deepcopy(base), config).eval()
    quietly(theirs.save_pretrained, tmp_path)
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert relative(out(ours), out(theirs)) < 1e-5 and relative(out(base), out(theirs)) > 1e-3
    assert {
        layer.gralora_adapters["default"].config.r
        for _, layer in gralora.layers.base.gralora_layers(ours)
    } == {
        2,
        4,
    }


@pytest.mark.parametrize("name", MODELS)
def test_vllms_way_of_taking_the_stacks_apart_gives_each_experts_update(name, tmp_path):
    # model_manager.py, _stack_moe_lora_weights: A (E·r, in) by experts first, B (out, r·E) with the
    # expert last
    _, model = adapted(name)
    gralora.save_adapter(model, tmp_path / "lora", format="lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    module = model.model.layers[0].mlp.experts
    path = "base_model.model.model.layers.0.mlp.experts"
    for key, layer in (
        ("base_layer.", module.gralora_gate_up_proj),
        ("", module.gralora_down_proj),
    ):
        A, B = (tensors[f"{path}.{key}lora_{letter}.weight"] for letter in "AB")
        a = A.reshape(4, -1, A.shape[-1])
        b = B.reshape(B.shape[0], -1, 4).permute(2, 0, 1)
        delta = gralora.delta_weight(layer).detach()
        alpha, r = config["lora_alpha"], config["r"]
        pattern = {k: v for k, v in config["rank_pattern"].items() if layer.part in k and "0" in k}
        scaling = alpha / next(iter(pattern.values()), r)
        alphas = {k: v for k, v in config["alpha_pattern"].items() if layer.part in k and "0" in k}
        scaling *= next(iter(alphas.values()), alpha) / alpha
        assert (
            relative(
                b @ a * scaling, delta.mT if getattr(module, "is_transposed", False) else delta
            )
            < 1e-5
        )


@pytest.mark.parametrize("name", ["mixtral", "qwen"])
def test_each_expert_for_itself_and_back(name, tmp_path):
    base, model = adapted(name, hybrid_r=2, alpha=3)
    gralora.save_adapter(model, tmp_path / "each", format="lora", experts="each")
    keys = load_file(tmp_path / "each" / "adapter_model.safetensors")
    A = keys["base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight"]
    assert A.shape == (10, 16) and len([key for key in keys if ".experts." in key]) == 2 * 2 * 4 * 3
    assert (
        relative(
            out(gralora.load_adapter(copy.deepcopy(base), tmp_path / "each").eval()), out(model)
        )
        < 1e-5
    )
    expert = model.model.layers[1].mlp.experts
    B = keys["base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"]
    up = gralora.delta_weight(expert.gralora_gate_up_proj)[3].chunk(2)[1]
    config = json.loads((tmp_path / "each" / "adapter_config.json").read_text())
    name = "model.layers.1.mlp.experts.3.up_proj"
    alphas = {k.replace("\\", "").strip("^"): v for k, v in config["alpha_pattern"].items()}
    ranks = {k.replace("\\", "").strip("^"): v for k, v in config["rank_pattern"].items()}
    scaling = alphas.get(name, config["lora_alpha"]) / ranks.get(name, config["r"])
    assert relative(B @ A * scaling, up.detach()) < 1e-5


def test_pairs_that_differ_between_gate_and_up_become_one_of_both_ranks(tmp_path):
    base, model = adapted("mixtral")
    gralora.save_adapter(model, tmp_path / "each", format="lora", experts="each", rank=8)
    path = tmp_path / "each" / "adapter_model.safetensors"
    tensors = load_file(path)
    doubled = {
        k: t * 2 if "up_proj.lora_A" in k else t for k, t in tensors.items()
    }  # as trained apart
    save_file(doubled, path)
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path / "each")
    gate, up = gralora.delta_weight(ours.model.layers[0].mlp.experts.gralora_gate_up_proj)[1].chunk(
        2
    )
    wanted = gralora.delta_weight(model.model.layers[0].mlp.experts.gralora_gate_up_proj)[1].chunk(
        2
    )
    assert relative(gate, wanted[0]) < 1e-5 and relative(up, 2 * wanted[1]) < 1e-5
    del doubled["base_model.model.model.layers.0.mlp.experts.2.down_proj.lora_A.weight"]
    del doubled["base_model.model.model.layers.0.mlp.experts.2.down_proj.lora_B.weight"]
    save_file(doubled, path)
    with pytest.raises(
        gralora.AdapterFileError, match=r"experts.0.down_proj', which this model lacks"
    ):
        gralora.load_adapter(copy.deepcopy(base), tmp_path / "each")


@pytest.mark.parametrize("change", ["inputs", "outputs", "k", "hybrid_r"])
def test_experts_that_cannot_become_one_adapter_are_refused_by_name(change, tmp_path):
    base, model = adapted("mixtral", r=4, gralora_k=1)
    gralora.save_adapter(model, tmp_path / "each", format="lora", experts="each")
    file = read_adapter(tmp_path / "each")
    name = "model.layers.0.mlp.experts.2.down_proj"
    A, B = f"{name}.gralora_A", f"{name}.gralora_B"
    if change == "inputs":
        file.tensors[A] = file.tensors[A][:, 2:].contiguous()
    if change == "outputs":
        file.tensors[B] = file.tensors[B][:, :, 2:].contiguous()
    if change == "k":
        file.configs[name] = dataclasses.replace(file.configs[name], gralora_k=2)
        file.tensors[A] = file.tensors[A].reshape(2, -1, 4)
        file.tensors[B] = file.tensors[B].reshape(2, 4, -1)
    if change == "hybrid_r":
        file.configs[name] = dataclasses.replace(file.configs[name], hybrid_r=1)
        file.tensors[f"{name}.gralora_A_general.weight"] = torch.ones(1, file.tensors[A].shape[1])
        file.tensors[f"{name}.gralora_B_general.weight"] = torch.ones(file.tensors[B].shape[2], 1)
    FORMATS["gralora"].write(file, tmp_path / "a")
    with pytest.raises(gralora.AdapterFileError, match=r"experts.0.down_proj', which this model"):
        gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")


def test_a_lower_rank_and_its_error(tmp_path):
    base, model = adapted("mixtral")
    errors = {}
    gralora.save_adapter(model, tmp_path / "lora", format="lora", rank=2, errors=errors)
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path / "lora")
    for name in ("gralora_gate_up_proj", "gralora_down_proj"):
        both = [getattr(m.model.layers[0].mlp.experts, name) for m in (ours, model)]
        found, wanted = map(gralora.delta_weight, both)
        error = errors["model.layers.0.mlp.experts." + name.removeprefix("gralora_")]
        assert (
            error == pytest.approx(((found - wanted).norm() / wanted.norm()).item(), rel=1e-4)
            and 0.1 < error < 1
        )
    pairs = gralora.to_lora(model)
    A, B = (pairs[f"model.layers.0.mlp.experts.down_proj.lora_{letter}.weight"] for letter in "AB")
    assert A.shape == (4, 8, 24) and relative(B @ A, wanted) < 1e-6


def test_what_cannot_be_written_or_told_apart_is_refused_by_name(tmp_path):
    _, model = adapted("gpt_oss")
    with pytest.raises(
        ValueError, match=r"stored \(in, out\), where gate and up may lie interleaved"
    ):
        gralora.save_adapter(model, tmp_path / "a", format="lora", experts="each")
    with pytest.raises(
        ValueError, match='experts=\'all\' is not legal: it must be "fused" or "each"'
    ):
        gralora.save_adapter(model, tmp_path / "a", format="lora", experts="all")
    with pytest.raises(ValueError, match="experts='each' is for format=\"lora\""):
        gralora.save_adapter(model, tmp_path / "a", experts="each")
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="which of the parameters m.v, m.w each pair is of can't be known"
    ):
        unwrapped(["m", "m.base_layer"], ["m.v", "m.w"], [])
    with pytest.raises(ValueError, match="'m' has 1 pairs for the parameters m.v, m.w"):
        unwrapped(["m"], ["m.v", "m.w"], ["m.v", "m.w"])


def test_parameters_of_any_name_come_back_in_their_order(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.zeta, self.alpha = (
                nn.Parameter(torch.randn(3, 8, 8)),
                nn.Parameter(torch.randn(3, 8, 8)),
            )

        def forward(self, x):
            return sum(x @ self.zeta[e].mT @ self.alpha[e].mT for e in range(3))

    torch.manual_seed(0)
    base = nn.Sequential(Two(), Two())
    model = gralora.inject(copy.deepcopy(base), ["zeta", "alpha"], random_config())
    gralora.save_adapter(model, tmp_path / "lora", format="lora")
    x = torch.randn(5, 8)
    assert (
        relative(gralora.load_adapter(copy.deepcopy(base), tmp_path / "lora")(x), model(x)) < 1e-5
    )
    assert relative(in_peft(base, tmp_path / "lora")(x), model(x)) < 1e-5
    assert [w.path for w in wrapped(["0.zeta", "0.alpha", "1.alpha"])] == ["0.base_layer", "0", "1"]


def test_the_own_format_is_unchanged(tmp_path):
    model = gralora.inject(nn.Sequential(Experts()), ["up"], GraloraConfig(r=4, init_weights=False))
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["0.up.gralora_A"].shape == (3, 2, 4, 4)
