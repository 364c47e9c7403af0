"""Keys that a loader would pass over: a base that loads into an adapted model, and what is said of
its adapters.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig

from ..models import Everything, everything, mlp, random_config, randomize_, same_bits

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def quiet(model, state, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.load_state_dict(state, **kwargs)


def test_a_base_loads_in_silence_while_its_adapters_do_nothing_yet():
    base = mlp(16, 24, 8)
    config = GraloraConfig(r=4, bias="all", modules_to_save=["2"])
    model = gralora.inject(mlp(16, 24, 8), ["0"], config)
    assert not torch.allclose(model(X), base(X))
    quiet(model, base.state_dict())
    assert same_bits(
        model(X), base(X)
    )  # saved modules and biases that nobody has trained follow the base
    with gralora.disable_adapter(model):
        assert same_bits(model(X), base(X))
    assert same_bits(gralora.unload(model)(X), base(X))


@pytest.mark.parametrize("strict", [True, False])
def test_adapters_that_were_trained_are_left_with_one_warning_that_names_each(strict):
    base, model = mlp(16, 24, 8), mlp(16, 24, 8)
    gralora.inject(model, "all-linear", GraloraConfig(r=4), adapter_name="fresh")
    for name in ("a", "b"):
        gralora.inject(model, "all-linear", random_config(), adapter_name=name)
    gralora.set_adapter(model, "a")
    before = gralora.adapter_state_dict(model, "a")
    before = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.warns(
        UserWarning, match="the state dict holds nothing of adapter 'a', 'b': what it has learned"
    ) as record:
        model.load_state_dict(base.state_dict(), strict=strict)
    assert len(record) == 1
    assert all(
        torch.equal(t, before[key]) for key, t in gralora.adapter_state_dict(model, "a").items()
    )
    with gralora.disable_adapter(model):
        assert same_bits(model(X), base(X))


def test_trained_heads_and_biases_are_left_with_a_warning_and_the_base_goes_to_the_base():
    base = mlp(16, 24, 8)
    model = gralora.inject(
        mlp(16, 24, 8), ["0"], GraloraConfig(r=4, bias="all", modules_to_save=["2"])
    )
    with torch.no_grad():
        for parameter in gralora.adapter_parameters(model):
            parameter.add_(1)
    trained = {key: tensor.clone() for key, tensor in gralora.adapter_state_dict(model).items()}
    with pytest.warns(UserWarning, match="nothing of adapter 'default'"):
        model.load_state_dict(base.state_dict())
    for key, tensor in gralora.adapter_state_dict(model).items():
        # a bias is what its adapter has learned, on top of the new base
        wanted = base[0].bias + 1 if key == "0.bias" else trained[key]
        assert torch.equal(tensor, wanted), key
    with gralora.disable_adapter(model):
        assert same_bits(model(X), base(X))
    assert same_bits(gralora.unload(model)(X), base(X))


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_a_base_that_is_assigned_leaves_every_parameter_of_adapters_the_same_object():
    base = mlp(16, 24, 8)
    config = GraloraConfig(r=4, bias="all", modules_to_save=["2"])
    model = gralora.inject(mlp(16, 24, 8), ["0"], config)
    parameters = gralora.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.load_state_dict(base.state_dict(), assign=True)
    assert all(a is b for a, b in zip(gralora.adapter_parameters(model), parameters, strict=True))
    before = [parameter.detach().clone() for parameter in parameters]
    model(X).square().sum().backward()
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
@pytest.mark.parametrize("lacking", ["0", "2"])
def test_a_checkpoint_that_holds_some_adapters_and_lacks_others_is_strict(lacking):
    model = gralora.inject(mlp(16, 24, 8), "all-linear", random_config())
    state = {k: t for k, t in model.state_dict().items() if not k.startswith(f"{lacking}.gralora_")}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert f"{lacking}.gralora_adapters.default.A" in str(error.value)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert sorted(missing) == [f"{lacking}.gralora_adapters.default.{letter}" for letter in "AB"]
    assert not unexpected
    quiet(model, model.state_dict())


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_the_keys_of_adapter_state_dict_are_refused_in_load_state_dict_whatever_strict():
    model = everything()
    for name in ("a", "b"):
        state = gralora.adapter_state_dict(model, name)
        keys = [key for key in state if "gralora_" in key]
        for strict in (True, False):
            with pytest.raises(RuntimeError) as error:
                model.load_state_dict(state, strict=strict)
            assert all(f"{key} is a key of adapter_state_dict" in str(error.value) for key in keys)


def test_the_keys_of_state_dict_are_refused_in_load_adapter_state_dict():
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    state = {k: t for k, t in model.state_dict().items() if "gralora_" in k}
    with pytest.raises(
        ValueError, match="none of the keys is one of adapter 'default': nothing was loaded"
    ):
        gralora.load_adapter_state_dict(model, state, strict=False)
    assert gralora.load_adapter_state_dict(model, {}, strict=False).missing_keys


@pytest.mark.parametrize("make", [lambda: mlp(16, 24, 8), Everything])
def test_the_state_dict_of_a_merged_model_is_not_counted_twice(make):
    base = make()
    x = torch.randn(3, 5, 16)
    targets = (
        "all-linear" if isinstance(base, nn.Sequential) else ["block.q", "attention", "conv", "up"]
    )
    model = gralora.inject(copy.deepcopy(base), targets, random_config())
    y = model(x)
    gralora.merge(model)
    state = model.state_dict()
    fresh = gralora.inject(make(), targets, random_config())
    for strict in (True, False):
        with pytest.raises(
            RuntimeError,
            match="the state dict is that of a merged model.* here it would count twice",
        ):
            fresh.load_state_dict(state, strict=strict)
    plain = make()
    plain.load_state_dict(
        state, strict=False
    )  # as a plain model, whose weights hold the adapter, it is right
    torch.testing.assert_close(plain(x), y, rtol=1e-3, atol=1e-4)
    gralora.unmerge(model)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), y)
    gralora.merge(model)
    with pytest.raises(RuntimeError, match="holds a merged adapter|is that of a merged model"):
        model.load_state_dict(state)
    gralora.unmerge(model)
    quiet(model, fresh.state_dict())


def test_an_adapter_may_be_named_merged():
    model = gralora.inject(mlp(16, 8), ["0"], random_config(), adapter_name="merged")
    other = gralora.inject(mlp(16, 8), ["0"], random_config(), adapter_name="merged")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    gralora.merge(model)
    assert "0.gralora_adapters.merged.merged" in model.state_dict()


def test_a_sentence_transformer_that_resumes_by_a_strict_load_is_warned(tmp_path):
    """As its trainer loads its best checkpoint: the base's keys alone, strictly."""
    model = gralora.inject(mlp(16, 24, 8), "all-linear", GraloraConfig(r=4))
    randomize_(model)
    torch.save(
        {k: t for k, t in model.state_dict().items() if "gralora_" not in k}, tmp_path / "best.pt"
    )
    with pytest.warns(UserWarning, match="stays as it is"):
        model.load_state_dict(torch.load(tmp_path / "best.pt"))
