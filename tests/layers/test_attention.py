"""`nn.MultiheadAttention` against attention with W + ΔW."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers

from ..models import assert_same, fingerprint, random_config, relative, same_bits

SIZES = {"same": {}, "different": {"kdim": 12, "vdim": 8}}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def attention(batch_first=True, **kwargs):
    return nn.MultiheadAttention(16, 4, batch_first=batch_first, dtype=torch.float64, **kwargs)


def inputs(module, batched=True):
    shapes = [(3, 5, 16), (3, 7, module.kdim), (3, 7, module.vdim)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if not batched:
        return [x[0] for x in tensors]
    return tensors if module.batch_first else [x.transpose(0, 1) for x in tensors]


def with_delta(model):
    """The same model without adapters, its weights W + ΔW, computed here and not by `merge`."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.MultiheadAttention):
            deltas = {
                part: gralora.delta_weight(module._modules[f"gralora_{part}"]) for part in PARTS
            }
            with torch.no_grad():
                if module._qkv_same_embed_dim:
                    module.in_proj_weight.add_(torch.cat([deltas[part] for part in PARTS[:3]]))
                else:
                    for part in PARTS[:3]:
                        getattr(module, f"{part}_weight").add_(deltas[part])
                module.out_proj.weight.add_(deltas["out_proj"])
        elif isinstance(module, gralora.GraloraLinear):
            with torch.no_grad():
                module.weight.add_(gralora.delta_weight(module))
    return gralora.unload(plain)


PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(5, 7).triu(1).bool()},
    "float": {"attn_mask": torch.linspace(-2, 0, 35).reshape(5, 7).double()},
    "per head": {"attn_mask": torch.linspace(-2, 0, 3 * 4 * 35).reshape(12, 5, 7).double()},
    "padding": {"key_padding_mask": torch.arange(7).expand(3, 7) > torch.tensor([[6], [3], [4]])},
    "causal": {"attn_mask": torch.ones(5, 7).triu(1).bool(), "is_causal": True},
}
MASKS["both"] = {**MASKS["bool"], **MASKS["padding"]}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("need_weights", [True, False, "each head"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_attention_with_w_plus_delta_w(size, batch_first, mask, need_weights, mode):
    for options in OPTIONS.values():
        module = attention(batch_first, **SIZES[size], **options)
        args = inputs(module)
        flags = {
            "need_weights": bool(need_weights),
            "average_attn_weights": need_weights is not True,
            **MASKS[mask],
        }
        module.train(mode == "train")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # masks of two types
            base, _ = module(*args, **flags)
            gralora.inject(module, "", random_config(hybrid_r=1))
            y, weights = module(*args, **flags)
            expected, expected_weights = with_delta(module)(*args, **flags)
        assert not torch.allclose(y, base)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
def test_one_sequence_without_a_batch_axis(need_weights):
    module = gralora.inject(attention(), "", random_config())
    args = inputs(module, batched=False)
    expected = with_delta(module)(*args, need_weights=need_weights)
    for mine, theirs in zip(module(*args, need_weights=need_weights), expected):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_through_w_plus_delta_w():
    module = gralora.inject(attention(), "", random_config())
    q, k, v = (x.requires_grad_() for x in inputs(module))
    parameters = gralora.adapter_parameters(module)
    deltas = {part: gralora.delta_weight(module._modules[f"gralora_{part}"]) for part in PARTS}
    weights = {
        "in_proj_weight": module.in_proj_weight + torch.cat([deltas[part] for part in PARTS[:3]]),
        "out_proj.weight": module.out_proj.weight + deltas["out_proj"],
    }
    plain = gralora.unload(copy.deepcopy(module))
    expected, _ = torch.func.functional_call(plain, weights, (q, k, v))
    y, _ = module(q, k, v)
    grad = torch.randn_like(y)
    mine = torch.autograd.grad(y, [q, k, v, *parameters], grad)
    theirs = torch.autograd.grad(expected, [q, k, v, *parameters], grad)
    assert len(mine) == 3 + 8
    for a, b in zip(mine, theirs):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_at_the_start_and_when_disabled_the_attention_is_its_own_bit_for_bit():
    module = attention().requires_grad_(False)
    args = inputs(module)
    y, weights = module(*args)
    before = fingerprint(module)
    gralora.inject(module, "", GraloraConfig(r=4))
    torch.testing.assert_close(module(*args)[0], y, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in gralora.adapter_parameters(module):
            parameter.normal_()
    assert not torch.allclose(module(*args)[0], y)
    with gralora.disable_adapter(module):
        assert same_bits(module(*args)[0], y) and same_bits(module(*args)[1], weights)
    gralora.unload(module)
    assert_same(fingerprint(module), before)
    assert type(module) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_a_projection_alone_is_a_target_and_base_names_stay():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    state = copy.deepcopy(model.state_dict())
    gralora.inject(model, ["q_proj", "v_proj"], random_config())
    names = [name for name, layer in gralora_layers(model) if list(layer.gralora_adapters)]
    assert names == [
        f"layers.{i}.self_attn.{part}" for i in (0, 1) for part in ("q_proj", "v_proj")
    ]
    assert {key for key in model.state_dict() if "gralora_" not in key} == set(state)
    model.load_state_dict(state)
    large = gralora.inject(model, {r".*k_proj": random_config(r=8)}, adapter_name="k")
    assert gralora.adapter_names(large) == ["default", "k"]
    assert set(gralora.adapter_state_dict(model)) == {
        f"{name}.gralora_{letter}" for name in names for letter in "AB"
    }


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
@pytest.mark.parametrize("size", SIZES)
def test_merge_in_parts_and_exact_unmerge(size):
    module = gralora.inject(
        attention(**SIZES[size]), ["q_proj", "k_proj"], random_config(), adapter_name="a"
    )
    gralora.inject(
        module, ["k_proj", "v_proj", "out_proj"], random_config(r=8, gralora_k=4), adapter_name="b"
    )
    gralora.set_adapter(module, {"a": 0.5, "b": 2.0})
    args = inputs(module)
    y, before = module(*args)[0], fingerprint(module)
    gralora.merge(module, "a")
    torch.testing.assert_close(module(*args)[0], y)
    gralora.merge(module, "b")
    merged = fingerprint(module)
    torch.testing.assert_close(module(*args)[0], y)
    with gralora.disable_adapter(module):
        base = module(*args)[0]
        assert relative(base, y) > 1e-2
    assert_same(fingerprint(module), merged)
    with pytest.raises(RuntimeError, match="holds a merged adapter"):
        module.load_state_dict({k: v for k, v in module.state_dict().items() if "gralora" not in k})
    assert_same(fingerprint(module), merged)
    gralora.unmerge(module)
    assert_same(fingerprint(module), before)
    gralora.merge(module, ["a", "b"])
    for key, tensor in merged["tensors"].items():
        assert same_bits(tensor, module.state_dict()[key]), key
    plain = gralora.merge_and_unload(module)
    assert type(plain) is nn.MultiheadAttention
    torch.testing.assert_close(plain(*args)[0], y)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize(
    "which", ["encoder layer", "encoder", "decoder layer", "decoder", "transformer"]
)
def test_the_transformer_modules_of_pytorch_whole(which, mode, batch_first):
    sizes = {
        "dim_feedforward": 32,
        "dropout": 0.0,
        "batch_first": batch_first,
        "dtype": torch.float64,
    }
    encoder, decoder = (
        nn.TransformerEncoderLayer(16, 2, **sizes),
        nn.TransformerDecoderLayer(16, 2, **sizes),
    )
    model = {
        "encoder layer": encoder,
        "encoder": nn.TransformerEncoder(encoder, 2, enable_nested_tensor=batch_first),
        "decoder layer": decoder,
        "decoder": nn.TransformerDecoder(decoder, 2),
        "transformer": nn.Transformer(16, 2, 1, 1, **sizes),
    }[which].train(mode == "train")
    source, target = (
        torch.randn(3, 5, 16, dtype=torch.float64),
        torch.randn(3, 4, 16, dtype=torch.float64),
    )
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    calls = {
        "encoder": lambda m: m(source),
        "decoder": lambda m: m(target, source, tgt_mask=causal, tgt_is_causal=True),
        "transformer": lambda m: m(source, target, tgt_mask=causal),
    }
    run = calls[which.split()[0]]
    with torch.set_grad_enabled(mode != "no_grad"):
        base = run(model)
        gralora.inject(model, "all-linear", random_config())
        expected = {
            f"{name}.{part}"
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for part in PARTS
        } | {
            name for name, module in model.named_modules() if name.endswith(("linear1", "linear2"))
        }
        assert {name for name, _ in gralora_layers(model)} == expected
        y = run(model)
        assert relative(y, base) > 1e-2
        torch.testing.assert_close(y, run(with_delta(model)), rtol=1e-9, atol=1e-9)
        gralora.merge(model)
        torch.testing.assert_close(run(model), y, rtol=1e-9, atol=1e-9)
        gralora.unload(model)
        torch.testing.assert_close(run(model), base, rtol=1e-12, atol=1e-12)


def test_training_lowers_the_loss_and_trains_every_projection():
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    gralora.inject(model, "all-linear", GraloraConfig(r=4, gralora_dropout=0.1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    source, target, wanted = (torch.randn(2, 5, 16) for _ in range(3))
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(source, target) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("gralora_" not in name), name


@pytest.mark.parametrize("format", ["gralora", "lora"])
def test_saved_loaded_and_read_by_peft(format, tmp_path):
    base = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2
    ).eval()
    targets = {
        r".*q_proj|.*v_proj": random_config(),
        r".*k_proj": random_config(r=8, alpha=4),
        r".*linear1": random_config(),
    }
    model = gralora.inject(copy.deepcopy(base), targets)
    x = torch.randn(2, 5, 16)
    y = model(x)
    gralora.save_adapter(model, tmp_path / "a", format=format)
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(loaded(x), y)
    assert not torch.allclose(loaded(x), base(x))
    if format == "lora":
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "a"
        ).train()  # in eval it is dead there
        torch.testing.assert_close(theirs(x), y, rtol=1e-4, atol=1e-5)


def test_what_peft_saves_of_an_attention_loads(tmp_path):
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, batch_first=True)})
    config = peft.LoraConfig(r=4, target_modules=["attention"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path)
    pairs = peft.get_peft_model_state_dict(theirs)
    for place, parameter in (("", "in_proj_weight"), ("base_layer.out_proj.", "out_proj.weight")):
        down, up = (
            pairs[f"base_model.model.attention.{place}lora_{letter}.weight"] for letter in "AB"
        )
        delta = with_delta(ours)["attention"].get_parameter(parameter) - base[
            "attention"
        ].get_parameter(parameter)
        torch.testing.assert_close(delta, 2 * up @ down)
    with torch.no_grad():  # PEFT adds its update of out_proj twice, so compare without
        theirs.base_model.model["attention"].base_layer.out_proj.lora_B["default"].weight.zero_()
        ours["attention"]._modules["gralora_out_proj"].gralora_adapters["default"].B.zero_()
    x = torch.randn(2, 5, 16)
    y = theirs.base_model.model["attention"](x, x, x)[0]
    assert not torch.allclose(base["attention"](x, x, x)[0], y)
    torch.testing.assert_close(ours["attention"](x, x, x)[0], y, rtol=1e-4, atol=1e-5)


def test_out_proj_is_written_with_a_warning_of_what_peft_makes_of_it(tmp_path):
    model = gralora.inject(
        nn.ModuleDict({"a": nn.MultiheadAttention(16, 4)}), ["out_proj", "q_proj"], random_config()
    )
    with pytest.warns(
        UserWarning, match="PEFT up to 0.21.2 applies the update of an attention's out_proj twice"
    ):
        gralora.save_adapter(model, tmp_path / "lora", format="lora")
    loaded = gralora.load_adapter(
        nn.ModuleDict({"a": nn.MultiheadAttention(16, 4)}), tmp_path / "lora"
    )
    for name, layer in gralora_layers(model):
        if list(layer.gralora_adapters):
            torch.testing.assert_close(
                dict(gralora_layers(loaded))[name].delta_weight(), layer.delta_weight()
            )


@pytest.mark.parametrize(
    ("format", "size", "text"),
    [("peft", "same", "of kind 'attention'"), ("lora", "different", "differ in size")],
)
def test_what_peft_cannot_express_is_refused(format, size, text, tmp_path):
    model = gralora.inject(nn.ModuleDict({"a": attention(**SIZES[size])}), ["a"], random_config())
    with pytest.raises(ValueError, match=text):
        gralora.save_adapter(model, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_an_attention_with_a_forward_of_its_own_is_refused_by_name_and_left_out_of_all_linear():
    model = nn.ModuleDict({"own": Own(16, 4), "fc": nn.Linear(16, 16)})
    before = fingerprint(model)
    with pytest.raises(
        ValueError,
        match="'own.q_proj' is a projection of an nn.MultiheadAttention with a forward of its own",
    ):
        gralora.inject(model, ["own"], random_config())
    assert_same(fingerprint(model), before)
    gralora.inject(model, "all-linear", random_config())
    assert [name for name, _ in gralora_layers(model)] == ["fc"]


def test_a_subclass_without_a_forward_of_its_own_is_adapted():
    class Named(nn.MultiheadAttention):
        pass

    model = Named(16, 4)
    x = torch.randn(5, 2, 16)
    base = model(x, x, x)[0]
    assert isinstance(gralora.inject(model, "", random_config()), Named)
    assert not torch.allclose(model(x, x, x)[0], base)


def test_autocast_and_half_precision():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    gralora.inject(module, "", random_config())
    y = module(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x, x, x)[0]
    assert half.dtype == torch.bfloat16 and relative(half.float(), y) < 0.05
    module = gralora.inject(nn.MultiheadAttention(16, 4, dtype=torch.bfloat16), "", random_config())
    assert module._modules["gralora_q_proj"].gralora_adapters["default"].A.dtype == torch.float32
    x = x.bfloat16()
    assert module(x, x, x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["self_attn"], {"linear1", "linear2"}),
        (r".*self_attn", {"linear1", "linear2"}),
        (
            ["q_proj", "linear1"],
            {"self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "linear2"},
        ),
        (
            ["out_proj"],
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "linear1", "linear2"},
        ),
    ],
)
def test_an_attention_or_some_of_its_projections_excluded(exclude, left):
    model = nn.TransformerEncoderLayer(16, 2, 32)
    gralora.inject(model, "all-linear", random_config(exclude_modules=exclude))
    assert {name for name, layer in gralora_layers(model) if list(layer.gralora_adapters)} == left


def test_an_attention_saved_whole_is_not_adapted():
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    y = model(x)
    gralora.inject(
        model, "all-linear", random_config(modules_to_save=["self_attn"], init_weights=True)
    )
    assert {name for name, _ in gralora_layers(model)} == {"linear1", "linear2"}
    with torch.no_grad():
        model.self_attn.in_proj_weight.add_(1)
    assert relative(model(x), y) > 1e-2
    with gralora.disable_adapter(model):
        torch.testing.assert_close(model(x), y)
