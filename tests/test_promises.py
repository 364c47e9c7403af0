"""Promises that a reader of the code found broken, each as one claim."""

import asyncio
import contextvars
import copy
import gc
import re
import sys
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import gralora

from .models import mlp, random_config, relative, same_bits

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def model_of(*names, make=lambda: mlp(8, 8, 8), targets="all-linear", **config):
    """A model with adapters of these names; the first is active."""
    model = make().eval()
    for name in names:
        gralora.inject(model, targets, random_config(**config), adapter_name=name)
    gralora.set_adapter(model, names[0])
    return model


def answers(model, names, x=X):
    """The output with each adapter active, and under None the base's."""
    found = {}
    with torch.no_grad():
        for name in names:
            plain = copy.deepcopy(model)
            gralora.set_adapter(plain, name)
            found[name] = plain(x)
        found[None] = gralora.unload(copy.deepcopy(model))(x)
    return found


def run_in_thread(function):
    """What `function` returns in a thread of its own; an error is raised here."""
    outcome = []

    def work():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def close(a, b):
    return relative(a, b) < 1e-5


BLOCKS = {  # a function that opens the block, the adapter whose answer it gives
    "mixed_batch": (lambda model: gralora.mixed_batch(model, ["b"] * len(X)), "b"),
    "disable_adapter": (gralora.disable_adapter, None),
}


