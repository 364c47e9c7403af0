"""The fast path gives the numbers of the plain path, with as few kernels and bytes as it says."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from benchmarks.speed._counting import Kernels, kept_for_backward, kernels
from gralora import GraloraConfig
from gralora.maths import autograd

from ..models import Doubled, mlp, random_config, randomize_, relative, same_bits

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@contextlib.contextmanager
def plain_path():
    real, autograd.usable = autograd.usable, lambda *args: False
    try:
        yield
    finally:
        autograd.usable = real


def run(model, x, path, seed=1):
    """Output and gradients of input and adapter."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with path():
        y = model(leaf)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def layer(kind, dtype=torch.float32, n_in=24, n_out=16, **kwargs):
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(n_out, n_in).to(dtype)
    else:
        base = (Doubled if kind == "own forward" else nn.Linear)(n_in, n_out, dtype=dtype)
    return gralora.inject(base, "", random_config(**kwargs))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "own forward"])
def test_both_paths_give_the_same_numbers(kind, dtype, k, hybrid_r, dropout):
    model = layer(kind, dtype, gralora_k=k, hybrid_r=hybrid_r, gralora_dropout=dropout)
    for shape in [(300,), (2, 5), ()]:
        x = torch.randn(*shape, 24).to(dtype)
        fast, plain = run(model, x, contextlib.nullcontext), run(model, x, plain_path)
        for a, b in zip(fast, plain, strict=True):
            assert a.dtype == b.dtype
            assert relative(a.double(), b.double()) < TOLERANCE[dtype]
        with torch.no_grad():
            torch.manual_seed(1)
            assert relative(model(x).double(), plain[0].double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "own forward"])
def test_gradcheck_and_gradgradcheck(kind, hybrid_r, dropout):
    model = layer(kind, torch.float64, 8, 4, hybrid_r=hybrid_r, gralora_dropout=dropout)
    model.requires_grad_(True)  # the base's gradients too
    names, values = zip(*model.named_parameters(), strict=True)

    def function(x, *parameters):
        torch.manual_seed(1)
        for name, value in zip(names, parameters, strict=True):
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = (
                value  # functional_call would take the plain path
            )
        return model(x)

    inputs = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True), *values)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_several_active_adapters_on_the_fast_path():
    model = mlp(16, 8)
    for name, k in (("a", 1), ("b", 2), ("c", 4)):
        gralora.inject(model, ["0"], random_config(gralora_k=k), adapter_name=name)
    gralora.set_adapter(model, {"a": 1.0, "b": -0.5, "c": 2.0})
    x = torch.randn(3, 16)
    fast, plain = run(model, x, contextlib.nullcontext), run(model, x, plain_path)
    for a, b in zip(fast, plain, strict=True):
        assert relative(a, b) < 1e-6
    torch.testing.assert_close(
        fast[0], F.linear(x, model[0].weight + gralora.delta_weight(model[0]), model[0].bias)
    )
    with torch.no_grad():
        single = len(kernels(lambda: gralora.set_adapter(model, "a") or model(x)))
        assert (
            len(kernels(lambda: gralora.set_adapter(model, ["a", "b"]) or model(x))) == single + 3
        )


def test_only_what_is_needed_is_computed():
    model = layer("linear")
    x = torch.randn(5, 24)
    frozen_input = kernels(lambda: model(x).sum().backward())
    leaf = x.clone().requires_grad_()
    assert len(kernels(lambda: model(leaf).sum().backward())) >= len(frozen_input) + 2
    model.gralora_adapters.requires_grad_(False)
    y = model(leaf)
    y.sum().backward()
    torch.testing.assert_close(
        leaf.grad[0] / 2, (model.weight + gralora.delta_weight(model)).sum(0), rtol=1e-3, atol=1
    )
    assert not model(x).requires_grad


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "own forward"])
def test_autocast_gives_what_the_plain_path_gives(kind, autocast):
    model = layer(kind, hybrid_r=2)
    x = torch.randn(40, 24)

    @contextlib.contextmanager
    def cast(path):
        with path(), torch.autocast("cpu", autocast):
            yield

    fast, plain = (
        run(model, x, lambda: cast(contextlib.nullcontext)),
        run(model, x, lambda: cast(plain_path)),
    )
    assert fast[0].dtype == plain[0].dtype == autocast
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == b.dtype
        assert relative(a.double(), b.double()) < 3e-2
    double = layer(kind, torch.float64)
    with torch.autocast("cpu", autocast):
        assert double(x.double()).dtype == torch.float64


