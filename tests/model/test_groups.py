"""What an optimiser takes."""

import pytest
import torch
from torch import nn

import gralora

from ..models import Block, llama, mlp, random_config


def by_name(groups):
    return {group["name"]: group for group in groups}


def test_each_trained_parameter_is_in_one_group_and_b_has_a_rate_of_its_own():
    model = gralora.inject(
        Block(),
        ["q", "mlp.0"],
        random_config(hybrid_r=2, bias="all", modules_to_save=["norm", "head"]),
    )
    gralora.inject(model, ["q"], random_config(), adapter_name="frozen")
    groups = by_name(gralora.adapter_parameter_groups(model, 1e-3, b_ratio=16, weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {name: len(group["params"]) for name, group in groups.items()} == {
        "A": 4,
        "B": 4,
        "undecayed": 8,
        "saved": 1,
    }
    assert [names[id(p)] for p in groups["saved"]["params"]] == [
        "head.gralora_saved.default.weight"
    ]
    assert all(names[id(p)].endswith((".A", ".A_general")) for p in groups["A"]["params"])
    assert all(names[id(p)].endswith((".B", ".B_general")) for p in groups["B"]["params"])
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "A": (1e-3, 0.1),
        "B": (1.6e-2, 0.1),
        "undecayed": (1e-3, 0.0),
        "saved": (1e-3, 0.1),
    }
    every = [id(p) for group in groups.values() for p in group["params"]]
    assert len(set(every)) == len(every)
    assert set(every) == {id(p) for p in model.parameters() if p.requires_grad}


def test_rows_of_tokens_are_not_decayed():
    model = gralora.inject(llama(), ["q_proj"], random_config(trainable_token_indices=[3, 5]))
    groups = by_name(gralora.adapter_parameter_groups(model, 1e-3, weight_decay=0.1))
    assert [p.shape for p in groups["undecayed"]["params"]] == [(2, 32)]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_the_first_step_moves_b_by_its_own_rate(optimizer):
    model = gralora.inject(mlp(8, 8), ["0"], gralora.GraloraConfig(r=4))
    parameters = model[0].gralora_adapters["default"]
    with torch.no_grad():
        parameters.B.fill_(0.1)
    step = {}
    for ratio in (1.0, 8.0):
        before = parameters.A.clone(), parameters.B.clone()
        run = optimizer(gralora.adapter_parameter_groups(model, 1e-3, b_ratio=ratio))
        model.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        run.step()
        step[ratio] = (parameters.A - before[0]).norm(), (parameters.B - before[1]).norm()
        with torch.no_grad():
            parameters.A.copy_(before[0])
            parameters.B.copy_(before[1])
    torch.testing.assert_close(step[8.0][1], 8 * step[1.0][1], rtol=1e-3, atol=0)
    torch.testing.assert_close(step[8.0][0], step[1.0][0], rtol=1e-3, atol=0)


def test_what_is_not_legal_is_told():
    model = gralora.inject(nn.Sequential(nn.Linear(4, 4)), ["0"], gralora.GraloraConfig(r=2))
    for wrong in (
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": True},
        {"lr": 1, "b_ratio": 0},
        {"lr": 1, "weight_decay": -1},
    ):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]}=.* is not legal"):
            gralora.adapter_parameter_groups(model, **wrong)
    gralora.set_adapter(model, [])
    with pytest.raises(ValueError, match="no adapter of this model is trained"):
        gralora.adapter_parameter_groups(model, 1e-3)
