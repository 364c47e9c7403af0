"""What training moves besides gradients: frozen norms keep their statistics, and every other buffer
belongs to the model.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gralora

from ..models import assert_same, fingerprint, random_config, relative, same_bits


class Codebook(nn.Module):
    """Writes a persistent buffer of its own in training, as vector quantisation does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 8))
        self.register_buffer("mask", torch.ones(8), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.codes.data.mul_(0.9).add_(0.1 * x.detach().mean())
            self.steps += 1
        return x + self.codes.mean() * self.mask


def norms():
    return {
        "batch": nn.BatchNorm1d(8),
        "batch, no affine": nn.BatchNorm1d(8, affine=False),
        "sync": nn.SyncBatchNorm(8),
        "instance": nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
        "spectral": nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 5))),
    }


def model_with(norm):
    return nn.Sequential(nn.Conv1d(8, 8, 1), norm, nn.Conv1d(8, 4, 1))


def train(model, x, steps=3):
    model.train()
    optimizer = torch.optim.SGD(gralora.adapter_parameters(model), lr=0.1)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("name", norms())
def test_a_frozen_norm_keeps_its_statistics_while_the_adapter_trains(name, tmp_path):
    torch.manual_seed(0)
    model = model_with(norms()[name]).train()
    model(torch.randn(6, 8, 5))  # statistics that are not those of the start
    x, before = 3 * torch.randn(6, 8, 5) + 1, fingerprint(model)
    base = copy.deepcopy(model).eval()
    gralora.inject(model, "0|2", random_config(alpha=2))
    train(model, x)
    y = model(x)
    assert relative(y, base(x)) > 1e-3
    with gralora.disable_adapter(model):
        assert same_bits(model(x), base(x))
    gralora.save_adapter(model, tmp_path / "adapter")
    fresh = gralora.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert same_bits(fresh(x), y)
    assert same_bits(
        fresh.train()(x), y
    )  # in training a frozen norm computes as it will when the adapter is used
    gralora.unload(model).train()
    assert_same({**fingerprint(model), "hooks": {}}, {**before, "hooks": {}})


def test_a_norm_in_modules_to_save_or_that_is_trained_moves_its_own(tmp_path):
    x = 3 * torch.randn(6, 8, 5) + 1
    base = model_with(nn.BatchNorm1d(8)).eval()
    model = gralora.inject(copy.deepcopy(base), "0", random_config(modules_to_save=["1"]))
    train(model, x)
    assert not torch.equal(model[1].running_mean, base[1].running_mean)
    y = model(x)
    with gralora.disable_adapter(model):
        assert same_bits(model(x), base(x))
    gralora.save_adapter(model, tmp_path / "adapter")
    assert same_bits(gralora.load_adapter(copy.deepcopy(base), tmp_path / "adapter")(x), y)
    assert same_bits(gralora.unload(model)(x), base(x))
    model = gralora.inject(copy.deepcopy(base), "0", random_config())
    model[1].weight.requires_grad_(True)
    train(model, x)
    assert not torch.equal(model[1].running_mean, base[1].running_mean)


def test_every_other_buffer_belongs_to_the_model(tmp_path):
    model = model_with(Codebook()).train()
    x, base = torch.randn(6, 8, 8), copy.deepcopy(model).eval()
    gralora.inject(model, "0|2", random_config())
    train(model, x)
    codes = model[1].codes.clone()
    assert not torch.equal(codes, base[1].codes)
    with gralora.disable_adapter(model):
        assert torch.equal(model[1].codes, codes)
    gralora.save_adapter(model, tmp_path / "adapter")
    y = model(x)
    merged = gralora.merge_and_unload(copy.deepcopy(model))
    assert relative(merged(x), y) < 1e-5
    assert torch.equal(gralora.unload(model)[1].codes, codes)
    model = gralora.inject(copy.deepcopy(base), "0", random_config(modules_to_save=["1"]))
    train(model, x)  # with modules_to_save they are the copy's, and in the file
    with gralora.disable_adapter(model):
        assert same_bits(model(x), base(x))
    gralora.save_adapter(model, tmp_path / "with_codes")
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "with_codes")
    assert same_bits(loaded(x), model(x))


def test_a_norm_whose_bias_is_trained_keeps_the_statistics_of_the_base():
    base = model_with(nn.BatchNorm1d(8))
    model = gralora.inject(copy.deepcopy(base), "0", random_config(bias="all"))
    train(model, 3 * torch.randn(6, 8, 5) + 1)
    assert torch.equal(model[1].running_mean, base[1].running_mean)
    norm_bias = gralora.adapter_state_dict(model)["1.bias"]
    assert not torch.equal(norm_bias, base[1].bias)


def test_compiled_and_merged_models_keep_still_too():
    model = gralora.inject(model_with(nn.BatchNorm1d(8)), "0", random_config())
    x, before = torch.randn(6, 8, 5), model[1].running_mean.clone()
    y = model.train()(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), y) < 1e-6
    gralora.merge(model)
    assert relative(model(x), y) < 1e-5
    assert torch.equal(model[1].running_mean, before)
    gralora.merge_and_unload(model)
    assert type(model[1]) is nn.BatchNorm1d


def test_convert_sync_batchnorm_does_not_lose_a_saved_module_in_silence(tmp_path):
    model = gralora.inject(model_with(nn.BatchNorm1d(8)), "0", random_config(modules_to_save=["1"]))
    train(model, torch.randn(6, 8, 5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(
        ValueError, match="1 of what adapter 'default' was injected into are there no more: 1"
    ):
        gralora.save_adapter(converted, tmp_path / "adapter")
    gralora.save_adapter(converted, tmp_path / "adapter", allow_missing=True)
    first = nn.SyncBatchNorm.convert_sync_batchnorm(
        model_with(nn.BatchNorm1d(8))
    )  # the other order
    gralora.inject(first, "0", random_config(modules_to_save=["1"]))
    gralora.save_adapter(first, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_norm_keeps_its_statistics_once_it_has_some():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyBatchNorm1d())
    gralora.inject(model, ["0"], random_config())
    x = torch.randn(16, 8) + 3
    model.train()(x)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert torch.equal(model[1].running_mean, torch.zeros(8))
    gralora.unload(model)
    assert type(model[1]) is nn.BatchNorm1d
    model(x)
    assert model[1].running_mean.any()