class Remembering(nn.Linear):
    """Keeps its last output, as tools that look into models do."""

    def forward(self, input):
        self.last = super().forward(input)
        return self.last


class Squashed(nn.Linear):
    """Its output is saved for its own backward."""

    def forward(self, input):
        return torch.sigmoid(super().forward(input))


class Sliced(nn.Linear):
    """Returns a view of something larger."""

    def forward(self, input):
        return torch.cat([super().forward(input)] * 2, -1)[..., : self.out_features]


@pytest.mark.parametrize("cls", [Remembering, Squashed, Sliced])
@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_somebody_else_holds_is_not_written_into(cls, grad):
    base = cls(24, 16)
    x = torch.randn(3, 24, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected = base(x).detach().clone()
        model = gralora.inject(base, "", random_config())
        y = model(x)
        torch.testing.assert_close(y, expected + F.linear(x, gralora.delta_weight(model)))
    if cls is Remembering:
        assert same_bits(model.last, expected)
    if grad:
        fast, plain = (
            run(model, x.detach(), contextlib.nullcontext),
            run(model, x.detach(), plain_path),
        )
        for a, b in zip(fast, plain, strict=True):
            assert relative(a, b) < 1e-6


def test_an_output_that_nobody_holds_is_written_into():
    model = layer("own forward")
    x = torch.randn(3, 24)
    names = kernels(lambda: model(x))
    assert names.count("clone") == 1  # the regrouping of z, and no copy of the output


# where a torch.autograd.Function cannot serve


def test_per_sample_gradients_with_vmap_of_grad():
    model = mlp(16, 8)
    gralora.inject(model, ["0"], random_config(hybrid_r=2))
    x = torch.randn(5, 16)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).pow(2).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(5):
        model.zero_grad()
        model(x[i : i + 1]).pow(2).sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(per_sample[name][i], parameter.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["torch.func.jvp", "forward_ad"])
def test_forward_mode(how):
    model = layer("linear", torch.float64)
    x, v = torch.randn(2, 3, 24, dtype=torch.float64)
    expected = F.linear(v, model.weight + gralora.delta_weight(model))
    if how == "torch.func.jvp":
        tangent = torch.func.jvp(model, (x,), (v,))[1]
    else:
        from torch.autograd import forward_ad

        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, expected)


def test_hessian_and_double_backward():
    model = layer("linear", torch.float64, 6, 4, r=2)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def penalty(path):
        with path():
            (g,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
            return torch.autograd.grad(g.pow(2).sum(), [x, *gralora.adapter_parameters(model)])

    for a, b in zip(penalty(contextlib.nullcontext), penalty(plain_path), strict=True):
        assert relative(a, b) < 1e-12
    hessian = torch.autograd.functional.hessian(lambda x: model(x).pow(2).sum(), x.detach())
    W = model.weight + gralora.delta_weight(model)
    torch.testing.assert_close(hessian[0, :, 0, :], 2 * W.T @ W)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "own forward"])
def test_export_and_trace(kind):
    model = nn.Sequential(layer(kind, hybrid_r=2)).eval()
    x = torch.randn(3, 24)
    y = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(
            torch.jit.trace(model, (x,))(torch.flip(x, [0])), torch.flip(y, [0])
        )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "own forward"])
