"""One model in many threads: what a `with` block does counts in its own thread."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

import gralora

from ..models import X, everything, gpt2, random_config, relative, same_bits

THREADS, ROUNDS = 8, 12
BATCH = X.repeat(2, 1, 1)[:4]


def model():
    torch.manual_seed(0)
    model = everything("none")
    gralora.unload(model.experts)  # adapters of fused experts can't be mixed
    return model.eval()


def blocks(model):
    """What a thread may be in, by name; each is a function that makes the block."""
    return {
        "active": nullcontext,
        "off": lambda: gralora.disable_adapter(model),
        "a b": lambda: gralora.mixed_batch(model, ["a", "b", None, "a"]),
        "b": lambda: gralora.mixed_batch(model, ["b"] * 4),
        "nested": lambda: gralora.mixed_batch(model, [None, "a", "a", "b"]),
    }


@pytest.mark.parametrize("grad", [False, True])
def test_forward_passes_of_eight_threads_in_blocks_of_their_own(grad):
    shared = model()
    kinds = blocks(shared)

    def run(name):
        with torch.set_grad_enabled(grad), kinds[name]():
            if name == "nested":
                with gralora.disable_adapter(shared):
                    shared(BATCH)
            return shared(BATCH).detach()

    expected = {name: run(name) for name in kinds}
    names = list(kinds)
    assert all(relative(expected[a], expected[b]) > 1e-3 for a in names for b in names if a != b)
    start = threading.Barrier(THREADS)

    def work(index):
        start.wait()
        wrong = []
        for turn in range(ROUNDS):
            name = names[(index + turn) % len(names)]
            if not same_bits(run(name), expected[name]):
                wrong.append(name)
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [[]] * THREADS
    assert same_bits(run("active"), expected["active"])


def test_a_block_in_one_thread_is_not_seen_in_another_while_it_is_open():
    shared = model()
    active = shared(BATCH)
    for make in (
        lambda: gralora.disable_adapter(shared),
        lambda: gralora.mixed_batch(shared, ["b"] * 4),
    ):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(shared, BATCH).result()  # the thread is running before the block
            with make():
                here = shared(BATCH)
                there = pool.submit(shared, BATCH).result()
        assert same_bits(there, active) and relative(here, active) > 1e-3


def test_gpt2_generates_for_several_threads_at_once():
    torch.manual_seed(0)
    shared = gpt2()
    for name in "ab":
        gralora.inject(shared, ["c_attn", "c_fc"], random_config(alpha=16), adapter_name=name)
    tokens = torch.arange(6)[None].repeat(2, 1)

    def generate(names):
        with gralora.mixed_batch(shared, names):
            return shared.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)

    wanted = [["a", "b"], ["b", None], [None, "a"], ["b", "b"]]
    expected = [generate(names) for names in wanted]
    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(generate, wanted * 2), expected * 2):
            assert torch.equal(found, one)
