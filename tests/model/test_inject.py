"""Into a model, and out without a trace."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig, GraloraLinear
from gralora.layers.adapter import GraloraAdapter
from gralora.layers.linear import LinearLayerMap

from ..models import (
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
    same_bits,
)

MAKERS = {
    "block": (Block, lambda m: m(torch.linspace(-1, 1, 160).reshape(2, 5, 16))),
    "bfloat16": (
        lambda: Block().bfloat16(),
        lambda m: m(torch.linspace(-1, 1, 160).reshape(2, 5, 16).bfloat16()),
    ),
    "bert": (bert, logits),
    "gpt2": (gpt2, logits),
    "llama": (llama, logits),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2
        ).eval(),
        lambda m: m(torch.linspace(-1, 1, 160).reshape(2, 5, 16)),
    ),
}


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"bias": "gralora_only", "hybrid_r": 2}])
@pytest.mark.parametrize("name", MAKERS)
def test_inject_then_unload_leaves_no_trace(name, options):
    make, run = MAKERS[name]
    model = make()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *args: None)
    before, y = fingerprint(model), run(model).detach().clone()
    gralora.inject(model, "all-linear", random_config(**options))
    gralora.inject(model, "all-linear", random_config(**options), adapter_name="second")
    randomize_(model)
    assert not torch.equal(run(model), y)
    gralora.set_adapter(model, "second")
    gralora.merge(model)
    assert gralora.unload(model) is model
    assert_same(fingerprint(model), before)
    assert same_bits(run(model), y)


def test_unload_of_a_model_without_adapters_does_nothing():
    model = Block()
    before = fingerprint(model)
    gralora.unload(model)
    assert_same(fingerprint(model), before)


def test_only_the_adapter_requires_gradients_after_inject():
    model = gralora.inject(Block(), ["q", "v"], GraloraConfig(r=4, hybrid_r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "gralora_" in name}
    assert len(trained) == 8


def test_a_second_adapter_is_inactive_and_frozen_until_it_is_set():
    model = gralora.inject(Block(), ["q"], random_config())
    y = model(torch.ones(1, 3, 16))
    gralora.inject(model, ["q", "v"], random_config(), adapter_name="b")
    assert same_bits(model(torch.ones(1, 3, 16)), y)
    assert not any(p.requires_grad for p in gralora.adapter_parameters(model, "b"))
    gralora.set_adapter(model, "b")
    assert all(p.requires_grad for p in gralora.adapter_parameters(model, "b"))
    assert not any(p.requires_grad for p in gralora.adapter_parameters(model, "default"))
    assert not torch.equal(model(torch.ones(1, 3, 16)), y)


def test_a_name_in_use_is_an_error():
    model = gralora.inject(Block(), ["q"], GraloraConfig(r=4))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="adapter 'default' is in this model already"):
        gralora.inject(model, ["v"], GraloraConfig(r=4))
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize("failing_call", [1, 3, 5])
@pytest.mark.parametrize("where", ["allocation", "adding", "activation"])
def test_an_inject_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch, where, failing_call):
    model = Block()
    gralora.inject(model, ["q"], random_config(), adapter_name="old")
    before = fingerprint(model)
    calls = []

    def failing(real):
        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == failing_call:
                raise MemoryError("on purpose")
            return real(*args, **kwargs)

        return wrapper

    if where == "allocation":
        monkeypatch.setattr(
            GraloraAdapter, "reset_parameters", failing(GraloraAdapter.reset_parameters)
        )
    elif where == "adding":
        monkeypatch.setattr(
            "gralora.layers.adapter.GraloraAdapters.add",
            failing(gralora.layers.adapter.GraloraAdapters.add),
        )
    else:
        monkeypatch.setattr(LinearLayerMap, "attach", failing(LinearLayerMap.attach))
    with pytest.raises(MemoryError):
        gralora.inject(model, "all-linear", random_config(bias="all", modules_to_save=["norm"]))
    monkeypatch.undo()
    assert_same(fingerprint(model), before)
    gralora.unload(model)
    assert type(model.q) is nn.Linear


def test_identity_stays():
    model = Block()
    q, weight = model.q, model.q.weight
    model.k.weight = weight  # tied
    hits = []
    q.register_forward_pre_hook(lambda *args: hits.append("pre"))
    q.register_forward_hook(lambda *args: hits.append("post"))
    gralora.inject(model, ["q", "k"], random_config())
    assert model.q is q and q.weight is weight and model.k.weight is weight
    assert isinstance(q, GraloraLinear) and isinstance(q, nn.Linear)
    model(torch.ones(1, 2, 16))
    assert hits == ["pre", "post"]


def test_a_base_checkpoint_loads_before_and_after():
    state = Block().state_dict()
    for config in (GraloraConfig(r=4), GraloraConfig(r=4, modules_to_save=["head"])):
        model = gralora.inject(Block(), ["q", "v"], config)
        result = model.load_state_dict(state)
        assert not result.missing_keys and not result.unexpected_keys
        gralora.unload(model)
        assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_unloaded_model_can_be_injected_again():
    model = gralora.unload(gralora.inject(Block(), ["q"], random_config()))
    gralora.inject(model, ["q"], random_config())
    assert gralora.adapter_names(model) == ["default"]


def test_unload_of_drop_in_layers_gives_plain_layers():
    class Own(GraloraLinear):
        pass

    model = nn.Sequential(
        GraloraLinear(8, 8, config=random_config()), Own(8, 8, config=random_config())
    )
    x = torch.randn(2, 8)
    with gralora.disable_adapter(model):
        y = model(x)
    twin = copy.deepcopy(model)
    gralora.unload(model)
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is Own  # a class of the user's stays, without adapters
    assert all(p.requires_grad for p in model.parameters())
    assert same_bits(model(x), y)
    assert same_bits(gralora.merge_and_unload(twin)(x), twin(x))


def test_the_random_state_is_touched_by_new_values_only():
    torch.manual_seed(3)
    gralora.inject(mlp(8, 8), ["0"], GraloraConfig(r=2))
    after = torch.rand(1)
    torch.manual_seed(3)
    mlp(8, 8)
    torch.empty(2, 2, 4).uniform_()
    assert torch.equal(after, torch.rand(1))


def test_import_loads_neither_transformers_nor_peft():
    code = (
        "import sys, gralora; heavy = {'transformers', 'peft', 'accelerate', 'bitsandbytes',"
        " 'torchao'};sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
