"""Whoever reads the weight of an adapted map while a forward runs computes with W + ΔW, and trains
A and B.
"""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gralora
from benchmarks.speed._counting import Kernels
from gralora.layers.effective_weight import EffectiveWeight, MatrixWeight
from gralora.layers.lazy_weight import LazyWeight, read_as

from ..models import Doubled, random_config, randomize_, relative
from .test_effective_weight import one

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Parent(nn.Module):
    """Computes with the weight of a layer, in one of many ways, or calls it."""

    def __init__(self, how, layer=None):
        super().__init__()
        self.fc, self.how = layer or nn.Linear(16, 16, dtype=torch.float64), how
        self.helper = Helper()

    def forward(self, x):
        return HOW[self.how](self, x)


class Helper(nn.Module):
    def forward(self, x, layer):
        return F.linear(x, layer.weight, layer.bias)


class FusedHead(torch.autograd.Function):
    """As fused losses do it: products within, gradients of the weight by hand."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2), grad.flatten(0, -2).sum(0)


def in_a_variable(self, x):
    layer = self.fc
    return torch.matmul(x, layer.weight.t()) + layer.bias


HOW = {
    "linear": lambda self, x: F.linear(x, self.fc.weight, self.fc.bias),
    "another bias": lambda self, x: F.linear(
        x, weight=self.fc.weight, bias=torch.cat([self.fc.bias[:8], self.fc.bias[8:]])
    ),
    "matmul": lambda self, x: x @ self.fc.weight.T + self.fc.bias,
    "mT": lambda self, x: x.matmul(self.fc.weight.mT) + self.fc.bias,
    "transpose": lambda self, x: x @ self.fc.weight.transpose(0, 1) + self.fc.bias,
    "linear, by name": lambda self, x: F.linear(input=x, weight=self.fc.weight, bias=self.fc.bias),
    "mm, by name": lambda self, x: (
        torch.mm(x.flatten(0, 1), mat2=self.fc.weight.t()).view_as(x) + self.fc.bias
    ),
    "mm, all by name": lambda self, x: (
        torch.mm(input=x.flatten(0, 1), mat2=self.fc.weight.t()).view_as(x) + self.fc.bias
    ),
    "matmul, by name": lambda self, x: (
        torch.matmul(input=x, other=self.fc.weight.t()) + self.fc.bias
    ),
    "linalg": lambda self, x: torch.linalg.matmul(x, self.fc.weight.mT) + self.fc.bias,
    "transpose, by name": lambda self, x: (
        x @ torch.transpose(self.fc.weight, dim0=-1, dim1=0) + self.fc.bias
    ),
    "swapaxes, by name": lambda self, x: (
        x @ self.fc.weight.swapaxes(axis0=0, axis1=1) + self.fc.bias
    ),
    "permute": lambda self, x: x @ self.fc.weight.permute(1, 0) + self.fc.bias,
    "permute, by name": lambda self, x: (
        x @ torch.permute(self.fc.weight, dims=(-1, -2)) + self.fc.bias
    ),
    "permuted to itself": lambda self, x: F.linear(x, self.fc.weight.permute((0, 1)), self.fc.bias),
    "mm, with out": lambda self, x: (
        torch.stack(
            [
                torch.mm(each, self.fc.weight.detach().t(), out=torch.empty_like(each))
                + self.fc.bias
                for each in x.detach()
            ]
        )
        * 0
        + F.linear(x, self.fc.weight, self.fc.bias)
    ),
    "cast to what it is": lambda self, x: F.linear(x, self.fc.weight.type_as(x), self.fc.bias),
    "cast to double": lambda self, x: F.linear(x, self.fc.weight.double(), self.fc.bias),
    "addmm, by name": lambda self, x: torch.addmm(
        self.fc.bias, mat1=x.flatten(0, 1), mat2=self.fc.weight.t()
    ).view_as(x),
    "addmm": (
        lambda self, x: torch.addmm(self.fc.bias, x.flatten(0, 1), self.fc.weight.t()).view_as(x)
    ),
    "from the left": lambda self, x: (
        (self.fc.weight @ x[0].mT).mT.expand_as(x) * 0 + F.linear(x, self.fc.weight, self.fc.bias)
    ),
    "from the left, in a batch": lambda self, x: (self.fc.weight @ x.mT).mT + self.fc.bias,
    "helper": lambda self, x: self.helper(x, self.fc),
    "variable": in_a_variable,
    "cast": lambda self, x: F.linear(x, self.fc.weight.to(x.dtype).to(x.device), self.fc.bias),
    "computed": lambda self, x: F.linear(x, 2 * self.fc.weight / 2, self.fc.bias),
    "cut along blocks": lambda self, x: (
        (
            torch.cat([F.linear(x, w) for w in self.fc.weight.chunk(2)], -1)
            + sum(
                F.linear(p, w)
                for p, w in zip(x.split(8, -1), self.fc.weight.split([8, 8], 1), strict=True)
            )
            + F.linear(x[..., 8:], self.fc.weight[:, 8:])
            + F.linear(x[..., :8], self.fc.weight.T[:8].T)
            + torch.cat(
                [F.linear(x, self.fc.weight[:8]), x @ self.fc.weight.narrow(0, 8, 8).mT], -1
            )
        )
        / 4
        + self.fc.bias
    ),
    "cut": lambda self, x: (
        torch.cat([F.linear(x, w) for w in self.fc.weight.chunk(3)], -1) + self.fc.bias
    ),
    "einsum": lambda self, x: torch.einsum("b t i, o i -> b t o", x, self.fc.weight) + self.fc.bias,
    "einsum, turned": lambda self, x: (
        torch.einsum("io,...i->...o", self.fc.weight.T, x) + self.fc.bias
    ),
    "einsum, in another order": lambda self, x: (
        torch.einsum("bit,oi->obt", x.mT, self.fc.weight).permute(1, 2, 0) + self.fc.bias
    ),
    "einsum, no product": lambda self, x: F.linear(
        x, torch.einsum("oi->io", self.fc.weight).mT, self.fc.bias
    ),
    "row by row": lambda self, x: F.linear(
        x, torch.stack([self.fc.weight[i] for i in range(16)]), self.fc.bias
    ),
    "iterated": lambda self, x: F.linear(x, torch.stack(list(self.fc.weight)), self.fc.bias),
    "unbound": lambda self, x: F.linear(x, torch.stack(self.fc.weight.unbind(1), 1), self.fc.bias),
    "sliced with a step": lambda self, x: (
        torch.stack([x @ self.fc.weight[i::2].T for i in (0, 1)], -1).flatten(-2) + self.fc.bias
    ),
    "sliced past a block": lambda self, x: (
        torch.cat([x @ self.fc.weight[:3].T, F.linear(x, self.fc.weight[3:, ...])], -1)
        + self.fc.bias
    ),
    "narrowed past a block": lambda self, x: (
        torch.cat([F.linear(x, self.fc.weight.narrow(0, i, 4)) for i in range(0, 16, 4)], -1)
        + self.fc.bias
    ),
    "rows selected": lambda self, x: F.linear(
        x, self.fc.weight.index_select(0, torch.arange(16)), self.fc.bias
    ),
    "columns selected": lambda self, x: F.linear(
        x, self.fc.weight.index_select(1, torch.arange(16)), self.fc.bias
    ),
    "a row of no length": lambda self, x: F.linear(x, self.fc.weight[None][0], self.fc.bias),
    "its axes transposed to themselves": lambda self, x: F.linear(
        x, self.fc.weight.transpose(1, 1), self.fc.bias
    ),
    "stacked, bmm": lambda self, x: (
        torch.bmm(x, self.fc.weight.expand(2, 16, 16).mT) + self.fc.bias
    ),
    "addmm, scaled": lambda self, x: torch.stack(
        [torch.addmm(self.fc.bias, each, self.fc.weight.t(), beta=2, alpha=2) / 2 for each in x]
    ),
    "addmm of a matrix": lambda self, x: torch.stack(
        [torch.addmm(self.fc.bias.expand(5, 16), each, self.fc.weight.t()) for each in x]
    ),
    "einsum, as numbers": lambda self, x: (
        torch.einsum(x, [0, 1, 2], self.fc.weight, [3, 2], [0, 1, 3]) + self.fc.bias
    ),
    "einsum, of three": lambda self, x: (
        torch.einsum("bti,oi,o->bto", x, self.fc.weight, x.new_ones(16)) + self.fc.bias
    ),
    "einsum, of rows": lambda self, x: (
        torch.einsum("bti,oi->btoi", x, self.fc.weight).sum(-1) + self.fc.bias
    ),
    "a matrix and a vector": lambda self, x: (
        torch.stack([self.fc.weight @ row for row in x.flatten(0, 1)]).view_as(x) + self.fc.bias
    ),
    "times itself": lambda self, x: F.linear(
        x, self.fc.weight @ self.fc.weight @ torch.linalg.inv(self.fc.weight), self.fc.bias
    ),
    "copied": lambda self, x: F.linear(x, self.fc.weight.to(x, copy=True), self.fc.bias),
    "like it": lambda self, x: F.linear(
        x, x.new_zeros(16, 16).to(self.fc.weight) + self.fc.weight, self.fc.bias
    ),
    "looked up, by name": lambda self, x: F.linear(
        x, F.embedding(input=torch.arange(16), weight=self.fc.weight), self.fc.bias
    ),
    "looked up": lambda self, x: F.linear(
        x, F.embedding(torch.arange(16), self.fc.weight), self.fc.bias
    ),
    "fused": lambda self, x: FusedHead.apply(x, self.fc.weight, self.fc.bias),
    "dispatched": lambda self, x: torch.ops.aten.linear(x, self.fc.weight, self.fc.bias),
    "called": lambda self, x: self.fc(x),
    "called or read": lambda self, x: (self.fc(x) + F.linear(x, self.fc.weight, self.fc.bias)) / 2,
    "checkpointed": lambda self, x: checkpoint(in_a_variable, self, x, use_reentrant=False),
    "checkpointed, reentrant": lambda self, x: checkpoint(
        in_a_variable, self, x * 1, use_reentrant=True
    ),
}


def by_hand(model):
    """The same with W + ΔW in a plain layer."""
    plain = Parent("linear")
    with torch.no_grad():
        plain.fc.weight.copy_(model.fc.weight + gralora.delta_weight(model.fc))
        plain.fc.bias.copy_(model.fc.bias)
    return plain


def run(model, x, **kwargs):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf, **kwargs)
    y.square().sum().backward()
    return y.detach(), leaf.grad


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("how", HOW)
def test_the_numbers_are_those_of_w_plus_delta_w_and_a_and_b_are_trained(how, hybrid_r):
    model = gralora.inject(Parent(how), ["fc"], random_config(hybrid_r=hybrid_r))
    plain, called = by_hand(model), copy.deepcopy(model)
    called.how = "called"
    for a, b in zip(run(model, X), run(plain, X), strict=True):
        assert relative(a, b) < 1e-12
    run(called, X)
    for ours, wanted in zip(
        gralora.adapter_parameters(model), gralora.adapter_parameters(called), strict=True
    ):
        assert relative(ours.grad, wanted.grad) < 1e-11
    with torch.no_grad():
        assert relative(model(X), plain(X)) < 1e-12
        with gralora.disable_adapter(model):
            assert relative(model(X), F.linear(X, model.fc.weight, model.fc.bias)) < 1e-12
    gralora.merge(model)
    assert relative(model(X), plain(X)) < 1e-12  # merging changes nothing
    gralora.unmerge(model)
    base = gralora.unload(model)
    assert type(base.fc) is nn.Linear


def test_what_writes_to_a_weight_past_python_is_refused():
    model = gralora.inject(Parent("linear"), ["fc"], random_config())
    HOW["written"] = lambda self, x: torch.ops.aten.mul_.Tensor(self.fc.weight, 2)
    try:
        model.how = "written"
        with pytest.raises(RuntimeError, match="edited in place"), torch.no_grad():
            model(X)
    finally:
        del HOW["written"]


def test_a_linear_map_computes_no_tensor_of_the_weights_size():
    model = gralora.inject(Parent("linear", nn.Linear(256, 256)), ["fc"], random_config())
    x = torch.randn(3, 256, requires_grad=True)
    for how in (
        "linear",
        "linear, by name",
        "matmul",
        "matmul, by name",
        "mm, all by name",
        "linalg",
        "mT",
        "transpose, by name",
        "swapaxes, by name",
        "permute, by name",
        "variable",
        "cast",
        "cast to what it is",
        "from the left, in a batch",
        "helper",
    ):
        model.how = how
        with Kernels() as counter:
            model(x[None]).sum().backward()
        assert counter.largest < 256 * 256 // 2, how
    model.how = "computed"
    with Kernels() as counter:
        model(x[None])
    assert counter.largest == 256 * 256


@pytest.mark.parametrize("how", ["addmm", "einsum", "cut"])
def test_other_operations_compute_the_sum_once(how, monkeypatch):
    model = gralora.inject(Parent(how), ["fc"], random_config())
    counted = []
    evaluate = EffectiveWeight.evaluate
    monkeypatch.setattr(
        EffectiveWeight, "evaluate", lambda *args: counted.append(1) or evaluate(*args)
    )
    HOW["read once"] = lambda self, x: HOW[how](Read(self.fc), x)
    model.how = "read once"
    try:
        model(X)
    finally:
        del HOW["read once"]
    assert len(counted) == 1


class Read:
    """A layer whose weight has been read once."""

    def __init__(self, layer):
        self.fc = type("Layer", (), {"weight": layer.weight, "bias": layer.bias})


def test_a_mistake_gets_the_error_of_pytorch():
    plain = Parent("called", nn.Linear(16, 16, dtype=torch.float64))
    model = gralora.inject(copy.deepcopy(plain), ["fc"], random_config())
    for wrong in (
        lambda self, x: F.linear(x, self.fc.weight, weights=1),
        lambda self, x: torch.mm(x, self.fc.weight),
        lambda self, x: x.float() @ self.fc.weight,
        lambda self, x: self.fc.weight[16],
        lambda self, x: self.fc.weight.transpose(0, 2),
        lambda self, x: self.fc.weight.transpose(1, 2),
        lambda self, x: self.fc.weight.permute(0),
    ):
        HOW["wrong"] = wrong
        errors = []
        for each in (plain, model):
            each.how = "wrong"
            with pytest.raises((TypeError, RuntimeError, IndexError)) as raised:
                each(X)
            errors.append((raised.type, str(raised.value)))
        del HOW["wrong"]
        assert errors[0] == errors[1]


def test_several_adapters_and_rows_of_their_own():
    model = Parent("linear")
    for name in "ab":
        gralora.inject(model, ["fc"], random_config(), adapter_name=name)
    randomize_(model)
    other = copy.deepcopy(model)
    other.how = "called"
    for each in (model, other):
        gralora.set_adapter(each, {"a": 0.5, "b": -2.0})
    assert relative(model(X), other(X)) < 1e-12
    assert relative(model(X), by_hand(model)(X)) < 1e-12
    with gralora.mixed_batch(model, ["b", None]), gralora.mixed_batch(other, ["b", None]):
        assert relative(model(X), other(X)) < 1e-12
        model.how = "computed"
        with pytest.raises(ValueError, match="read whole, and can't be another one for every row"):
            model(X)
    with gralora.mixed_batch(model, [None, None]):  # nobody's adapter, whichever is active
        assert relative(model(X), F.linear(X, model.fc.weight, model.fc.bias)) < 1e-12


def test_outside_of_a_forward_the_weight_is_the_parameter():
    model = gralora.inject(Parent("called"), ["fc"], random_config())
    assert (
        model.fc.weight
        is model.fc._parameters["weight"]
        is dict(model.named_parameters())["fc.weight"]
    )
    tied = nn.Linear(16, 16)
    tied.weight = model.fc.weight
    assert tied.weight is model.fc.weight
    assert type(model.fc.weight + 1) is torch.Tensor


def test_its_attributes_are_those_of_the_weight_and_it_cannot_be_edited():
    seen = {}

    class Looks(Parent):
        def forward(self, x):
            weight = self.fc.weight
            seen["weight"] = weight
            assert isinstance(weight, LazyWeight)
            assert (weight.shape, weight.dtype, weight.device) == (
                (16, 16),
                torch.float64,
                x.device,
            )
            assert (
                weight.stride() == (16, 1)
                and weight.is_contiguous()
                and weight.numel() == 256
                and len(weight) == 16
            )
            for edit in (
                lambda: weight.add_(1),
                lambda: weight.data.clamp_(0, 1),
                lambda: weight.detach().mul_(2),
                lambda: nn.init.zeros_(weight),
                lambda: weight.__setitem__(0, 1.0),
                lambda: torch.add(weight, 1, out=weight),
                lambda: setattr(weight, "data", x),
                lambda: torch.ops.aten.mul_(weight, 2),
            ):
                with pytest.raises(RuntimeError, match="edited in place while a forward runs"):
                    edit()
            return self.fc(x)

    model = gralora.inject(Looks("called"), ["fc"], random_config())
    before = model.fc.weight.clone()
    model(X)
    assert torch.equal(model.fc.weight, before)
    assert "LazyWeight" in repr(seen["weight"])


@pytest.mark.parametrize("layer", ["conv1d", "own forward", "convolution"])
def test_every_layer_that_is_its_own_map(layer):
    from transformers.pytorch_utils import Conv1D

    makers = {
        "conv1d": (
            Conv1D(16, 16).double(),
            lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view_as(x),
        ),
        "own forward": (Doubled(16, 16, dtype=torch.float64), lambda x, w, b: F.linear(x, w, b)),
        "convolution": (
            nn.Conv1d(16, 16, 1, dtype=torch.float64),
            lambda x, w, b: F.conv1d(x.mT, w, b).mT,
        ),
    }
    made, compute = makers[layer]

    class Reads(Parent):
        def forward(self, x):
            return compute(x, self.fc.weight, self.fc.bias)

    model = gralora.inject(Reads("", made), ["fc"], random_config())
    wanted = compute(X, model.fc.weight + gralora.delta_weight(model.fc), model.fc.bias)
    assert relative(model(X), wanted) < 1e-12
    model(X).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in gralora.adapter_parameters(model))
    model.forward = lambda x: model.fc(x.mT).mT if layer == "convolution" else model.fc(x)
    base = model.fc.base_forward(X.mT).mT if layer == "convolution" else model.fc.base_forward(X)
    delta = gralora.delta_weight(model.fc)
    assert (
        relative(model(X), base + compute(X, delta, torch.zeros_like(model.fc.bias))) < 1e-12
    )  # and once where it is called


@pytest.mark.parametrize("how", ["linear", "called", "computed", "called or read"])
def test_compiled(how):
    model = gralora.inject(Parent(how), ["fc"], random_config())
    wanted = run(model, X)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, X), wanted, strict=True):
        assert relative(a, b) < 1e-12
    convolution = gralora.inject(nn.Conv1d(16, 16, 1, dtype=torch.float64), "", random_config())
    y = convolution(X.mT)
    assert (
        relative(torch.compile(convolution, fullgraph=True, backend="aot_eager")(X.mT), y) < 1e-12
    )


@pytest.mark.parametrize("how", ["linear", "computed", "fused"])
def test_torch_func_and_half_precision(how):
    model = gralora.inject(Parent(how), ["fc"], random_config())
    parameters = dict(model.named_parameters())
    if how != "fused":  # functorch wants Functions of another form
        grads = torch.func.grad(
            lambda p: torch.func.functional_call(model, p, (X,)).square().sum()
        )(parameters)
        run(model, X)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                assert relative(grads[name], parameter.grad) < 1e-11, name
    half = gralora.inject(
        Parent(how, nn.Linear(16, 16, dtype=torch.bfloat16)), ["fc"], random_config()
    )
    x = X.to(torch.bfloat16)
    other = copy.deepcopy(half)
    other.how = "called"
    assert half(x).dtype is torch.bfloat16
    assert relative(half(x).float(), other(x).float()) < 3e-2
    mixed = gralora.inject(Parent(how, nn.Linear(16, 16)), ["fc"], random_config())
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(mixed(X.float()).float(), by_hand(mixed).float()(X.float()).float()) < 3e-2


def test_dropout_falls_where_the_input_is_seen():
    config = random_config(gralora_dropout=0.5)
    model = gralora.inject(Parent("linear"), ["fc"], config)
    other = copy.deepcopy(model)
    other.how = "called"
    found = []
    for each in (model, other):
        torch.manual_seed(3)
        found.append(each(X))
    assert torch.equal(*found)
    assert not torch.allclose(model(X), model.eval()(X))


def test_a_head_whose_weight_a_loss_reads_in_training_and_that_is_called_in_inference():
    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 32, bias=False)

        def forward(self, x, labels=None):
            hidden = self.body(x)
            if labels is None:
                return self.lm_head(hidden)
            return F.cross_entropy(hidden @ self.lm_head.weight.t(), labels)

    model, x, labels = LanguageModel(), X.float()[0], torch.arange(5)
    base = model(x, labels)
    gralora.inject(model, ["lm_head"], random_config())
    assert not torch.allclose(model(x, labels), base)
    assert torch.allclose(model(x, labels), F.cross_entropy(model(x), labels))
    model(x, labels).backward()
    assert all(p.grad.abs().sum() > 0 for p in gralora.adapter_parameters(model))


def test_timms_way_of_putting_a_bias_together_at_run_time():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48, bias=False)
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
            self.register_buffer("k_bias", torch.zeros(16), persistent=False)
            self.separate = False

        def forward(self, x):
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            qkv = (
                self.qkv(x) + bias
                if self.separate
                else F.linear(x, weight=self.qkv.weight, bias=bias)
            )
            return torch.softmax(qkv[..., :16] @ qkv[..., 16:32].mT, -1) @ qkv[..., 32:]

    model = Attention()
    x = X.float()
    base = model(x)
    gralora.inject(model, "all-linear", random_config())
    read = model(x)
    assert not torch.allclose(read, base)
    model.separate = True
    assert torch.allclose(model(x), read, atol=1e-5)


def test_source_is_not_needed_and_shared_layers_act_in_both():
    space = {"nn": nn}
    exec(
        "class Hidden(nn.Module):\n    def forward(self, x):\n        return x @"
        " self.fc.weight.mT\n",
        space,
    )
    parent, caller = (
        space["Hidden"](),
        Parent("called", nn.Linear(16, 16, bias=False, dtype=torch.float64)),
    )
    with pytest.raises((OSError, TypeError)):
        inspect.getsource(space["Hidden"])
    parent.fc = caller.fc
    gralora.inject(parent, ["fc"], random_config())
    assert relative(parent(X), caller(X)) < 1e-12
    with gralora.disable_adapter(parent):
        assert not torch.allclose(parent(X), by_hand_without_bias(parent))


def by_hand_without_bias(model):
    return X @ (model.fc.weight + gralora.delta_weight(model.fc)).mT


@pytest.mark.parametrize("kdim", [None, 8])
@pytest.mark.parametrize("parts", [["q_proj", "v_proj", "out_proj"], ["k_proj"], ["out_proj"]])
def test_an_attention_whose_weights_a_parent_takes(parts, kdim):
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(
                16, 4, kdim=kdim, vdim=kdim, batch_first=False, dtype=torch.float64
            )

        def forward(self, q, k):
            a, same = self.attn, kdim is None
            apart = (
                {}
                if same
                else {f"{part}_proj_weight": getattr(a, f"{part}_proj_weight") for part in "qkv"}
            )
            packed = a.in_proj_weight if same else None
            rest = (a.bias_k, a.bias_v, False, 0.0, a.out_proj.weight, a.out_proj.bias)
            return F.multi_head_attention_forward(
                q,
                k,
                k,
                16,
                4,
                packed,
                a.in_proj_bias,
                *rest,
                use_separate_proj_weight=not same,
                **apart,
            )[0]

    model = Pool()
    q, k = (
        torch.randn(5, 2, 16, dtype=torch.float64),
        torch.randn(7, 2, kdim or 16, dtype=torch.float64),
    )
    base = model(q, k)
    gralora.inject(model, parts, random_config())
    y = model(q, k)
    assert not torch.allclose(y, base)
    assert relative(y, model.attn(q, k, k)[0]) < 1e-12
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in gralora.adapter_parameters(model))
    assert model.attn.out_proj.weight is model.attn.out_proj._parameters["weight"]
    with gralora.disable_adapter(model):
        assert torch.equal(model(q, k), base)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(q, k), y)
    gralora.unload(model)
    assert type(model.attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear" and torch.equal(
        model(q, k), base
    )


class Strange(nn.Linear):
    """A forward of its own that hands itself to others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.helper = Helper()

    def forward(self, x):
        return self.helper(x, self)


