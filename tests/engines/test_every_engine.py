"""Every kind of layer, called and read, in every engine of PyTorch: all compute W + ΔW."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gralora

from ..models import Doubled, Experts, random_config, relative
from ..test_every_kind import CASES, Of, conv1d

pytestmark = [  # of torch's own
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
    pytest.mark.filterwarnings("ignore:Was not able to add assertion"),
]


class Reads(nn.Module):
    """Reads the weight of a layer that it never calls, or owns experts."""

    def __init__(self, layer, how):
        super().__init__()
        self.map, self.how = layer, how

    def forward(self, x):
        return self.how(self.map, x)


class Pool(nn.Module):
    """Reads all weights of an attention."""

    def __init__(self, kdim=8):
        super().__init__()
        self.map = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim)

    def forward(self, x):
        a, k, apart = self.map, x[..., : self.map.kdim], {}
        if a.in_proj_weight is None:
            apart = {
                "use_separate_proj_weight": True,
                "q_proj_weight": a.q_proj_weight,
                "k_proj_weight": a.k_proj_weight,
                "v_proj_weight": a.v_proj_weight,
            }
        return F.multi_head_attention_forward(
            *(x, k, k, 8, 2, a.in_proj_weight, a.in_proj_bias, a.bias_k, a.bias_v, False, 0.0),
            *(a.out_proj.weight, a.out_proj.bias),
            need_weights=False,
            **apart,
        )[0]


class Stacked(Experts):
    def forward(self, x):
        return torch.bmm(x.expand(3, -1, -1), self.up.transpose(1, 2)).sum(0)


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
READ = {
    "matmul": (lambda: Reads(nn.Linear(8, 12), lambda fc, x: x @ fc.weight.t()), ["map"], X),
    "computed": (
        lambda: Reads(nn.Linear(8, 12), lambda fc, x: x @ (fc.weight * 2).t()),
        ["map"],
        X,
    ),
    "own forward": (lambda: Of(Doubled(8, 12)), ["map"], X),
    "own forward, read": (
        lambda: Reads(Doubled(8, 12), lambda fc, x: F.linear(x, fc.weight)),
        ["map"],
        X,
    ),
    "own forward, called and read": (
        lambda: Reads(Doubled(8, 12), lambda fc, x: fc(x) + F.linear(x, fc.weight)),
        ["map"],
        X,
    ),
    "GPT-2's, read": (lambda: Reads(conv1d(), lambda fc, x: x @ fc.weight), ["map"], X),
    "convolution, read": (
        lambda: Reads(nn.Conv1d(8, 12, 3), lambda conv, x: F.conv1d(x.mT, conv.weight)),
        ["map"],
        X,
    ),
    "attention, read": (Pool, ["q_proj", "v_proj", "out_proj"], X),
    "attention of several sizes, read": (lambda: Pool(4), ["q_proj", "k_proj", "out_proj"], X),
    "embedding, read": (
        lambda: Reads(nn.Embedding(12, 8), lambda e, x: F.embedding(x, e.weight)),
        ["map"],
        torch.tensor([[0, 5, 11, 3], [7, 7, 1, 2]]),
    ),
    "experts, batched": (lambda: Of(Stacked(dtype=None)), ["up"], torch.randn(2, 4, 8)[0]),
}
KINDS = {**{name: (make, targets, x) for name, (make, targets, x, _) in CASES.items()}, **READ}
FEW = ("matmul", "own forward, called and read", "attention, read", "experts, batched")
KINDS_OF = {  # of the slow engines; `test_every_kind` compiles the layers that are called
    "compile": READ,
    "export, strict": {name: READ[name] for name in FEW},
}


class All(nn.Module):
    """A model of several kinds, so that an engine runs once for all of them."""

    def __init__(self, kinds, adapt):
        super().__init__()
        self.kinds = nn.ModuleList()
        for make, targets, _ in kinds.values():
            torch.manual_seed(0)
            kind = make().double().eval()
            if adapt:
                gralora.inject(kind, targets, random_config(hybrid_r=2))
            self.kinds.append(kind)

    def forward(self, xs):
        return [self.kinds[i](xs[i]) for i in range(len(self.kinds))]


def with_parameters(model, xs, mode):
    parameters = dict(model.named_parameters())

    def run(parameters, *xs):
        return functional_call(model, parameters, (list(xs),))

    return make_fx(run, tracing_mode=mode)(parameters, *xs)(parameters, *xs)


def forward_mode(model, xs):
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):  # torch's others have no forward mode
        run = partial(functional_call, model, args=(xs,))
        return torch.func.jvp(run, (parameters,), (parameters,))[0]


PROGRAMS = {
    "export": lambda m, xs: torch.export.export(m, (xs,), strict=False).module(),
    "export, strict": lambda m, xs: torch.export.export(m, (xs,), strict=True).module(),
    "fx": lambda m, xs: torch.fx.symbolic_trace(m),
}
ENGINES = {
    **{name: lambda m, xs, make=make: make(m, xs)(xs) for name, make in PROGRAMS.items()},
    "compile": lambda m, xs: torch.compile(m, backend="aot_eager", fullgraph=True)(xs),
    "jit.trace": lambda m, xs: torch.jit.trace(m, (xs,), check_trace=False)(xs),
    "make_fx": lambda m, xs: make_fx(lambda *xs: m(list(xs)))(*xs)(*xs),
    "make_fx, fake inputs": lambda m, xs: make_fx(
        lambda *xs: m(list(xs)), tracing_mode="fake", _allow_non_fake_inputs=True
    )(*xs)(*xs),
    "make_fx, fake parameters": partial(with_parameters, mode="fake"),
    "make_fx, symbolic": partial(with_parameters, mode="symbolic"),
    "functional_call": lambda m, xs: functional_call(
        m, {name: p.detach() for name, p in m.named_parameters()}, (xs,)
    ),
    "functionalize": lambda m, xs: functionalize(lambda *xs: m(list(xs)))(*xs),
    "vmap": lambda m, xs: [
        y[0] for y in vmap(lambda *xs: m(list(xs)))(*(torch.stack([x, x]) for x in xs))
    ],
    "no_grad": lambda m, xs: torch.no_grad()(m)(xs),
    "forward-mode AD": forward_mode,
}


SLOW = ("compile", "make_fx, symbolic")


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.slow if e in SLOW else ()) for e in ENGINES]
)
def test_the_output_is_that_of_w_plus_delta_w(engine):
    kinds = KINDS_OF.get(engine, KINDS)
    model, base = All(kinds, adapt=True), All(kinds, adapt=False)
    xs = [x.double() if x.is_floating_point() else x for _, _, x in kinds.values()]
    found, wanted, plain = ENGINES[engine](model, xs), model(xs), base(xs)
    wrong = {
        name: f"{relative(y, right):.1e} off, and {relative(y, without):.1e} off the base"
        for name, y, right, without in zip(kinds, found, wanted, plain, strict=True)
        if relative(y, right) > 1e-12 or relative(y, without) < 1e-2
    }
    assert not wrong


@pytest.mark.parametrize("engine", PROGRAMS)
def test_the_adapters_are_parameters_of_the_program(engine):
    kinds = {"matmul": READ["matmul"]} if engine in KINDS_OF else KINDS
    model, base = All(kinds, adapt=True), All(kinds, adapt=False)
    xs = [x.double() if x.is_floating_point() else x for _, _, x in kinds.values()]
    program = PROGRAMS[engine](model, xs)
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if "gralora_adapters" in name:
                parameter.zero_()
        for name, y, plain in zip(kinds, program(xs), base(xs), strict=True):
            assert relative(y, plain) < 1e-12, name
