"""Whatever plain PyTorch allows to be done to the output of a layer is allowed after an adapted
one, with the right numbers.
"""

import contextlib
import copy

import pytest
import torch
from torch import nn

import gralora
from benchmarks.speed._counting import kept_for_backward, kernels
from gralora.maths import autograd

from ..models import Doubled, gpt2, logits, mlp, random_config, relative

EDITS = {
    "relu_": torch.relu_,
    "add_": lambda y: y.add_(1.0),
    "mul_ by itself": lambda y: y.mul_(y.detach().sigmoid()),
    "a slice": lambda y: y[..., :2].mul_(3.0),
    "an item": lambda y: y.__setitem__((..., 0), 0.5),
    "masked_fill_": lambda y: y.masked_fill_(y.detach() > 0, 0.25),
    "an axis more, in place": lambda y: y.unsqueeze_(0),
    "through a view": lambda y: y.view(-1).add_(2.0),
}
SHAPES = [(16,), (3, 16), (2, 3, 16), (2, 2, 3, 16)]


def kinds():
    from transformers.pytorch_utils import Conv1D

    return {
        "linear": nn.Linear(16, 8),
        "no bias": nn.Linear(16, 8, bias=False),
        "conv1d": Conv1D(8, 16),
        "own forward": Doubled(16, 8),
    }


def edited(layer, x, edit):
    """The output and the input's gradient of a layer whose output, and what comes of it, is edited
    in place.
    """
    leaf = x.clone().requires_grad_()
    y = layer(leaf * 1)
    y += 1
    edit(y)
    y.float().square().sum().backward()
    return y.detach(), leaf.grad