def test_the_layers_own_forward_reads_the_parameter_whoever_in_it_reads():
    layer = gralora.inject(Strange(16, 16, dtype=torch.float64), "", random_config())
    wanted = F.linear(X, layer.weight + gralora.delta_weight(layer), layer.bias)
    assert relative(layer(X), wanted) < 1e-12  # once, not twice
    parent = Parent("linear", layer)
    assert relative(parent(X), wanted) < 1e-12


# made by hand


def lazy(**kwargs):
    weight, shares = one(**kwargs)
    for tensors, _, _ in shares:
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_()
    return read_as(MatrixWeight(weight, shares)), weight, shares


def test_it_looks_like_the_weight_and_is_the_sum():
    found, weight, _ = lazy()
    assert type(found) is LazyWeight
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda"):
        assert getattr(found, name) == getattr(weight, name)
    assert found.stride() == weight.stride() and len(found) == len(weight) and found.requires_grad
    assert found.computed == {}
    assert relative(found + 0, weight) > 0.1
    assert torch.equal(found + 0, found.dense()) and "LazyWeight(tensor" in repr(found)


def test_gradients_reach_a_and_b_through_operators_that_do_not_know_it():
    found, _, shares = lazy()
    torch.ops.aten.mul.Tensor(found, 2.0).sum().backward()
    again, _, others = lazy()
    (again * 2).sum().backward()
    assert relative(shares[0][0][0].grad, others[0][0][0].grad) < 1e-12
    detached = found.detach()
    assert not detached.requires_grad and torch.equal(detached * 1, found.dense().detach())


@pytest.mark.parametrize(
    "edit",
    [lambda w: w.add_(1), lambda w: w.__setitem__(0, 1.0), lambda w: torch.ops.aten.zero_(w)],
)
def test_it_is_not_edited(edit):
    with pytest.raises(RuntimeError, match="edited in place while a forward runs"):
        edit(lazy()[0])