@contextmanager
def right_or_raises():
    """Allows an error in place of an answer, if it names the block."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("mixed_batch|disable_adapter|block", str(error)):
            raise


each_block = pytest.mark.parametrize("block", BLOCKS)


# blocks, threads and generators


@pytest.mark.parametrize("how", ["Thread", "ThreadPoolExecutor", "asyncio.to_thread"])
@each_block
def test_a_thread_started_inside_a_block_is_right_or_raises(block, how):
    model = model_of("a", "b")
    (opened, name), wanted = BLOCKS[block], answers(model, "ab")

    def forward():
        with torch.no_grad():
            return model(X)

    with opened(model), right_or_raises():
        if how == "Thread":
            found = run_in_thread(forward)
        elif how == "asyncio.to_thread":
            found = asyncio.run(asyncio.to_thread(forward))
        else:
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(forward).result()
        assert close(found, wanted[name])
    assert close(run_in_thread(forward), wanted["a"])


@each_block
def test_a_thread_that_existed_before_a_block_is_not_affected(block):
    model = model_of("a", "b")
    (opened, name), wanted = BLOCKS[block], answers(model, "ab")
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        assert close(pool.submit(model, X).result(), wanted["a"])
        with opened(model):
            assert close(model(X), wanted[name])
            assert close(pool.submit(model, X).result(), wanted["a"])


@each_block
def test_a_thread_that_outlives_the_block_it_was_started_in_has_the_active_adapter(block):
    model = model_of("a", "b")
    (opened, _), wanted = BLOCKS[block], answers(model, "ab")
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        with opened(model):
            pool.submit(int).result()
        assert close(pool.submit(model, X).result(), wanted["a"])


def test_two_generators_resumed_in_turn_do_not_answer_with_each_others_adapter():
    model = model_of("a", "b", "c")
    wanted = answers(model, "abc")

    def stream(name):
        with gralora.mixed_batch(model, [name] * len(X)):
            for _ in range(3):
                yield model(X).detach()

    with right_or_raises():
        for b, c in zip(stream("b"), stream("c")):
            assert close(b, wanted["b"]) and close(c, wanted["c"])
    gc.collect()  # closes what an error has left open
    assert close(model(X), wanted["a"])


def test_generators_with_blocks_of_two_kinds_do_not_mix():
    model = model_of("a", "b")
    wanted = answers(model, "ab")

    def stream(block):
        with BLOCKS[block][0](model):
            for _ in range(3):
                yield model(X).detach()

    with right_or_raises():
        for mixed, base in zip(stream("mixed_batch"), stream("disable_adapter")):
            assert close(mixed, wanted["b"]) and close(base, wanted[None])
    gc.collect()  # closes what an error has left open
    assert close(model(X), wanted["a"])


@pytest.mark.parametrize(
    ("first", "second"),
    [("disable_adapter", "disable_adapter"), ("disable_adapter", "mixed_batch")],
)
def test_compiled_code_is_right_in_a_block_that_outlives_one_of_another_thread(first, second):
    model = model_of("a", "b", make=lambda: mlp(8, 8))
    compiled, wanted = torch.compile(model, backend="eager"), answers(model, "ab")
    opened, entered, closed = threading.Event(), threading.Event(), threading.Event()

    def hold():
        with BLOCKS[first][0](model):
            opened.set()
            assert entered.wait(10)
        closed.set()

    thread = threading.Thread(target=hold)
    thread.start()
    assert opened.wait(10)
    with BLOCKS[second][0](model), torch.no_grad():
        entered.set()
        assert closed.wait(10)
        assert close(compiled(X), wanted[BLOCKS[second][1]])
    thread.join()
    with torch.no_grad():
        assert close(compiled(X), wanted["a"])


@each_block
def test_a_copied_context_keeps_no_locals_of_a_finished_function(block):
    model, contexts = model_of("a", "b"), []

    class Large:
        pass

    def use():
        large = Large()
        with BLOCKS[block][0](model):
            contexts.append(contextvars.copy_context())
        return weakref.ref(large)

    reference = use()
    gc.collect()
    assert reference() is None


# mixed batches


def rows(model, names):
    wanted = answers(model, "ab")
    return torch.stack([wanted[name][row] for row, name in enumerate(names)])


def test_inference_mode_before_training_in_a_mixed_batch():
    model, names = model_of("a", "b"), ["a", None, "b", "a"]
    wanted = rows(model, names)
    with torch.inference_mode(), gralora.mixed_batch(model, names):
        assert close(model(X), wanted)
    with gralora.mixed_batch(model, names):
        y = model(X)
    y.sum().backward()
    assert close(y, wanted)
    assert all(p.grad is not None for p in gralora.adapter_parameters(model, "a"))


def test_non_strict_export_inside_a_mixed_batch_leaves_no_fake_tensors():
    model, names = model_of("a", "b"), ["b", None, "b", "a"]
    wanted = rows(model, names)
    with gralora.mixed_batch(model, names):
        program = torch.export.export(model, (X,), strict=False)
    with gralora.mixed_batch(model, names):
        y = model(X)
    assert not isinstance(y, FakeTensor)
    assert close(y, wanted) and close(program.module()(X), wanted)


def test_a_fake_forward_inside_a_mixed_batch_leaves_no_fake_tensors():
    model, names = model_of("a", "b"), [None, "b", "a", "b"]
    with gralora.mixed_batch(model, names):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.randn(4, 8))
        y = model(X)
    assert not isinstance(y, FakeTensor) and close(y, rows(model, names))


def test_the_index_tensors_of_a_mixed_batch_are_freed_when_the_block_ends():
    model = model_of("a", "b")

    def integers():
        gc.collect()
        found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        return {id(each) for each in found if not each.is_floating_point()}

    before = integers()
    with torch.no_grad(), gralora.mixed_batch(model, ["b", None, "a"], repeat="interleave"):
        for count in (1, 2, 5):
            model(torch.randn(3 * count, 8))
    assert integers() <= before


# state dicts, buffers, files, copies


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_load_state_dict_with_assign_keeps_adapter_parameters():
    base = mlp(8, 8, 8)
    model = model_of("a", make=lambda: copy.deepcopy(base))
    parameters = gralora.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    values = {name: torch.randn_like(value) for name, value in base.state_dict().items()}
    model.load_state_dict(values, assign=True)
    assert all(a is b for a, b in zip(parameters, gralora.adapter_parameters(model), strict=True))
    base.load_state_dict(values)
    with gralora.disable_adapter(model):
        assert same_bits(model(X), base(X))
    y = model(X)
    y.square().sum().backward()
    optimizer.step()
    assert relative(model(X), y) > 1e-2


class Cache(nn.Module):
    """Writes its outputs into a persistent buffer, as a KV cache does."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4, 8))
        self.filled = 0

    def forward(self, x):
        self.cache[self.filled] = self.map(x)
        self.filled += 1
        return self.cache[: self.filled].sum(0)


def test_disable_adapter_leaves_buffers_that_the_model_writes():
    model = model_of("a", make=Cache)
    with torch.no_grad():
        model(X[0])
        written = model.cache.clone()
        with gralora.disable_adapter(model):
            assert written.any() and same_bits(model.cache, written)
            model(X[1])
            written = model.cache.clone()
        assert written[1].any() and same_bits(model.cache, written)


