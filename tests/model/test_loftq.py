"""A start that takes back what quantising took away."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import gralora
from gralora.layers.base import gralora_layers

from ..models import Block, Experts, assert_same, fingerprint, gpt2, mlp, relative, same_bits
from ..needs import needs

CONFIG = gralora.GraloraConfig(r=8, gralora_k=2, alpha=16, init_weights="loftq")


def rounded(model, step=0.1):
    """A model whose weights lie on a grid, as after quantising."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.copy_((parameter / step).round() * step)
    return result


def cut(block):
    U, S, V = torch.linalg.svd(block, full_matrices=False)
    return (U[:, :4] * S[:4]) @ V[:4]


def test_each_block_gets_the_truncated_svd_of_what_is_missing_and_the_base_is_untouched():
    full = Block().double()
    base, errors = rounded(full), {}
    before = fingerprint(base)
    gralora.inject(base, "all-linear", CONFIG, reference=full, errors=errors)
    assert set(errors) == {name for name, _ in gralora_layers(base)}
    for name, layer in gralora_layers(base):
        W, missing = (
            full.get_submodule(name).weight,
            full.get_submodule(name).weight - layer._parameters["weight"],
        )
        wanted = torch.cat(
            [torch.cat([cut(block) for block in rows.chunk(2, 1)], 1) for rows in missing.chunk(2)]
        )
        delta = gralora.delta_weight(layer)
        torch.testing.assert_close(delta, wanted, atol=1e-12, rtol=0)
        told = (missing.norm() / W.norm()).item(), ((missing - delta).norm() / W.norm()).item()
        assert errors[name] == pytest.approx(told, abs=1e-9) and errors[name][1] < errors[name][0]
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    plain = rounded(full)
    assert relative(base(x), full(x)) < relative(plain(x), full(x))
    gralora.unload(base)
    assert_same(fingerprint(base), before)


def test_a_state_dict_a_file_and_a_folder_of_shards_serve_as_well(tmp_path):
    full = gpt2()
    state = {
        key: value.clone() for key, value in full.state_dict().items() if key != "lm_head.weight"
    }
    (tmp_path / "shards").mkdir()
    names = list(state)
    save_file(state, tmp_path / "whole.safetensors")
    for index, part in enumerate((names[::2], names[1::2])):
        save_file(
            {name: state[name] for name in part}, tmp_path / "shards" / f"model-{index}.safetensors"
        )
    found = []
    for reference in (full, state, tmp_path / "whole.safetensors", str(tmp_path / "shards")):
        model = gralora.inject(rounded(full), ["c_attn", "c_fc"], CONFIG, reference=reference)
        found.append(gralora.adapter_state_dict(model))
    assert all(
        same_bits(tensor, other[key]) for other in found[1:] for key, tensor in found[0].items()
    )
    assert any(tensor.any() for key, tensor in found[0].items() if key.endswith("_B"))


@pytest.mark.parametrize("kind", ["conv", "experts", "attention", "hybrid"])
def test_other_kinds_and_hybrid_pairs(kind):
    full = {
        "conv": nn.Conv1d(8, 8, 3),
        "experts": Experts(),
        "attention": nn.MultiheadAttention(16, 2),
    }.get(kind, mlp(8, 8))
    full, errors = full.double(), {}
    targets = {"experts": ["up"], "hybrid": ["0"]}.get(kind, "")
    config = gralora.GraloraConfig(
        r=4, hybrid_r=2 if kind == "hybrid" else 0, init_weights="loftq", use_rslora=True
    )
    gralora.inject(rounded(full), targets, config, reference=full, errors=errors)
    assert errors and all(0 < after < before for before, after in errors.values())


@pytest.mark.parametrize("bits", [4, 8])
def test_over_bitsandbytes_the_adapted_model_begins_nearer_to_the_full_one(bits):
    quantised = needs("bitsandbytes").nn
    full = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    base = copy.deepcopy(full)
    for name in ("0", "2"):
        linear = full.get_submodule(name)
        if bits == 4:
            layer = quantised.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
            layer.weight = quantised.Params4bit(
                linear.weight.detach().clone(), requires_grad=False, quant_type="nf4"
            )
        else:
            layer = quantised.Linear8bitLt(
                linear.in_features, linear.out_features, has_fp16_weights=False
            )
            layer.weight = quantised.Int8Params(linear.weight.detach().clone(), requires_grad=False)
        layer.bias = nn.Parameter(linear.bias.detach().clone())
        base[int(name)] = layer.to("cpu")
    x, errors = torch.randn(16, 64), {}
    away = (base(x) - full(x)).norm()
    config = gralora.GraloraConfig(r=32, gralora_k=2, init_weights="loftq")
    gralora.inject(base, "all-linear", config, reference=full, errors=errors)
    assert (base(x) - full(x)).norm() < 0.8 * away
    assert all(after < 0.8 * before for before, after in errors.values())
    with gralora.disable_adapter(base):
        torch.testing.assert_close((base(x) - full(x)).norm(), away)


def test_gradcheck_and_the_file_needs_no_reference(tmp_path):
    full = mlp(6, 8, 4, dtype=torch.float64)
    config = gralora.GraloraConfig(r=4, alpha=3, init_weights="loftq")
    model = gralora.inject(rounded(full), "all-linear", config, reference=full)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *gralora.adapter_parameters(model)))
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    again = gralora.load_adapter(rounded(full), tmp_path / "a.safetensors")
    assert same_bits(again(x), model(x))


def test_what_can_not_be_is_told_and_leaves_the_model_unchanged(tmp_path):
    full = mlp(16, 8, 16)
    nan = copy.deepcopy(full)
    nn.init.constant_(nan[0].weight, torch.nan)
    plain = gralora.GraloraConfig(r=4)
    meta = copy.deepcopy(full).to("meta")
    for base, config, reference, error in (
        (full, CONFIG, None, 'init_weights="loftq" needs a reference'),
        (full, plain, full, 'reference is for init_weights="loftq"'),
        (
            full,
            CONFIG,
            mlp(16, 16, 16),
            r"0\.weight is of shape \(8, 16\) in the base, and of shape \(16, 16\) there",
        ),
        (
            full,
            CONFIG,
            nn.Sequential(),
            r"0\.weight is of shape \(8, 16\) in the base, and missing there",
        ),
        (full, CONFIG, {"0.weight": torch.zeros(3)}, r"of shape \(3,\) there"),
        (full, CONFIG, nan, r"0\.weight is not finite"),
        (meta, CONFIG, full, r"0\.weight is spread over processes, or on meta"),
    ):
        before = fingerprint(base) if base is not meta else None
        with pytest.raises(ValueError, match=error):
            gralora.inject(base, "all-linear", config, reference=reference)
        if before is not None:
            assert_same(fingerprint(base), before)
        assert not gralora.adapter_names(base)
    with pytest.raises(TypeError, match="reference is a int"):
        gralora.inject(full, "all-linear", CONFIG, reference=3)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        gralora.inject(full, "all-linear", CONFIG, reference=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="takes its values from inject"):
        gralora.GraloraLinear(16, 8, config=CONFIG)
    assert F.linear(torch.ones(1, 16), full[0].weight).isfinite().all()