def by_hand(kind, layer):
    """The plain layer of weight W + ΔW, trained, so that autograd keeps for it what it keeps for an
    adapted one.
    """
    plain = copy.deepcopy(kinds()[kind]).to(layer.weight.dtype)
    delta = gralora.delta_weight(layer) * (
        0.5 if kind == "own forward" else 1
    )  # the update is added behind its forward
    with torch.no_grad():
        plain.weight.copy_(layer.weight + delta)
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "own forward"])
def test_the_output_may_be_edited_in_place(kind, edit, shape):
    torch.set_default_dtype(torch.float64)
    try:
        layer = gralora.inject(kinds()[kind], "", random_config(hybrid_r=2))
        x = torch.randn(shape)
        ours, plain = (edited(each, x, EDITS[edit]) for each in (layer, by_hand(kind, layer)))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(ours, plain, strict=True):
        assert relative(a, b) < 1e-10
    assert all(p.grad is not None for p in gralora.adapter_parameters(layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_edits_give_the_numbers_of_the_plain_path(dtype, autocast, dropout, hybrid_r, monkeypatch):
    layer = gralora.inject(
        nn.Linear(16, 8, dtype=dtype), "", random_config(hybrid_r=hybrid_r, gralora_dropout=dropout)
    )
    x, found = torch.randn(2, 3, 16).to(dtype), []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(autograd, "usable", lambda *args: False)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            found.append(edited(layer, x, torch.relu_))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert relative(a.float(), b.float()) < (
            1e-6 if dtype is torch.float32 and not autocast else 3e-2
        )


def test_without_gradients_and_into_a_given_tensor():
    layer = gralora.inject(nn.Linear(16, 8), "", random_config())
    x = torch.randn(2, 3, 16)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            wanted = layer(x) + 1
            assert torch.equal(layer(x).add_(1), wanted)
            y = layer(x)
            assert torch.equal(torch.add(y, 1, out=y), wanted)
    y = layer(x)
    with torch.no_grad():
        y.add_(1)
    assert torch.equal(y, wanted)


def test_several_active_adapters_and_an_edit():
    model = mlp(16, 8)
    for name in "abc":
        gralora.inject(model, ["0"], random_config(), adapter_name=name)
    gralora.set_adapter(model, ["a", "b", "c"])
    x = torch.randn(2, 3, 16)
    ours, plain = (edited(each, x, torch.relu_) for each in (model[0], by_hand("linear", model[0])))
    for a, b in zip(ours, plain, strict=True):
        assert relative(a, b) < 1e-5


def test_an_encoder_layer_whose_activation_works_in_place():
    model = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, activation=torch.relu_, batch_first=True
    )
    plain = copy.deepcopy(model)
    gralora.inject(model, "all-linear", random_config(init_weights=True))
    x = torch.randn(2, 3, 16)
    y = model(x)
    assert relative(y, plain(x)) < 1e-6
    y.sum().backward()


def test_gpt2_whose_layers_are_edited_in_place():
    model = gralora.inject(gpt2().train(), ["c_fc", "c_attn"], random_config())
    for module in model.modules():
        if type(module).__name__ == "GraloraConv1D":
            module.register_forward_hook(lambda module, args, y: y.mul_(1.0))
    logits(model).sum().backward()
    assert all(p.grad is not None for p in gralora.adapter_parameters(model))


def test_compiled_code_may_edit_in_place():
    layer = gralora.inject(nn.Linear(16, 8), "", random_config())
    x = torch.randn(2, 3, 16)
    wanted = edited(layer, x, torch.relu_)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(x):
        return layer(x * 1).add_(1).relu_()

    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    y.square().sum().backward()
    assert relative(y, wanted[0]) < 1e-6
    assert relative(leaf.grad, wanted[1]) < 1e-6


def test_a_frozen_adapter_saves_no_input_so_it_may_be_edited_in_place():
    layer = gralora.inject(nn.Linear(16, 8), "", random_config(hybrid_r=2))
    layer.requires_grad_(False)
    leaf = torch.randn(2, 3, 16, requires_grad=True)
    x = leaf * 1
    y = layer(x)
    x.mul_(2)
    (grad,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    W = layer.weight + gralora.delta_weight(layer)
    assert relative(grad, 2 * y.detach() @ W) < 1e-5
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    assert relative(second, (2 * W.T @ W).sum(1).expand(2, 3, 16)) < 1e-5
    assert kept_for_backward(lambda: layer(x), list(layer.parameters())) == 0


def test_a_second_adapter_needs_no_copy_of_the_output():
    layer = gralora.inject(nn.Linear(16, 8), "", random_config())
    gralora.inject(layer, "", random_config(), adapter_name="other")
    gralora.set_adapter(layer, ["default", "other"])
    leaf = torch.randn(2, 3, 16, requires_grad=True)
    assert kernels(lambda: layer(leaf)) == ["addmm"] + 2 * [
        "bmm",
        "clone",
        "baddbmm_",
    ]  # the clone regroups z


def test_deberta_which_edits_the_output_of_its_projections():
    from transformers import DebertaConfig, DebertaModel

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    model = DebertaModel(
        DebertaConfig(vocab_size=64, relative_attention=True, pos_att_type="c2p|p2c", **sizes)
    ).train()
    gralora.inject(model, "all-linear", random_config())
    model(torch.arange(12)[None]).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in gralora.adapter_parameters(model))


def test_deformable_detr_which_adds_to_a_slice_of_its_predicted_boxes():
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    stages = {"depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"]}
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], **stages)
    sizes = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 2), ("ffn_dim", 32))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = DeformableDetrConfig(
        backbone_config=backbone, d_model=32, num_queries=6, dropout=0.0, **sizes, **heads
    )
    model, x = DeformableDetrForObjectDetection(config).train(), torch.randn(1, 3, 128, 128)
    gralora.inject(
        model,
        r".*(bbox_embed.*|layers.*(fc\d|value_proj|output_proj|[qkv]_proj))$",
        random_config(),
    )
    adapted = model(x).pred_boxes
    adapted.square().sum().backward()
    assert all(p.grad is not None for p in gralora.adapter_parameters(model))
    with gralora.disable_adapter(model):
        assert not torch.allclose(model(x).pred_boxes, adapted, atol=1e-3)
    gralora.merge(model)
    assert torch.allclose(model(x).pred_boxes, adapted, atol=1e-4)