def test_compile_without_a_graph_break(kind, dropout):
    torch._dynamo.reset()
    model = layer(kind, hybrid_r=2, gralora_dropout=dropout)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    if dropout:
        compiled(x).sum().backward()
        model.eval()
    eager, out = run(model, x, contextlib.nullcontext), run(compiled, x, contextlib.nullcontext)
    for a, b in zip(eager, out, strict=True):
        assert relative(a, b) < 1e-5
    with gralora.disable_adapter(model):
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), eager[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_by_inductor_it_equals_eager():
    torch._dynamo.reset()
    model = gralora.inject(mlp(16, 32, 8), "all-linear", random_config())
    x = torch.randn(4, 16)
    eager, out = (
        run(model, x, contextlib.nullcontext),
        run(torch.compile(model, fullgraph=True), x, contextlib.nullcontext),
    )
    for a, b in zip(eager, out, strict=True):
        assert relative(a, b) < 1e-5


def test_nested_and_empty_inputs_take_the_plain_path():
    model = layer("linear")
    rows = [torch.randn(2, 24), torch.randn(3, 24)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert not autograd.usable(nested, model.gralora_adapters["default"].A)
    assert not autograd.usable(torch.randn(0, 24), model.gralora_adapters["default"].A)
    assert autograd.usable(rows[0], model.gralora_adapters["default"].A)


def test_checkpointing_gives_the_gradients_of_the_run_without_it():
    from torch.utils.checkpoint import checkpoint

    model = layer("linear", gralora_dropout=0.5, hybrid_r=2)
    x = torch.randn(3, 24)
    plain = run(model, x, contextlib.nullcontext)
    for reentrant in (True, False):
        again = run(_Checkpointed(model, checkpoint, reentrant), x, contextlib.nullcontext)
        for a, b in zip(plain, again, strict=True):
            assert same_bits(a, b)


class _Checkpointed(nn.Module):
    def __init__(self, model, checkpoint, reentrant):
        super().__init__()
        self.model, self.checkpoint, self.reentrant = model, checkpoint, reentrant

    def forward(self, x):
        return self.checkpoint(self.model, x, use_reentrant=self.reentrant)


# exact counts


def step_of(model, x):
    def step():
        x.grad = None
        model.zero_grad()
        model(x).backward(gradient)

    gradient = torch.ones(*x.shape[:-1], 256, dtype=x.dtype)
    return step


@pytest.mark.parametrize(
    ("dtype", "both", "forward"),
    [(torch.float32, 10, 4), (torch.bfloat16, 15, 6)],
    ids=["float32", "bfloat16"],
)
def test_kernels_forward_and_backward(dtype, both, forward):
    model = gralora.inject(mlp(256, 256, dtype=dtype), ["0"], GraloraConfig(r=32, gralora_k=2))
    x = torch.randn(4, 16, 256, dtype=dtype, requires_grad=True)
    assert len(kernels(step_of(model, x))) == both
    with torch.no_grad():
        assert len(kernels(lambda: model(x))) == forward


def test_a_merged_or_disabled_layer_costs_exactly_the_base():
    base = mlp(256, 256)
    x = torch.randn(4, 16, 256, requires_grad=True)
    model = gralora.inject(copy.deepcopy(base), ["0"], random_config())
    expected = kernels(step_of(base.requires_grad_(False), x))
    gralora.merge(model)
    assert kernels(step_of(model, x)) == expected
    gralora.unmerge(model)
    with gralora.disable_adapter(model):
        assert kernels(step_of(model, x)) == expected


class Attention(nn.Module):
    def __init__(self, dtype, **kwargs):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(1024, 1024, dtype=dtype) for _ in range(3))
        gralora.inject(self, ["q", "k", "v"], GraloraConfig(r=64, gralora_k=4, **kwargs))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize(
    ("dtype", "dropout", "limit"),
    [
        (torch.bfloat16, 0.0, 5.2),
        (torch.bfloat16, 0.1, 8.2),
        (torch.float32, 0.0, 7.2),
        (torch.float32, 0.1, 10.3),
    ],
)
def test_bytes_kept_for_backward_of_q_k_v_over_one_input(dtype, dropout, limit):
    model = Attention(dtype, gralora_dropout=dropout)
    x = torch.randn(1024, 1024, dtype=dtype, requires_grad=True)
    kept = kept_for_backward(lambda: model(x), list(model.parameters()))
    assert kept <= limit * 2**20
    assert kept >= x.numel() * x.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_delta_weight_need_no_temporary_larger_than_a_row_of_blocks(dtype):
    model = gralora.inject(mlp(256, 128, dtype=dtype), ["0"], GraloraConfig(r=16, gralora_k=4))
    randomize_(model)
    with Kernels() as counter:
        gralora.merge(model)
    new_weight = 128 * 256
    assert counter.largest in (
        new_weight,
        new_weight // 4,
    )  # the one new weight is a bare allocation
    assert counter.names.count("addmm_") == 16
    with torch.no_grad(), Kernels() as counter:
        delta = gralora.delta_weight(model[0], "default")
    assert counter.names.count("addmm_") == 16
    torch.testing.assert_close(delta, gralora.delta_weight(model[0], "default").detach())
    in_place = gralora.inject(mlp(256, 128, dtype=dtype), ["0"], GraloraConfig(r=16, gralora_k=4))
    weight = in_place[0].weight
    gralora.merge_and_unload(in_place)
    assert in_place[0].weight is weight
