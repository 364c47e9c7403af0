"""Two models over one set of base weights."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import gralora

from ..models import (
    TOKENS,
    Block,
    assert_same,
    bert,
    fingerprint,
    gpt2,
    llama,
    logits,
    mlp,
    random_config,
    randomize_,
    relative,
    same_bits,
)

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


def memory(model):
    """name -> the address of each base parameter and buffer."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor.data_ptr() for name, tensor in tensors if "gralora_" not in name}


def everything():
    """Adapters, a saved head and trained biases."""
    config = random_config(bias="gralora_only", modules_to_save=["head"])
    model = gralora.inject(Block(), "all-linear", config, adapter_name="a")
    return gralora.inject(model, ["q", "v"], random_config(), adapter_name="b")


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_no_weight_is_copied(make):
    model = make()
    other = gralora.shared_copy(model)
    assert other is not model and type(other) is type(model)
    assert memory(other) == memory(model)
    y = logits(model)
    gralora.inject(other, "all-linear", random_config(alpha=32))
    assert relative(logits(other), y) > 1e-3
    assert same_bits(logits(model), y)
    assert [n for n, _ in model.named_parameters() if "gralora_" in n] == []
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_active_sets_and_training_are_each_models_own():
    model = everything()
    base = memory(model)
    other = gralora.shared_copy(model)
    assert memory(other) == base
    assert same_bits(other(X), model(X))
    before, y = fingerprint(model), model(X)
    gralora.set_adapter(other, {"b": 2.0})
    with torch.no_grad():
        for parameter in gralora.adapter_parameters(other):
            parameter.normal_()
    assert relative(other(X), y) > 1e-2
    gralora.delete_adapter(other, "a")
    gralora.inject(other, ["k"], random_config(), adapter_name="c")
    assert_same(fingerprint(model), before)
    assert same_bits(model(X), y)
    gralora.unload(other)
    assert_same(fingerprint(model), before)
    assert {n: a for n, a in memory(other).items() if "bias" not in n} == {
        n: a for n, a in base.items() if "bias" not in n
    }
    with gralora.disable_adapter(model):
        assert same_bits(other(X), model(X))
    gralora.unload(model)
    assert memory(model) == memory(other)


@pytest.mark.parametrize("first", ["model", "other"])
def test_a_merge_of_one_is_never_seen_by_the_other(first):
    model = everything()
    other = gralora.shared_copy(model)
    gralora.set_adapter(other, "b")
    one, two = (model, other) if first == "model" else (other, model)
    of_one, of_two, before = one(X), two(X), fingerprint(two)
    gralora.merge(one)
    torch.testing.assert_close(one(X), of_one)
    assert_same(fingerprint(two), before)
    gralora.unmerge(one)
    assert same_bits(one(X), of_one)
    gralora.merge_and_unload(one)
    torch.testing.assert_close(one(X), of_one)
    assert same_bits(two(X), of_two)
    assert_same(fingerprint(two), before)


def test_a_merged_model_is_copied_as_it_is():
    model = gralora.inject(mlp(16, 24, 8), "all-linear", random_config())
    base, y = memory(model), model(X)
    gralora.merge(model)
    other = gralora.shared_copy(model)
    merged = memory(model)
    assert all(memory(other)[name] != merged[name] for name in ("0.weight", "2.weight"))
    gralora.unmerge(model)
    torch.testing.assert_close(other(X), y)
    gralora.unmerge(other)
    assert memory(other) == memory(model) == base
    assert same_bits(other(X), model(X))


def test_ties_stay_ties_and_copies_of_copies_share_too():
    model = gpt2()
    other = gralora.shared_copy(gralora.shared_copy(model))
    assert other.lm_head.weight is other.transformer.wte.weight
    assert memory(other) == memory(model)


def test_a_deep_copy_and_a_pickle_of_it_share_nothing():
    model = gralora.shared_copy(gralora.inject(mlp(16, 8), ["0"], random_config()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert memory(other)["0.weight"] != memory(model)["0.weight"]
        assert same_bits(other(X), model(X))


def test_moving_one_leaves_the_other():
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    y = model(X)
    other = gralora.shared_copy(model).double()
    assert other[0].weight.dtype == torch.float64 and model[0].weight.dtype == torch.float32
    torch.testing.assert_close(other(X.double()), y.double(), rtol=1e-5, atol=1e-5)
    assert same_bits(model(X), y)


def test_two_of_them_run_and_train_in_two_threads_at_once():
    def train(model, losses, barrier):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-2)
        if barrier is not None:
            barrier.wait()
        for step in range(8):
            loss = model(TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 4:
                with gralora.disable_adapter(model):
                    losses.append(model(TOKENS, labels=TOKENS).loss.item())
                gralora.merge(model)
                losses.append(model(TOKENS, labels=TOKENS).loss.item())
                gralora.unmerge(model)
            losses.append(loss.item())

    base = gpt2()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def pair():
        models = []
        for seed, targets in ((1, ["c_attn"]), (2, ["c_attn", "c_proj", "c_fc"])):
            model = gralora.inject(gralora.shared_copy(base), targets, random_config())
            torch.manual_seed(seed)
            randomize_(model, 0.1)
            models.append(model)
        return models

    expected = [[], []]
    for model, losses in zip(pair(), expected):
        train(model, losses, None)
    found, barrier = [[], []], threading.Barrier(2)
    threads = [
        threading.Thread(target=train, args=(m, losses, barrier))
        for m, losses in zip(pair(), found)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert (
        len(set(found[0])) == 9 and found[0] != found[1]
    )  # the loss of the merged model is that of the next step
    assert all(same_bits(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_convolutions_attention_and_experts():
    from ..models import Experts

    model = nn.ModuleDict(
        {"c": nn.Conv2d(4, 8, 3), "a": nn.MultiheadAttention(16, 4), "e": Experts()}
    )
    gralora.inject(model, ["c", "a", "up"], random_config())
    other = gralora.shared_copy(model)
    inputs = {
        "c": (torch.randn(1, 4, 5, 5),),
        "a": (X, X, X),
        "e": (torch.randn(2, 8, dtype=torch.float64),),
    }
    y = {name: model[name](*args) for name, args in inputs.items()}
    gralora.merge_and_unload(other)
    for name, args in inputs.items():
        for mine, theirs in zip(model[name](*args), y[name]):
            assert same_bits(mine, theirs)
        torch.testing.assert_close(other[name](*args), y[name], rtol=1e-4, atol=1e-4)


def test_a_weight_whose_class_alone_knows_its_memory_is_the_very_same():
    class Packed(nn.Parameter):
        pass

    model = mlp(16, 8)
    model[0].weight = Packed(model[0].weight.detach(), requires_grad=False)
    other = gralora.shared_copy(model)
    assert other[0].weight is model[0].weight
    assert same_bits(other(X), model(X))