def test_unload_leaves_buffers_that_the_model_writes():
    model = model_of("a", make=Cache)
    with torch.no_grad():
        model(X[0])
    written = model.cache.clone()
    gralora.unload(model)
    assert written.any() and same_bits(model.cache, written)


@pytest.mark.parametrize("order", [("unet", "text_encoder"), ("text_encoder", "unet")])
def test_a_failed_load_of_a_pipeline_changes_no_module(order, tmp_path):
    def pipeline(**ranks):
        return {name: model_of("default", r=ranks[name], gralora_k=1) for name in order}

    gralora.save_adapter(pipeline(unet=4, text_encoder=4), tmp_path / "a", format="diffusers")
    modules = pipeline(unet=4, text_encoder=2)
    before = {name: module.state_dict() for name, module in copy.deepcopy(modules).items()}
    with pytest.raises(gralora.AdapterFileError):
        gralora.load_adapter(modules, tmp_path / "a")
    for name, module in modules.items():
        after = module.state_dict()
        assert list(after) == list(before[name])
        assert all(same_bits(after[key], value) for key, value in before[name].items()), name


def test_shared_copy_leaves_no_mark_on_the_parameters_of_the_original():
    model = model_of("a")
    tensors = [*model.parameters(), *model.buffers()]
    before = [dict(vars(tensor)) for tensor in tensors]
    other = gralora.shared_copy(model)
    assert other[0].weight.data_ptr() == model[0].weight.data_ptr()
    del other
    gc.collect()
    assert [vars(tensor) for tensor in tensors] == before


# training and merging


@pytest.mark.parametrize("switched_in", ["this thread", "another thread"])
def test_gradients_that_arrive_after_set_adapter_reach_their_adapter(switched_in):
    model = model_of("a", "b")
    model(X).square().sum().backward()
    wanted = [p.grad.clone() for p in gralora.adapter_parameters(model, "a")]
    model.zero_grad()
    loss = model(X).square().sum()
    if switched_in == "this thread":
        gralora.set_adapter(model, "b")
    else:
        run_in_thread(lambda: gralora.set_adapter(model, "b"))
    loss.backward()
    for p, grad in zip(gralora.adapter_parameters(model, "a"), wanted, strict=True):
        assert same_bits(p.grad, grad)
    assert not any(
        p.grad is not None and p.grad.any() for p in gralora.adapter_parameters(model, "b")
    )


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(self.map, x, use_reentrant=False)


def test_checkpointed_training_in_a_new_thread_after_set_adapter_is_no_error():
    model = model_of("a", "b", make=Checkpointed)
    x = X.clone().requires_grad_()
    for _ in range(50):
        (x * 2).sum().backward()
    gralora.set_adapter(model, "b")
    run_in_thread(lambda: model(x).square().sum().backward())
    assert all(p.grad.abs().sum() > 0 for p in gralora.adapter_parameters(model, "b"))


class Stack(nn.Module):
    """Fused experts, each of which gets its own rows."""

    is_transposed = True

    def __init__(self, count=4, product=torch.bmm):
        super().__init__()
        self.weights, self.product = nn.Parameter(torch.randn(count, 8, 16)), product

    def forward(self, x):
        return self.product(x, self.weights)


