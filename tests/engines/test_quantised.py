"""Bases quantised by bitsandbytes and torchao, on the CPU."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig

from ..models import random_config, relative, same_bits, ten_losses
from ..needs import needs

X, TARGET = (
    torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False))


def bitsandbytes(cls, **options):
    def make():
        module = getattr(needs("bitsandbytes").nn, cls)
        model = nn.Sequential(
            module(64, 128, **options), nn.Tanh(), module(128, 64, bias=False, **options)
        )
        model.load_state_dict(plain().state_dict())
        return model.to("cpu")  # which is what quantises

    return make


def torchao(name, **options):
    def make():
        quantization = needs("torchao.quantization")
        model = plain()
        quantization.quantize_(model, getattr(quantization, name)(**options))
        return model

    return make


BASES = {
    "bitsandbytes nf4": bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "bitsandbytes nf4, double": bitsandbytes(
        "Linear4bit", quant_type="nf4", compress_statistics=True
    ),
    "bitsandbytes int8": bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}

pytestmark = [
    pytest.mark.parametrize("make", BASES.values(), ids=BASES),
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def dequantised(model):
    """The weights as the layers' own forward has them, on unit vectors."""
    return [
        model[i](torch.eye(n)).detach() - (0 if model[i].bias is None else model[i].bias)
        for i, n in ((0, 64), (2, 128))
    ]


def test_forward_backward_and_training(make):
    model = make()
    classes = [type(model[i]) for i in (0, 2)]
    base, (first, second) = model(X), dequantised(model)
    assert relative(base, plain()(X)) > 1e-4  # it is quantised
    gralora.inject(model, "all-linear", random_config(r=8, hybrid_r=2, alpha=4))
    assert all(p.dtype == torch.float32 for p in gralora.adapter_parameters(model))
    x = X.clone().requires_grad_()
    y = model(x)
    W = [first.T + gralora.delta_weight(model[0]), second.T + gralora.delta_weight(model[2])]
    other = X.clone().requires_grad_()
    expected = nn.functional.linear(
        torch.tanh(nn.functional.linear(other, W[0], model[0].bias)), W[1]
    )
    assert relative(y, expected) < 0.03  # 8-bit layers round their input, too
    assert relative(y, base) > 0.1
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected.square().sum().backward()
    assert relative(x.grad, other.grad) < 0.1
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert relative(found[name], p.grad) < 0.1, name
    losses = ten_losses(model, X, TARGET)
    assert losses[-1] < 0.8 * losses[0]
    gralora.unload(model)
    assert same_bits(model(X), base)
    assert [type(model[i]) for i in (0, 2)] == classes


def test_only_the_adapter_is_saved_and_loaded(make, tmp_path):
    model = gralora.inject(make(), "all-linear", GraloraConfig(r=8))
    ten_losses(model, X, TARGET)
    y = model(X)
    gralora.save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter").stat().st_size < 8 * (64 + 128) * 2 * 4 + 3000
    fresh = make()
    base = fresh(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gralora.load_adapter(fresh, tmp_path / "adapter")
    assert same_bits(fresh(X), y)
    with gralora.disable_adapter(fresh):
        assert same_bits(fresh(X), base)
    assert relative(y, base) > 0.1
    assert same_bits(copy.deepcopy(fresh)(X), y)


def test_merging_is_refused_with_the_ways_out_and_dequantising_is_one(make, tmp_path):
    model = gralora.inject(make(), "all-linear", random_config(r=8, alpha=4))
    y, weights = model(X), [model[i].weight for i in (0, 2)]
    for merge in (gralora.merge, gralora.merge_and_unload):
        with pytest.raises(
            TypeError,
            match=re.compile(r"'0'.*quantised.*Ways out.*dequantize=torch\.bfloat16", re.S),
        ):
            merge(model)
    assert all(model[i].weight is weight for i, weight in zip((0, 2), weights))
    assert same_bits(model(X), y)
    plain_model = gralora.merge_and_unload(copy.deepcopy(model), dequantize=torch.float32)
    assert [type(layer) for layer in plain_model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert (
        type(plain_model[0].weight) is nn.Parameter and plain_model[0].weight.dtype == torch.float32
    )
    assert relative(plain_model(X), y) < 0.03
    half = gralora.merge_and_unload(model, dequantize=torch.bfloat16)
    assert half[2].weight.dtype == torch.bfloat16 and relative(half(X.bfloat16()).float(), y) < 0.05
    with pytest.raises(KeyError, match="no adapter"):
        gralora.save_adapter(half, tmp_path / "nowhere")
