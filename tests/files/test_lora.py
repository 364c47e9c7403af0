"""GraLoRA as the plain LoRA that it is."""

import copy
import json

import pytest
import torch

import gralora

from ..models import (
    Block,
    random_config,
    relative,
)
from ..peft_reference import in_peft

X = torch.linspace(-1, 1, 160).reshape(2, 5, 16)


def test_layers_that_differ_in_k_are_written_as_lora_and_not_as_peft_gralora(tmp_path):
    torch.manual_seed(3)
    base = Block()
    rules = {
        "q": random_config(r=8, gralora_k=4),
        "k|v": random_config(r=4, gralora_k=2, alpha=3),
        r"mlp\.[02]": random_config(hybrid_r=2, gralora_dropout=0.1),
    }
    model = gralora.inject(copy.deepcopy(base), rules).eval()
    with pytest.raises(ValueError, match=r"differ in r \(8 in 'q', 4 in .*format=\"lora\""):
        gralora.save_adapter(model, tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())
    gralora.save_adapter(model, tmp_path / "a", format="lora")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^q": 32, r"^mlp\.0": 10, r"^mlp\.2": 10}
    assert relative(in_peft(base, tmp_path / "a")(X), model(X)) < 1e-5
    assert (
        relative(gralora.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()(X), model(X))
        < 1e-5
    )
    assert relative(base(X), model(X)) > 1e-2


def test_to_lora_is_the_update_and_its_best_truncation():
    torch.manual_seed(1)
    model = gralora.inject(
        Block().double(), ["q", "mlp.0"], random_config(r=4, gralora_k=2, hybrid_r=1)
    )
    exact, errors = gralora.to_lora(model), {}
    cut = gralora.to_lora(model, rank=3, errors=errors)
    padded = gralora.to_lora(model, rank=20)
    for name, layer in gralora.layers.base.gralora_layers(model):
        delta = gralora.delta_weight(layer).detach()

        def product(pairs, name=name):
            return pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"]

        assert exact[f"{name}.lora_A.weight"].shape == (9, 16)
        assert padded[f"{name}.lora_A.weight"].shape == (20, 16)
        assert relative(product(exact), delta) < 1e-14
        assert relative(product(padded), delta) < 1e-14
        S = torch.linalg.svdvals(delta)
        assert (product(cut) - delta).norm() == pytest.approx(S[3:].norm())
        assert errors[name] == pytest.approx(float(S[3:].norm() / S.norm()))
        assert errors[name] > 0.01
    for rank in (0, True, 2.0):
        with pytest.raises(ValueError, match="rank="):
            gralora.to_lora(model, rank=rank)


def test_a_truncated_folder_has_one_rank_and_the_error_it_says(tmp_path):
    base = Block()
    model = gralora.inject(
        copy.deepcopy(base), {"q": random_config(r=8, gralora_k=4), "v": random_config(r=2)}
    )
    errors = {}
    gralora.save_adapter(model, tmp_path / "a", format="lora", rank=6, errors=errors)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        6,
        6,
        {},
        {},
    )
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")
    for name, error in errors.items():
        delta = gralora.delta_weight(model.get_submodule(name)).detach()
        off = gralora.delta_weight(loaded.get_submodule(name)) - delta
        assert float(off.norm() / delta.norm()) == pytest.approx(error, rel=1e-4)
    with pytest.raises(ValueError, match="rank=6 is for plain LoRA"):
        gralora.save_adapter(model, tmp_path / "b", rank=6)
