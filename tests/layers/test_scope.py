"""What a `with` block switches, and for whom."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import gralora
from gralora.layers.scope import Switchable

from ..models import ROWS, Experts, four_adapters, mlp, random_config, same_bits


def test_other_threads_are_not_affected_and_mix_in_their_own_way():
    model = four_adapters(mlp(16, 24, 8))
    x, rows = torch.randn(8, 16), [ROWS, [None] * 8, ["b"] * 8, None]
    expected = []
    for names in rows:
        if names is None:
            expected.append(model(x))
        else:
            with gralora.mixed_batch(model, names):
                expected.append(model(x))
    found, barrier = {}, threading.Barrier(4)

    def work(i):
        barrier.wait()
        for _ in range(20):
            if rows[i] is None:
                found[i] = model(x)
            else:
                with gralora.mixed_batch(model, rows[i]):
                    found[i] = model(x)
            assert same_bits(found[i], expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(found[i], expected[i]) for i in range(4))


def test_a_copy_made_inside_is_not_inside():
    import copy

    model = four_adapters(mlp(16, 24, 8))
    x = torch.randn(3, 16)
    y = model(x)
    with gralora.mixed_batch(model, ROWS), gralora.disable_adapter(model):
        other = copy.deepcopy(model)
    assert same_bits(other(x), y)


def in_a_thread(function):
    """What `function` returns or raises in a new thread."""
    found = []

    def work():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


BLOCKS = {
    "disable_adapter": gralora.disable_adapter,
    "mixed_batch": lambda model: gralora.mixed_batch(model, [None, "default", None]),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_thread_that_was_running_before_the_block_is_not_in_it(block):
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    x = torch.randn(3, 16)
    y, elsewhere, opened, done = model(x), [], threading.Event(), threading.Event()

    def work():
        opened.wait()
        elsewhere.append(model(x))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with block(model):
        assert not torch.equal(model(x), y)
        opened.set()
        done.wait()
    thread.join()
    assert same_bits(elsewhere[0], y)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_thread_started_inside_a_block_opens_one_of_its_own_or_raises(block):
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    x = torch.randn(3, 16)
    y = model(x)
    with block(model):
        inside = model(x)
        error = in_a_thread(lambda: model(x))
        assert isinstance(error, RuntimeError)
        assert "Open the block inside this thread" in str(error)

        def with_its_own():
            with block(model):
                return model(x)

        assert same_bits(in_a_thread(with_its_own), inside)
        context = contextvars.copy_context()
        assert same_bits(in_a_thread(lambda: context.run(model, x)), inside)
    assert same_bits(in_a_thread(lambda: model(x)), y)


def test_disabling_one_model_leaves_another_alone():
    one, two = (gralora.inject(mlp(16, 8), ["0"], random_config()) for _ in range(2))
    x = torch.randn(3, 16)
    y = two(x)
    with gralora.disable_adapter(one):
        assert same_bits(two(x), y)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def encoder(layers=2, **kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, **kwargs)
    return nn.TransformerEncoder(layer, layers).eval()


def test_the_fused_path_of_the_encoder_layer_is_off_whether_or_not_its_owner_is_seen():
    layer = encoder().layers[0].eval()
    with torch.no_grad():
        base = layer(X)
        gralora.inject(layer.linear1, "", random_config(alpha=32))  # the parent is not in sight
        assert not torch.allclose(layer(X), base)
        gralora.unload(layer.linear1)
        assert same_bits(layer(X), base)


def test_the_fused_path_stays_off_in_copies_and_drop_in_layers():
    model = gralora.inject(encoder(), "all-linear", random_config(alpha=32))
    with torch.no_grad():
        y = model(X)
        assert same_bits(copy.deepcopy(model)(X), y)
        layer = encoder().layers[0].eval()
        base = layer(X)
        layer.linear2 = gralora.GraloraLinear.from_linear(layer.linear2, random_config(alpha=32))
        assert not torch.allclose(layer(X), base)


def in_contexts_of_their_own(generator):
    """As a server drives a streamed response: every step in a copy of the context, from a thread of
    a pool.
    """
    from concurrent.futures import ThreadPoolExecutor

    done = object()
    with ThreadPoolExecutor(2) as pool:
        while (
            item := pool.submit(contextvars.copy_context().run, next, generator, done).result()
        ) is not done:
            yield item


def streams(model, x):
    def mixed(names):
        with gralora.mixed_batch(model, names):
            for _ in range(3):
                yield model(x)

    def base():
        with gralora.disable_adapter(model):
            for _ in range(3):
                yield model(x)

    return mixed, base


def wanted(model, x, name):
    with gralora.mixed_batch(model, [name] * len(x)):
        return model(x)


@pytest.mark.parametrize(
    "drive", [lambda generator: generator, in_contexts_of_their_own], ids=["here", "in contexts"]
)
def test_a_generator_always_runs_inside_its_own_block_whoever_resumes_it(drive):
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)
    with torch.no_grad():
        gralora.set_adapter(model, "c")
        plain = model(x)
        mixed, base = streams(model, x)
        both = zip(drive(mixed(["a"] * 3)), drive(mixed(["b"] * 3)), drive(base()), strict=True)
        for of_a, of_b, of_base in both:
            torch.testing.assert_close(of_a, wanted(model, x, "a"))
            torch.testing.assert_close(of_b, wanted(model, x, "b"))
            torch.testing.assert_close(of_base, wanted(model, x, None))
        torch.testing.assert_close(model(x), plain)
    assert not any(m.blocks for m in model.modules() if isinstance(m, Switchable))


def test_a_generator_leaks_its_block_to_its_consumer_as_no_grad_does():
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)
    mixed, _ = streams(model, x)
    plain, stream = model(x), mixed(["a"] * 3)
    of_a = next(stream)
    assert same_bits(model(x), of_a)
    stream.close()
    assert same_bits(model(x), plain)


def test_a_generator_that_another_one_drives_runs_inside_its_own_block():
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)
    mixed, base = streams(model, x)

    def outer(inner):
        with gralora.mixed_batch(model, ["b"] * 3):
            for of_inner in inner:
                yield of_inner, model(x)

    started = mixed(["a"] * 3)
    first, of_base = next(started), base()
    next(of_base)
    torch.testing.assert_close(first, wanted(model, x, "a"))
    for of_a, of_b in outer(started):
        torch.testing.assert_close(of_a, wanted(model, x, "a"))
        torch.testing.assert_close(of_b, wanted(model, x, "b"))
        torch.testing.assert_close(next(of_base, wanted(model, x, None)), wanted(model, x, None))


def test_a_generator_may_hold_several_blocks():
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)

    def base():
        with of_the_base(model):
            return model(x)

    def two(outer, inner):
        with gralora.mixed_batch(model, [outer] * 3):
            with gralora.mixed_batch(model, [inner] * 3):
                for _ in range(2):
                    yield inner, model(x), base()
            yield outer, model(x), base()

    for pairs in zip(two("a", "b"), two("b", "c"), strict=True):
        for name, y, of_base in pairs:
            torch.testing.assert_close(y, wanted(model, x, name))
            torch.testing.assert_close(of_base, wanted(model, x, None))


def test_the_innermost_block_counts_within_a_generator_too():
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)

    def function():
        with gralora.disable_adapter(model):
            return model(x)

    def generator():
        with gralora.mixed_batch(model, ["a"] * 3):
            yield model(x)
            yield function()
            yield model(x)

    with gralora.mixed_batch(model, ["b"] * 3):
        first, second, third = generator()
        torch.testing.assert_close(model(x), wanted(model, x, "b"))
    torch.testing.assert_close(first, wanted(model, x, "a"))
    torch.testing.assert_close(second, wanted(model, x, None))
    assert torch.equal(first, third)


def test_a_generator_that_is_dropped_or_fails_ends_its_block():
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)
    plain = model(x)
    mixed, _ = streams(model, x)
    stream = mixed(["a"] * 3)
    next(stream)
    stream.close()
    stream = mixed(["a"] * 3)
    next(stream)
    del stream
    gc.collect()
    assert torch.equal(model(x), plain)
    assert not any(m.blocks for m in model.modules() if isinstance(m, Switchable))


@contextlib.contextmanager
def of_the_base(model):
    with gralora.disable_adapter(model):
        yield


def test_a_context_manager_made_of_a_generator_holds_for_its_block():
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)
    plain, base = model(x), wanted(model, x, None)
    with of_the_base(model):
        torch.testing.assert_close(model(x), base)
        with contextlib.ExitStack() as stack:
            stack.enter_context(gralora.mixed_batch(model, ["b"] * 3))
            torch.testing.assert_close(model(x), wanted(model, x, "b"))

    @of_the_base(model)
    def decorated():
        return model(x)

    torch.testing.assert_close(decorated(), base)
    assert torch.equal(model(x), plain)


@pytest.fixture
def disabled():
    model = four_adapters(mlp(16, 24, 8))
    with gralora.disable_adapter(model):
        yield model


def test_a_fixture_of_pytest_holds_for_its_test(disabled):
    x = torch.randn(3, 16)
    torch.testing.assert_close(disabled(x), wanted(disabled, x, None))


def test_tasks_of_asyncio_have_blocks_of_their_own():
    model, x = four_adapters(mlp(16, 24, 8)), torch.randn(3, 16)

    async def ask(name):
        found = []
        with gralora.mixed_batch(model, [name] * 3):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(model(x))
        return found

    async def stream(name):
        with gralora.mixed_batch(model, [name] * 3):
            for _ in range(3):
                await asyncio.sleep(0)
                yield model(x)

    async def drain(name):
        return [each async for each in stream(name)]

    async def main():
        return await asyncio.gather(
            *(run(name) for name in ("a", "b", None) for run in (ask, drain))
        )

    results = asyncio.run(main())
    for index, name in enumerate(("a", "b", None)):
        for each in (*results[2 * index], *results[2 * index + 1]):
            torch.testing.assert_close(each, wanted(model, x, name))


class Branch(nn.Module):
    """An attention, experts, and a layer, as a model of `DataParallel`."""

    def __init__(self):
        super().__init__()
        self.attention, self.experts, self.fc = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            Experts(dtype=None),
            nn.Linear(8, 8),
        )

    def forward(self, x):
        return self.experts(self.attention(self.fc(x), x, x, need_weights=False)[0])


def replicas(model, monkeypatch):
    """As `nn.DataParallel` makes them on GPUs, here on the CPU: tensors as plain attributes."""
    module = sys.modules["torch.nn.parallel.replicate"]
    copies = lambda tensors, devices, detach=False: [[t * 1 for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: 0)
    return module.replicate(model, [0, 1])


def test_replicas_have_the_adapters_and_are_in_the_blocks_of_their_model(monkeypatch):
    model, x = Branch(), torch.randn(2, 5, 8)
    base = model(x)
    gralora.inject(model, ["fc", "attention", "experts.up"], random_config())
    y = model(x)
    assert not torch.allclose(y, base)
    for replica in replicas(model, monkeypatch):
        torch.testing.assert_close(replica(x), y)
        parts = [m for m in replica.attention.children() if hasattr(m, "host")]
        assert parts and all(part.host is replica.attention for part in parts)
    replica = replicas(model, monkeypatch)[0]
    model.zero_grad()
    replica(x).sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in gralora.adapter_parameters(model)
    )
    with gralora.disable_adapter(model):
        found = []
        for replica in replicas(model, monkeypatch):
            thread = threading.Thread(target=lambda replica=replica: found.append(replica(x)))
            thread.start()
            thread.join()
    for each in found:
        torch.testing.assert_close(each, base)


@pytest.mark.parametrize("detached", [False, True])
def test_any_tensor_under_a_parameters_name_counts_as_the_weight(detached):
    model, x = Branch(), torch.randn(2, 5, 8)
    gralora.inject(model, ["fc", "attention", "experts.up"], random_config())
    doubled = {
        name: 2 * p.detach() if detached else nn.Parameter(2 * p)
        for name, p in model.named_parameters()
    }
    y = torch.func.functional_call(model, doubled, (x,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(y, model(x))
    with gralora.disable_adapter(model):
        assert not torch.allclose(y, model(x))


def test_the_order_of_rows_is_kept_for_the_time_of_the_block():
    model = gralora.inject(nn.Linear(16, 8), "", random_config(), adapter_name="a")
    x = torch.randn(4, 16)
    with torch.no_grad(), gralora.mixed_batch(model, ["a", None], repeat="interleave"):
        y = model(x)
        mode = model.gralora_adapters.mode
        order = weakref.ref(mode.sort(4, ["a"], x.device)[0])
        assert mode.sort(4, ["a"], x.device)[0] is order()
        assert same_bits(model(x), y)
    del mode
    gc.collect()
    assert order() is None
