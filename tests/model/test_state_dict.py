"""The values of an adapter in memory."""

import pytest
import torch

import gralora

from ..models import assert_same, bert, fingerprint, gpt2, mlp, pair, random_config, same_bits

X = torch.linspace(-1, 1, 160).reshape(2, 5, 16)


def test_keys_are_those_of_peft_without_its_prefix():
    import peft

    from ..peft_reference import peft_model

    config = random_config(hybrid_r=2, modules_to_save=["pooler"], bias="gralora_only")
    theirs = peft.get_peft_model_state_dict(peft_model(bert(), config, ["query"]))
    ours = gralora.inject(bert(), ["query"], config)
    # PEFT calls the bias of an adapted layer by the name that its wrapper gives it
    stripped = {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): t.shape
        for key, t in theirs.items()
    }
    assert {key: t.shape for key, t in gralora.adapter_state_dict(ours).items()} == stripped


def test_state_dicts_are_checked_before_anything_is_copied():
    one, two = pair()
    gralora.inject(one, ["q", "v"], random_config())
    gralora.inject(two, ["q", "v"], random_config())
    state = gralora.adapter_state_dict(one)
    assert gralora.load_adapter_state_dict(two, state) == ([], [])
    assert same_bits(one(X), two(X))
    before = fingerprint(two)
    partial = {k: v + 1 for k, v in state.items() if k != "v.gralora_B"}
    with pytest.raises(KeyError, match="missing: v.gralora_B"):
        gralora.load_adapter_state_dict(two, partial)
    with pytest.raises(KeyError, match="unexpected: x.gralora_A"):
        gralora.load_adapter_state_dict(two, {**state, "x.gralora_A": torch.ones(1)})
    with pytest.raises(ValueError, match=r"q.gralora_A is \(1, 2\) there and \(2, 8, 4\) here"):
        gralora.load_adapter_state_dict(
            two, {**partial, "q.gralora_A": torch.ones(1, 2)}, strict=False
        )
    assert_same(fingerprint(two), before)
    result = gralora.load_adapter_state_dict(two, {**partial, "z": torch.ones(1)}, strict=False)
    assert result == (["v.gralora_B"], ["z"])
    assert same_bits(gralora.adapter_state_dict(two)["q.gralora_A"], state["q.gralora_A"] + 1)
    with pytest.raises(KeyError, match="it has: default"):
        gralora.adapter_state_dict(two, "other")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_values_of_another_kind_are_refused(dtype):
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    state = {key: tensor.to(dtype) for key, tensor in gralora.adapter_state_dict(model).items()}
    before = fingerprint(model)
    with pytest.raises(
        ValueError,
        match=f"types differ, nothing was loaded: 0.gralora_A is {dtype} there and torch.float32",
    ):
        gralora.load_adapter_state_dict(model, state)
    assert_same(fingerprint(model), before)
    gralora.load_adapter_state_dict(
        model, {k: t.bfloat16() for k, t in gralora.adapter_state_dict(model).items()}
    )


def test_values_that_would_tear_a_tie_are_refused_and_misfits_listed():
    model = gralora.inject(gpt2(), ["c_attn"], random_config(modules_to_save=["wte", "lm_head"]))
    state = {key: tensor.clone() for key, tensor in gralora.adapter_state_dict(model).items()}
    state["lm_head.weight"] += 1
    before = fingerprint(model)
    with pytest.raises(ValueError) as error:
        gralora.load_adapter_state_dict(model, state)
    tied = "transformer.wte.weight and lm_head.weight"
    assert str(error.value) == f"{tied} are one tensor here, and differ there: nothing was loaded."
    state = {
        "other": torch.zeros(1),
        **{key: tensor for key, tensor in state.items() if "wte" not in key},
    }
    with pytest.raises(
        KeyError,
        match="missing: transformer.wte.weight; unexpected: other. strict=False passes them",
    ):
        gralora.load_adapter_state_dict(model, state)
    assert_same(fingerprint(model), before)
