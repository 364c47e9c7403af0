"""Every kind of adapted map under every engine of PyTorch computes with W + ΔW.

One oracle: the plain model that `merge_and_unload` makes of a copy, called eagerly, in float64.
"""

import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import gralora

from ..models import random_config, relative
from ..test_every_kind import Of

pytestmark = pytest.mark.slow


class OwnForward(nn.Linear):
    """A subclass that reads its weight in a forward of its own."""

    def forward(self, input):
        return F.linear(input.contiguous(), self.weight, self.bias)


class Reads(Of):
    """Reads the weight of its layer and never calls the layer."""

    def forward(self, x):
        return F.linear(x, self.map.weight, self.map.bias)


class ReadsTransposed(Of):
    def forward(self, x):
        return x @ self.map.weight + self.map.bias


class ReadsDensely(Of):
    """Uses the weight for more than a linear map of an input."""

    def forward(self, x):
        return F.linear(x, self.map.weight * 2) + self.map.weight.square().sum()


class ReadsOutProj(Of):
    def forward(self, x):
        return F.linear(x, self.map.out_proj.weight)


class TiedHead(Of):
    def forward(self, ids):
        return F.linear(self.map(ids), self.map.weight)


class SelfAttention(Of):
    def forward(self, x):
        return self.map(x, x, x, need_weights=False)[0]


class BatchedExperts(nn.Module):
    is_transposed = True

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 12))

    def forward(self, x):
        rows = x.reshape(1, -1, 8).expand(2, -1, -1)
        return torch.bmm(rows, self.up).sum(0).reshape(*x.shape[:-1], 12)


class IndexedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 12, 8))

    def forward(self, x):
        return sum(F.linear(x, self.up[expert]).tanh() for expert in range(2))


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(12, 8)


def attention():
    return nn.MultiheadAttention(8, 2, batch_first=True)


FEATURES = (2, 4, 8)
IDS = None
KINDS = {  # how the model is built, its targets, the shape of its input
    "linear": (lambda: Of(nn.Linear(8, 12)), ["map"], FEATURES),
    "linear, read": (lambda: Reads(nn.Linear(8, 12)), ["map"], FEATURES),
    "linear, read densely": (lambda: ReadsDensely(nn.Linear(8, 12)), ["map"], FEATURES),
    "linear, the model itself": (lambda: nn.Linear(8, 12), "", FEATURES),
    "subclass": (lambda: Of(OwnForward(8, 12)), ["map"], FEATURES),
    "subclass, read": (lambda: Reads(OwnForward(8, 12)), ["map"], FEATURES),
    "Conv1D": (lambda: Of(conv1d()), ["map"], FEATURES),
    "Conv1D, read": (lambda: ReadsTransposed(conv1d()), ["map"], FEATURES),
    "embedding": (lambda: Of(nn.Embedding(12, 8)), ["map"], IDS),
    "embedding, tied head": (lambda: TiedHead(nn.Embedding(12, 8)), ["map"], IDS),
    "grouped Conv1d": (lambda: Of(nn.Conv1d(8, 4, 3, groups=2)), ["map"], (2, 8, 7)),
    "grouped Conv2d": (lambda: Of(nn.Conv2d(8, 4, 3, groups=2)), ["map"], (2, 8, 5, 4)),
    "ConvTranspose2d": (lambda: Of(nn.ConvTranspose2d(8, 4, 3, stride=2)), ["map"], (2, 8, 4, 3)),
    "attention": (lambda: SelfAttention(attention()), ["q_proj", "out_proj"], FEATURES),
    "out_proj, read": (lambda: ReadsOutProj(attention()), ["out_proj"], FEATURES),
    "experts, bmm": (lambda: Of(BatchedExperts()), ["up"], FEATURES),
    "experts, index": (lambda: Of(IndexedExperts()), ["up"], FEATURES),
    "experts, the model itself": (BatchedExperts, ["up"], FEATURES),
}


def one(model, targets):
    gralora.inject(model, targets, random_config())


def several(model, targets):
    """Two active adapters with weights, one of them hybrid, and one that is not active."""
    gralora.inject(model, targets, random_config(hybrid_r=2), adapter_name="a")
    gralora.inject(model, targets, random_config(gralora_k=1), adapter_name="b")
    gralora.inject(model, targets, random_config(), adapter_name="inactive")
    gralora.set_adapter(model, {"a": 0.5, "b": -1.5})


CASES = {kind: (*parts, one) for kind, parts in KINDS.items()}
CASES |= {
    f"{kind}, several adapters": (*KINDS[kind], several)
    for kind in ("linear", "linear, read", "experts, bmm")
}


@functools.cache
def built(case):
    """(the adapted model, the plain model of W + ΔW, the base, two inputs)."""
    make, targets, shape, adapt = CASES[case]
    torch.manual_seed(0)
    base = make().double().eval()
    model = copy.deepcopy(base)
    adapt(model, targets)
    plain = gralora.merge_and_unload(copy.deepcopy(model))
    inputs = [
        torch.randint(12, (2, 4)) if shape is IDS else torch.randn(shape, dtype=torch.float64)
        for _ in range(2)
    ]
    return model, plain, base, inputs


def functional(model, x):
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return lambda x: functional_call(model, values, (x,))


ENGINES = {  # (model, example) -> a function of the input
    "eager": lambda model, x: model,
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True),
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "export strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "functional_call": functional,
    "vmap": lambda model, x: lambda x: vmap(lambda row: model(row[None])[0])(x),
}
MAY_RAISE = {  # symbolic_trace runs the forward of the model itself, here the library's own
    ("linear, the model itself", "fx"): r"symbolic tracing|symbolically traced|Proxy",
    ("experts, the model itself", "fx"): r"symbolic tracing|symbolically traced|Proxy",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_w_plus_delta_w(case, engine):
    model, plain, base, (x, other) = built(case)
    try:
        run = ENGINES[engine](model, x)
    except Exception as error:
        legal = MAY_RAISE.get((case, engine))
        if legal is None or not re.search(legal, str(error)):
            raise
        return
    for value in (x, other):
        found = run(value)
        assert relative(found, base(value)) > 1e-2, "silently the base"
        assert relative(found, plain(value)) < 1e-10