class Results(TorchDispatchMode):
    """Counts the tensors that PyTorch's operators return, the views of one `unbind` each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.count += len(tree_leaves(results))
        return results


def test_merging_experts_is_linear_in_their_number():
    counts = []
    for experts in (32, 64):
        model = model_of("a", make=lambda experts=experts: Stack(experts), targets=["weights"])
        with Results() as results:
            gralora.merge(model)
        counts.append(results.count)
    assert counts[1] <= 2.2 * counts[0]


# calls


class Head(nn.Module):
    """Reads the weight of its layer and applies it by `how(x, weight, bias)`."""

    def __init__(self, how):
        super().__init__()
        self.map, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        return self.how(x, self.map.weight, self.map.bias)


READS = {
    "F.linear(x, w)": lambda x, w, b: F.linear(x, w),
    "F.linear(input=, weight=)": lambda x, w, b: F.linear(input=x, weight=w),
    "F.linear(x, w, bias=)": lambda x, w, b: F.linear(x, w, bias=b),
    "torch.mm(x, mat2=)": lambda x, w, b: torch.mm(x, mat2=w.t()),
    "torch.mm(input=, mat2=)": lambda x, w, b: torch.mm(input=x, mat2=w.t()),
    "x.mm(mat2=)": lambda x, w, b: x.mm(mat2=w.t()),
    "torch.matmul(input=, other=)": lambda x, w, b: torch.matmul(input=x, other=w.t()),
    "x.matmul(other=)": lambda x, w, b: x.matmul(other=w.mT),
    "torch.addmm(mat1=, mat2=)": lambda x, w, b: torch.addmm(b, mat1=x, mat2=w.t()),
    "torch.addmm(input=)": lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w.t(), beta=0.5),
    "b.addmm(mat1=, mat2=)": lambda x, w, b: b.addmm(mat1=x, mat2=w.t(), alpha=2),
    "torch.transpose(input=)": lambda x, w, b: x @ torch.transpose(input=w, dim0=0, dim1=1),
    "w.transpose(dim0=, dim1=)": lambda x, w, b: x @ w.transpose(dim0=0, dim1=1),
    "w.permute": lambda x, w, b: x @ w.permute(1, 0),
    "torch.split(split_size_or_sections=)": lambda x, w, b: torch.cat(
        [F.linear(x, part) for part in torch.split(w, split_size_or_sections=4)], -1
    ),
    "torch.split(tensor=)": lambda x, w, b: torch.cat(
        [F.linear(x, part) for part in torch.split(tensor=w, split_size_or_sections=4)], -1
    ),
    "w.split(split_size=)": lambda x, w, b: torch.cat(
        [F.linear(x, part) for part in w.split(split_size=4)], -1
    ),
    "torch.chunk(input=, chunks=)": lambda x, w, b: torch.cat(
        [F.linear(x, part) for part in torch.chunk(input=w, chunks=2)], -1
    ),
    "torch.narrow(input=)": lambda x, w, b: x @ torch.narrow(input=w, dim=1, start=0, length=4),
    "torch.einsum": lambda x, w, b: torch.einsum("ti,oi->to", x, w),
    "torch.index_select(index=)": lambda x, w, b: (
        x @ torch.index_select(input=w, dim=0, index=torch.tensor([1, 2])).mT
    ),
    "F.embedding(input=, weight=)": lambda x, w, b: (
        x[:1] * F.embedding(input=torch.tensor([1, 2, 3]), weight=w)
    ),
    "x.unsqueeze(0) @ w.t()": lambda x, w, b: x.unsqueeze(0) @ w.t(),
    "w @ x.t()": lambda x, w, b: w @ x.t(),
    "w @ vector": lambda x, w, b: w @ x[0],
    "vector @ w": lambda x, w, b: x[0] @ w,
}


@pytest.mark.parametrize("how", READS)
def test_a_weight_that_is_read_takes_the_arguments_of_pytorchs_function(how):
    model = model_of("a", make=lambda: Head(READS[how]).double(), targets=["map"])
    x = X.double()
    merged, base = (
        gralora.merge_and_unload(copy.deepcopy(model)),
        gralora.unload(copy.deepcopy(model)),
    )
    assert relative(model(x), merged(x)) < 1e-10 and relative(model(x), base(x)) > 1e-3


STACKED = {
    "x[None] @ w": lambda x, w: x[None] @ w,
    "x @ w": lambda x, w: x @ w,
    "w.mT @ x.mT": lambda x, w: w.mT @ x.mT,
    "x[:, None, None] @ w": lambda x, w: x[:, None, None] @ w,
    "vector @ w": lambda x, w: x[0] @ w,
    "torch.matmul(input=, other=)": lambda x, w: torch.matmul(input=x[None], other=w),
    "torch.bmm": lambda x, w: torch.bmm(x.expand(4, -1, -1), w),
    "torch.bmm(input=, mat2=)": lambda x, w: torch.bmm(input=x.expand(4, -1, -1), mat2=w),
    "x.bmm(mat2=)": lambda x, w: x.expand(4, -1, -1).bmm(mat2=w),
    "torch.baddbmm(batch1=)": lambda x, w: torch.baddbmm(
        torch.ones(4, 4, 16, dtype=x.dtype), batch1=x.expand(4, -1, -1), batch2=w
    ),
    "torch.einsum": lambda x, w: torch.einsum("ti,nio->nto", x, w),
    "x @ w[index]": lambda x, w: x @ w[torch.tensor([2, 0])],
    "torch.unbind(input=)": lambda x, w: sum(x @ part for part in torch.unbind(input=w, dim=0)),
}


@pytest.mark.parametrize("how", STACKED)
def test_experts_that_are_read_broadcast_as_in_pytorch(how):
    make = lambda: Stack(4, STACKED[how]).double()  # noqa: E731
    model, x = model_of("a", make=make, targets=["weights"]), X.double()
    merged, base = (
        gralora.merge_and_unload(copy.deepcopy(model)),
        gralora.unload(copy.deepcopy(model)),
    )
    assert relative(model(x), merged(x)) < 1e-10 and relative(model(x), base(x)) > 1e-3


class ScaledLinear(nn.Linear):
    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


class ScaledConv(nn.Conv1d):
    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


class ScaledEmbedding(nn.Embedding):
    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


SCALED = {
    "Linear": (lambda: ScaledLinear(8, 8), X),
    "Conv1d": (lambda: ScaledConv(8, 8, 3), torch.randn(4, 8, 5)),
    "Embedding": (lambda: ScaledEmbedding(8, 8), torch.tensor([[0, 3], [7, 1]])),
}


@pytest.mark.parametrize("kind", SCALED)
def test_keyword_arguments_are_bound_by_the_layers_signature(kind):
    make, x = SCALED[kind]
    layer = model_of("a", make=lambda: nn.Sequential(make()), targets=["0"])[0]
    wanted = layer(x, 2.0)
    assert same_bits(layer(scale=2.0, input=x), wanted)
    assert same_bits(layer(input=x, scale=2.0), wanted)
    assert same_bits(layer(input=x), layer(x))
    with gralora.mixed_batch(layer, ["a", *[None] * (len(x) - 1)]):
        assert same_bits(layer(scale=2.0, input=x), layer(x, 2.0))
    with gralora.disable_adapter(layer):
        assert relative(layer(scale=2.0, input=x), wanted) > 1e-2


class Routed(nn.Module):
    """Fused experts that are called as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        shares = [(top_k_weights * (top_k_index == expert)).sum(-1) for expert in range(2)]
        products = [F.linear(hidden_states, self.up[expert]) for expert in range(2)]
        return sum(share[:, None] * y for share, y in zip(shares, products, strict=True))


