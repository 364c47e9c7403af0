"""Activation checkpointing: what is computed again in the backward pass is what was computed
before.
"""

import _thread
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import gralora

from ..models import gpt2, llama, random_config, relative, same_bits, vit

TOKENS = torch.arange(8).reshape(2, 4)


class Stack(nn.Module):
    """A frozen embedding, and blocks that are checkpointed or not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
            for _ in range(3)
        )
        self.how = None

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = (
                block(x)
                if self.how is None
                else checkpoint(block, x, use_reentrant=self.how == "reentrant")
            )
        return x


def stack(**config):
    torch.manual_seed(0)
    model = Stack()
    gralora.inject(
        model, "all-linear", random_config(gralora_dropout=0.3, **config), adapter_name="a"
    )
    gralora.inject(model, "all-linear", random_config(gralora_k=4), adapter_name="b")
    return model


def grads(model, how, tokens=TOKENS):
    model.how = how
    model.zero_grad()
    torch.manual_seed(1)
    y = model(tokens)
    y.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert set(found) == set(expected) and expected
    assert all(grad.abs().sum() > 0 for grad in expected.values())
    for name, grad in expected.items():
        assert same_bits(found[name], grad), name


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_gradients_and_dropout_masks_are_those_without_it(how, hybrid_r):
    model = stack(hybrid_r=hybrid_r)
    expected = grads(model, None)
    assert not model.embed.weight.requires_grad
    if how == "reentrant":  # torch passes no gradient on unless an input needs one
        model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    assert_equal(grads(model, how), expected)
    gralora.set_adapter(model, {"a": 0.5, "b": 2.0})
    both = grads(model, None)
    assert len(both) == len(expected) + 4 * 3
    assert_equal(grads(model, how), both)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_without_an_input_that_needs_gradients_is_no_silence():
    with pytest.raises(RuntimeError, match="does not require grad"):
        grads(stack(), "reentrant")


BLOCKS = {
    "mixed_batch": lambda model: gralora.mixed_batch(model, ["b", "a"]),
    "disable_adapter of another model": lambda model: gralora.disable_adapter(stack()),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_within_a_block_of_this_thread(block):
    model = stack()
    with BLOCKS[block](model):
        gralora.set_adapter(model, ["a", "b"])
        expected = grads(model, None)
        assert_equal(grads(model, "not reentrant"), expected)


def test_a_thread_that_autograd_starts_sees_the_block():
    """On a GPU the backward pass runs in a thread of autograd's own, which has no context variables
    of ours.
    """
    model = stack()
    gralora.set_adapter(model, ["a", "b"])
    with gralora.mixed_batch(model, ["b", "a"]):
        expected = grads(model, None)
        model.zero_grad()
        model.how = "not reentrant"
        torch.manual_seed(1)
        loss, done, failures = model(TOKENS).square().sum(), threading.Event(), []

        def backward():
            try:
                loss.backward()
            except BaseException as error:
                failures.append(error)
            done.set()

        _thread.start_new_thread(backward, ())  # as foreign to Python's threading as one of C++
        assert done.wait(60) and not failures
        assert_equal(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected
        )


def test_a_backward_pass_after_the_block_is_an_error():
    model = stack()
    gralora.set_adapter(model, ["a", "b"])
    model.how = "not reentrant"
    with gralora.mixed_batch(model, ["b", "a"]):
        loss = model(TOKENS).square().sum()
    with pytest.raises(CheckpointError):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [gpt2, llama, vit])
def test_gradient_checkpointing_enable_of_transformers(make, reentrant):
    torch.manual_seed(0)
    model = make()
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}.get(
        model.config.model_type, "all-linear"
    )
    gralora.inject(model, targets, random_config(gralora_dropout=0.2))
    model.train()

    def run():
        model.zero_grad()
        torch.manual_seed(1)
        if model.config.model_type == "vit":
            model(pixel_values=torch.ones(2, 3, 16, 16)).logits.square().sum().backward()
        else:
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if reentrant:
        model.enable_input_require_grads()
    found = run()
    assert set(found) == set(expected) and expected
    for name, grad in expected.items():
        assert grad.abs().sum() > 0 and relative(found[name], grad) < 1e-5
