"""`check_effect` finds every adapter that is dead for a reason that no look at the model shows."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora

from ..models import (
    TOKENS,
    Block,
    Everything,
    X,
    assert_same,
    everything,
    fingerprint,
    gpt2,
    mlp,
    random_config,
)


class Dead(nn.Module):
    """Layers that act, and layers that do not, each in its way."""

    def __init__(self):
        super().__init__()
        for name in ("alive", "superseded", "branch", "detached", "hidden", "multiplied"):
            self.add_module(name, nn.Linear(16, 16))
        self.norm = nn.BatchNorm1d(16)
        self.fused, self.flag = False, False

    def fuse(self):
        self.fused = True
        self.whole = nn.Linear(16, 16)

    def forward(self, x):
        y = self.alive(x) + (self.whole(x) if self.fused else self.superseded(x))
        if self.flag:
            y = y + self.branch(x)
        with torch.no_grad():
            hidden = self.hidden(x)
        return self.norm(y + hidden + self.detached(x).detach() + 0 * self.multiplied(x))


def test_every_dead_adapter_is_named_with_what_was_seen_and_nothing_is_touched():
    model = Dead()
    model.fuse()
    gralora.inject(model, "all-linear", random_config(init_weights=True))
    x = torch.randn(8, 16)
    model(x).sum().backward()
    before, grads = (
        fingerprint(model),
        {n: copy.deepcopy(p.grad) for n, p in model.named_parameters()},
    )
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match="5 of 7 adapters have no effect on this batch, or get no gradient"
    ) as error:
        gralora.check_effect(model, x)
    text = str(error.value)
    assert "'default' on 'superseded' was not used." in text
    assert "'default' on 'branch' was not used." in text
    assert "'default' on 'detached' changes the output, but gets no gradient" in text
    assert "'default' on 'hidden' changes the output, but gets no gradient" in text
    assert "'default' on 'multiplied' was used, but changes nothing when its values change." in text
    assert "'alive'" not in text and "'whole'" not in text and "exclude_modules" in text
    assert_same(fingerprint(model), before)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [False, True])
def test_models_whose_adapters_all_act(training):
    cases = [
        (
            gralora.inject(Block(), "all-linear", random_config(init_weights=True)),
            (torch.randn(2, 5, 16),),
            {},
        )
    ]
    model = everything()
    gralora.set_adapter(model, ["a"])
    cases.append((model, (X,), {}))
    cases.append(
        (
            gralora.inject(gpt2(), "all-linear", random_config(init_weights=True)),
            (TOKENS,),
            {"labels": TOKENS},
        )
    )
    for model, args, kwargs in cases:
        norms = gralora.check_effect(model.train(training), *args, **kwargs)
        assert norms and all(norm > 0 for norm in norms.values())


def test_a_frozen_adapter_is_checked_too_and_stays_frozen():
    model = mlp(16, 8)
    gralora.inject(model, ["0"], random_config(), adapter_name="a")
    gralora.set_adapter(model, "a", trainable=False)
    with torch.no_grad():
        assert list(gralora.check_effect(model, torch.randn(3, 16))) == ["0"]
    assert not any(p.requires_grad for p in model.parameters())


def test_a_loss_outside_of_any_forward_is_given_as_forward():
    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 32, bias=False)

        def forward(self, x):
            return self.body(x)

    model, x, labels = LanguageModel(), torch.randn(5, 16), torch.arange(5)
    gralora.inject(model, ["body", "lm_head"], random_config(init_weights=True))

    def loss(x, labels):
        return F.cross_entropy(model(x) @ model.lm_head.weight.t(), labels)

    with pytest.raises(ValueError, match="'default' on 'lm_head' was not used"):
        gralora.check_effect(model, x, labels, forward=loss)

    def right(x, labels):
        weight = model.lm_head.weight + gralora.delta_weight(model.lm_head)
        return F.cross_entropy(model(x) @ weight.t(), labels)

    assert set(gralora.check_effect(model, x, labels, forward=right)) == {"body", "lm_head"}


def test_nothing_to_check_is_an_error():
    model = gralora.inject(mlp(16, 8), ["0"], random_config(), adapter_name="a")
    for names in ([], "a"):
        gralora.set_adapter(model, names)
        if names:
            gralora.merge(model)
        with pytest.raises(
            ValueError, match="no adapter acts beside the weights of this model.*it has: a"
        ):
            gralora.check_effect(model, torch.randn(3, 16))


def test_diffusers_attentions_whose_projections_were_fused_before():
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8)
    attention.fuse_projections()
    attention.set_processor(FusedAttnProcessor2_0())
    gralora.inject(attention, "all-linear", random_config(init_weights=True))
    with pytest.raises(ValueError, match="'default' on 'to_q' was not used"):
        gralora.check_effect(attention, torch.randn(2, 5, 16))


def test_a_model_without_gradients_at_all():
    class Without(Everything):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = gralora.inject(Without(), ["embed"], random_config())
    with pytest.raises(
        ValueError, match="'default' on 'embed' changes the output, but gets no gradient"
    ):
        gralora.check_effect(model, X)


@pytest.mark.parametrize(
    "out", [lambda y: [y, None], lambda y: {"logits": (y, y.long())}, lambda y: {"loss": y.mean()}]
)
def test_what_a_model_returns_may_be_nested(out):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return out(self.fc(x))

    assert list(gralora.check_effect(gralora.inject(Returns(), ["fc"], random_config()), X)) == [
        "fc"
    ]
    with pytest.raises(ValueError, match="unused"):
        gralora.check_effect(gralora.inject(Returns(), ["fc", "unused"], random_config()), X)
