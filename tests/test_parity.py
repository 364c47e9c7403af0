"""The same numbers as PEFT's own GraLoRA, from PyPI."""

import copy

import pytest
import torch
from torch import nn

import gralora
from gralora.layers.base import gralora_layers

from .models import (
    bert,
    gpt2,
    llama,
    logits,
    mlp,
    random_config,
    randomize_,
    relative,
    same_bits,
    ten_losses,
)
from .peft_reference import copy_to_peft, pairs, peft_layers, peft_model

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class OneConv1D(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c = Conv1D(16, 32).to(dtype)
        nn.init.normal_(self.c.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(x)


def both(base, targets, config):
    """The base injected by us, and by PEFT, with the same random adapter values."""
    theirs = peft_model(base, config, targets)
    ours = gralora.inject(copy.deepcopy(base), targets, config)
    randomize_(ours)
    copy_to_peft(ours, theirs)
    return ours, theirs


def check(ours, theirs, x, tolerance):
    with gralora.disable_adapter(ours):
        base = ours(x)
    outputs, gradients = [], []
    for model in (ours, theirs):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        outputs.append(y.detach())
        gradients.append(leaf.grad)
    assert relative(outputs[0], base) > 0.05, "the adapter has no effect"
    assert relative(*outputs) < tolerance
    assert relative(*gradients) < tolerance
    for mine, other in pairs(ours, theirs):
        assert mine.grad.abs().max() > 0
        assert relative(mine.grad, other.grad) < tolerance


def check_weights(ours, theirs, tolerance):
    reference = peft_layers(theirs)
    for name, layer in gralora_layers(ours):
        delta = gralora.delta_weight(layer, "default")
        assert delta.shape == layer.weight.shape
        assert relative(delta, reference[name].get_delta_weight("default")) < tolerance
    gralora.merge(ours)
    theirs.merge_adapter()
    for name, layer in gralora_layers(ours):
        assert relative(layer.weight, reference[name].get_base_layer().weight) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hybrid_r", [0, 4])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_outputs_gradients_and_weights_are_those_of_peft(kind, shape, k, hybrid_r, dtype):
    base, targets = (
        (mlp(32, 16, dtype=dtype), ["0"]) if kind == "linear" else (OneConv1D(dtype), ["c"])
    )
    ours, theirs = both(base, targets, random_config(r=8, gralora_k=k, hybrid_r=hybrid_r))
    check(ours, theirs, torch.randn(*shape, 32, dtype=dtype), TOLERANCE[dtype])
    check_weights(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("hybrid_r", [0, 4])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_bfloat16_base_is_as_close_as_the_two_ways_of_peft_are_to_each_other(k, hybrid_r):
    base = mlp(64, 32, dtype=torch.bfloat16)
    ours, theirs = both(base, ["0"], random_config(r=8, gralora_k=k, hybrid_r=hybrid_r))
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        y, beside = ours(x), theirs(x)
        theirs.merge_adapter()
        merged = theirs(x)
        exact = copy.deepcopy(ours).double()(x.double())
    assert y.dtype == torch.bfloat16

    def error(a, b):
        return (a.double() - b.double()).pow(2).mean().sqrt()

    assert error(y, beside) <= error(merged, beside)
    assert error(y, exact) <= 1.01 * error(beside, exact)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (bert, ["query", "value", "dense"]),
        (gpt2, ["c_attn", "c_proj"]),
        (llama, ["q_proj", "v_proj", "down_proj"]),
    ],
)
def test_whole_models_agree_with_peft(make, targets):
    ours, theirs = both(make(), targets, random_config())
    y, reference = logits(ours), logits(theirs)
    with gralora.disable_adapter(ours):
        assert relative(y, logits(ours)) > 0.05
    assert relative(y, reference) < 1e-5


@pytest.mark.parametrize(
    "base_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16]
)
@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_one_seed_gives_the_values_of_peft_bit_for_bit(k, init_weights, base_dtype):
    base = bert().to(base_dtype)
    config = gralora.GraloraConfig(r=8, gralora_k=k, init_weights=init_weights)
    targets = ["query", "value", "dense"]
    torch.manual_seed(7)
    theirs = peft_model(base, config, targets)
    torch.manual_seed(7)
    ours = gralora.inject(base, targets, config)
    for mine, other in pairs(ours, theirs):
        assert same_bits(mine, other)


def test_conv1d_gets_the_values_of_peft_too():
    base = gpt2()
    config = gralora.GraloraConfig(r=8, gralora_k=4)
    torch.manual_seed(7)
    theirs = peft_model(base, config, ["c_attn", "c_fc"])
    torch.manual_seed(7)
    for mine, other in pairs(gralora.inject(base, ["c_attn", "c_fc"], config), theirs):
        assert same_bits(mine, other)


def test_dropout_draws_are_those_of_peft():
    config = random_config(gralora_dropout=0.5, hybrid_r=2)
    ours, theirs = both(mlp(32, 16), ["0"], config)
    x = torch.randn(4, 6, 32)
    torch.manual_seed(3)
    y = ours(x)
    torch.manual_seed(3)
    assert relative(y, theirs(x)) < 1e-5
    assert relative(y, ours.eval()(x)) > 0.05


@pytest.mark.parametrize("bias", ["none", "all", "gralora_only"])
def test_ten_training_steps_give_the_losses_of_peft(bias):
    torch.manual_seed(0)
    base = mlp(16, 32, 8)
    config = gralora.GraloraConfig(r=8, gralora_k=2, bias=bias)
    theirs = peft_model(base, config, ["0", "2"])
    ours = gralora.inject(copy.deepcopy(base), ["0", "2"], config)
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            other.copy_(mine)
    x, target = torch.randn(64, 16), torch.randn(64, 8)
    # weight decay acts on a bias in PEFT, and on what is added to it here
    decay = 0.01 if bias == "none" else 0.0
    losses = [ten_losses(model, x, target, decay) for model in (ours, theirs)]
    assert losses[0][-1] < 0.95 * losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_the_trainable_line_is_that_of_peft(capsys):
    ours, theirs = both(bert(), ["query", "value"], random_config())
    gralora.print_trainable_parameters(ours)
    line = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert line == capsys.readouterr().out
    assert gralora.count_parameters(ours) == theirs.get_nb_trainable_parameters()


def test_defaults_by_architecture_are_those_of_peft_where_it_has_some():
    from peft.utils import TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING as theirs

    from gralora.model.defaults import DEFAULT_TARGETS

    as_tuples = {name: t if isinstance(t, str) else tuple(t) for name, t in theirs.items()}
    assert as_tuples.items() <= DEFAULT_TARGETS.items()