def test_keyword_arguments_of_experts_are_bound_by_their_signature_in_a_mixed_batch():
    model = model_of("a", "b", make=Routed, targets=["up"])
    index, weights = torch.tensor([[0], [1], [0], [1]]), torch.rand(4, 1)
    with gralora.mixed_batch(model, ["b", "a", None, "a"]):
        wanted = model(X, index, weights)
        found = model(top_k_weights=weights, hidden_states=X, top_k_index=index)
    assert same_bits(found, wanted) and relative(wanted, model(X, index, weights)) > 1e-2


PLAIN = {
    "Linear": (lambda: nn.Linear(8, 8), X),
    "Conv1d": (lambda: nn.Conv1d(8, 8, 3), torch.randn(4, 8, 5)),
    "Embedding": (lambda: nn.Embedding(8, 8), torch.tensor([[0, 3], [7, 1]])),
}


@pytest.mark.parametrize("state", ["adapted", "disabled", "merged"])
@pytest.mark.parametrize("kind", PLAIN)
def test_arguments_that_the_base_does_not_take_raise_as_the_base_does(kind, state):
    make, x = PLAIN[kind]
    layer = model_of("a", make=lambda: nn.Sequential(make()), targets=["0"])[0]
    if state == "merged":
        gralora.merge(layer)
    block = gralora.disable_adapter(layer) if state == "disabled" else torch.no_grad()
    with block:
        for args, kwargs in [((x, 3), {}), ((), {"x": x}), ((x,), {"scale": 2}), ((), {})]:
            for called in (make(), layer):
                with pytest.raises(TypeError):
                    called(*args, **kwargs)
        with pytest.raises(TypeError):
            layer(x, input=x)


# targets


