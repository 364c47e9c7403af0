"""What of a model concerns adapters, in one walk; it must agree with the walks that look for
each.
"""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gralora
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.base import gralora_layers
from gralora.model.record import vanished
from gralora.model.saved import bias_swaps, saved_modules
from gralora.model.state import known_adapters
from gralora.model.survey import survey

from ..models import Block, everything, llama, random_config, two_adapters


def wrapped():
    return nn.ModuleDict(
        {"one": checkpoint_wrapper(gralora.inject(Block(), "all-linear", random_config()))}
    )


def tied():
    model = gralora.inject(llama(), ["q_proj"], random_config(trainable_token_indices=[1]))
    return gralora.inject(model, ["v_proj"], random_config(), adapter_name="b")


@pytest.mark.parametrize(
    "make", [everything, two_adapters, wrapped, tied, Block], ids=lambda make: make.__name__
)
def test_it_finds_what_the_other_walks_find(make):
    model, found = make(), survey(make())
    assert [name for name, _ in found.layers] == [name for name, _ in gralora_layers(model)]
    assert sorted(name for name, _ in found.saved) == sorted(
        name for name, _ in saved_modules(model)
    )
    assert sorted(key for key, _ in found.biases) == sorted(key for key, _, _ in bias_swaps(model))
    named = [name for _, layer in gralora_layers(model) for name in layer.gralora_adapters]
    named += [name for _, module in saved_modules(model) for name in module.gralora_saved]
    named += [name for _, _, swap in bias_swaps(model) for name in swap.names]
    assert found.names() == known_adapters(model) == list(dict.fromkeys(named))
    assert not any(found.gone(name) for name in found.names())
    assert found.only_adapters is (make in (two_adapters, wrapped, Block))


def test_what_has_been_rebuilt_is_gone():
    model = nn.Sequential(Block(), Block())
    gralora.inject(
        model[1],
        ["q", "v"],
        random_config(modules_to_save=["head"], bias="gralora_only"),
        adapter_name="x",
    )
    model[1].q, model[1].head = nn.Linear(16, 16), nn.Linear(16, 4)
    assert survey(model).gone("x") == vanished(model, ["x"]) and {"1.q", "1.head"} <= set(
        survey(model).gone("x")
    )


def test_what_a_rebuilt_module_still_carries_is_lost_and_its_adapter_known():
    norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    gralora.inject(norm, "0", random_config(modules_to_save=["1"]))
    rebuilt = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # which takes the children along
    found = survey(rebuilt)
    assert (len(found.lost), found.saved, found.only_adapters) == (1, [], False)
    assert found.gone("default") == ["1"] and found.names() == known_adapters(rebuilt) == [
        "default"
    ]
    with pytest.warns(UserWarning, match="1: adapted once, and there no more"):
        gralora.set_adapter(rebuilt, "default")


def test_where_there_is_more_than_adapters_the_whole_way_is_taken():
    merged = two_adapters()
    gralora.merge(merged, "a")
    assert not survey(merged).only_adapters

    class Other(GraloraAdapter):
        """As `fully_shard` makes one of each class."""

    changed = two_adapters()
    changed[2].gralora_adapters["a_b"].__class__ = Other
    assert not survey(changed).only_adapters
    before = {name: p.requires_grad for name, p in changed.named_parameters()}
    gralora.set_adapter(changed, "a_b")
    assert {name: p.requires_grad for name, p in changed.named_parameters()} != before
    assert gralora.active_adapters(changed) == {"a_b": 1.0}


@pytest.mark.parametrize("names", ["a", "b", ["a", "b"], {"b": 0.5, "a": 2}, []])
@pytest.mark.parametrize("trainable", [None, False, "b", ["a", "b"]])
def test_the_short_way_leaves_the_model_as_the_long_one_does(names, trainable, monkeypatch):
    short = gralora.inject(Block(), "all-linear", random_config(), adapter_name="a")
    gralora.inject(short, ["q", "head"], random_config(), adapter_name="b")
    gralora.set_adapter(short, {"a": 0.3})
    long = copy.deepcopy(short)
    assert survey(short).only_adapters
    gralora.set_adapter(short, names, trainable=trainable)
    monkeypatch.setattr(
        "gralora.model.control.survey", lambda model: survey(model)._replace(only_adapters=False)
    )
    gralora.set_adapter(long, names, trainable=trainable)
    for (name, one), (_, other) in zip(gralora_layers(short), gralora_layers(long), strict=True):
        here, there = one.gralora_adapters, other.gralora_adapters
        assert (here.active, here.sole) == (there.active, there.sole), name
        assert [weight for _, weight in here.acting] == [weight for _, weight in there.acting]
        assert [adapter for adapter, _ in here.acting] == [here[n] for n in here.active]
    assert {n: p.requires_grad for n, p in short.named_parameters()} == {
        n: p.requires_grad for n, p in long.named_parameters()
    }
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(short(x), long(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_part_is_walked_over():
    model = gralora.inject(
        nn.ModuleDict({"fc": nn.Linear(4, 4)}), ["fc"], random_config(bias="all")
    )
    model["jit"] = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"the bias of 'jit.0' is in TorchScript"):
        gralora.inject(model, ["fc"], random_config(bias="all"), adapter_name="b")
    gralora.inject(model, ["fc"], random_config(bias="gralora_only"), adapter_name="b")
    gralora.set_adapter(model, "b")
    assert gralora.adapter_names(model) == ["default", "b"] and gralora.active_adapters(model) == {
        "b": 1.0
    }