PACKAGES = ["my_models", "accelerated_models.head", "deepspeed_utils", "diffusers.hooksmith"]
SOURCE = """
from torch import nn
from torch.nn import functional as F

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.map.weight)
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_whose_name_begins_like_an_engines_is_no_engine(name, monkeypatch):
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(SOURCE, module.__dict__)
    model = model_of("a", make=module.Head, targets=["map"])
    merged = gralora.merge_and_unload(copy.deepcopy(model))
    with gralora.disable_adapter(model):
        base = model(X)
    assert close(model(X), merged(X)) and relative(model(X), base) > 1e-2


class BiasTable(nn.Module):
    """An attention with a table of biases (heads, length, length)."""

    def __init__(self):
        super().__init__()
        self.q, self.rel = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        return self.q(x) + (x[:, :4] @ self.rel).sum()


def layers(model):
    return [row.layer for row in gralora.summary(model)]


@pytest.mark.parametrize("targets", [["attn"], "attn", lambda name, _: name == "attn"])
def test_a_table_of_three_axes_is_not_adapted_by_the_name_of_its_module(targets):
    model = nn.ModuleDict({"attn": BiasTable(), "other": nn.Linear(8, 8)})
    with suppress(ValueError):
        gralora.inject(model, targets, random_config())
    assert layers(model) == []


def test_a_parameter_of_three_axes_is_adapted_by_its_own_name():
    model = nn.ModuleDict({"attn": BiasTable(), "other": nn.Linear(8, 8)})
    gralora.inject(model, ["attn.rel"], random_config())
    assert layers(model) == ["attn.rel"]


class Conv1D(nn.Module):
    """A wrapper whose name is that of GPT-2's layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, x):
        return self.conv(x).relu()


def test_a_wrapper_called_conv1d_is_not_gpt2s():
    model = nn.ModuleDict({"wrapper": Conv1D(), "other": nn.Linear(8, 8)})
    gralora.inject(model, r".*", random_config())
    assert layers(model) == ["wrapper.conv", "other"]


def test_a_convolution_called_conv1d_is_a_convolution():
    made = type("Conv1D", (nn.Conv1d,), {})
    model = model_of("a", make=lambda: nn.Sequential(made(8, 8, 3)), targets=["0"])
    x = torch.randn(2, 8, 5)
    merged = gralora.merge_and_unload(copy.deepcopy(model))
    assert type(merged[0]) is made and close(model(x), merged(x))


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, x):
        return F.linear(x, self.weight)


def test_a_layer_called_conv1d_that_stores_its_weight_out_by_in_is_not_gpt2s():
    made = type("Conv1D", (Same,), {})
    model = nn.Sequential(made(), nn.Linear(8, 8))
    gralora.inject(model, "all-linear", random_config())
    assert layers(model) == ["1"]
    with pytest.raises(ValueError, match="'0'"):
        gralora.inject(model, ["0"], random_config(), adapter_name="b")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_all_linear_passes_over_a_scripted_submodule(how):
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    scripted = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, X)
    model = nn.Sequential(scripted, nn.Linear(8, 4), nn.Linear(4, 8))
    base = model(X)
    gralora.inject(model, "all-linear", random_config())
    assert layers(model) == ["1", "2"]
    assert relative(model(X), base) > 1e-2
    gralora.unload(model)
    assert same_bits(model(X), base)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_that_is_not_targeted_does_not_disturb():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    gralora.inject(model, ["1"], random_config())
    y = model(X)
    assert type(model[0]) is nn.Linear and not model[0].weight.requires_grad
    with gralora.disable_adapter(model):
        assert relative(model(X), y) > 1e-2


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("targets", [["0"], "all-linear"])
def test_a_lazy_module_that_is_targeted_is_named_in_the_error(targets):
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'0'.*lazy"):
        gralora.inject(model, targets, random_config())
    assert type(model[1]) is nn.Linear and model[1].weight.requires_grad
    model(X)
    gralora.inject(model, targets, random_config())


# parametrizations


def test_parametrizations_can_be_removed_from_an_adapted_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    base = copy.deepcopy(model)
    gralora.inject(model, ["0"], random_config())
    y = model(X)
    parametrize.remove_parametrizations(model[0], "weight")
    assert close(model(X), y) and relative(model(X), base(X)) > 1e-2
    gralora.merge(model)
    assert close(model(X), y)
    gralora.unload(model)
    assert type(model[0]) is nn.Linear and close(model(X), base(X))


def test_unload_leaves_no_class_of_ours_under_a_later_parametrization():
    model = nn.Sequential(nn.Linear(8, 8))
    y = model(X)
    gralora.inject(model, ["0"], random_config())
    parametrizations.weight_norm(model[0])
    gralora.unload(model)
    assert not [each for each in type(model[0]).__mro__ if each.__module__.startswith("gralora")]
    assert close(model(X), y)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear and close(model(X), y)
