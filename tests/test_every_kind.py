"""What every kind of linear map passes, from one table: W + ΔW, gradients, merging, files, copies,
engines.
"""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers
from gralora.layers.kinds import KINDS

from .models import Experts, assert_same, fingerprint, random_config, relative, same_bits


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.map(x, x, x, need_weights=False)[0]


class Reads(nn.Module):
    """Never calls the layer, and reads its weight."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 12)

    def forward(self, x):
        return F.linear(x, self.map.weight, self.map.bias)


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Embedding(12, 8)

    def forward(self, x):
        return F.linear(self.map(x), self.map.weight)


class Of(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.map = layer

    def forward(self, x):
        return self.map(x)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(12, 8)


TOKENS = torch.tensor([[0, 5, 11, 3], [7, 7, 1, 2]])
CASES = {  # how it is built, the names that are adapted, an input, the formats that hold it
    "linear": (
        lambda: Of(nn.Linear(8, 12)),
        ["map"],
        torch.randn(2, 4, 8),
        {"gralora", "peft", "lora"},
    ),
    "read, never called": (Reads, ["map"], torch.randn(2, 4, 8), {"gralora", "peft", "lora"}),
    "GPT-2's": (lambda: Of(conv1d()), ["map"], torch.randn(2, 4, 8), {"gralora", "peft", "lora"}),
    "embedding": (lambda: Of(nn.Embedding(12, 8)), ["map"], TOKENS, {"gralora", "lora"}),
    "embedding and head": (TiedHead, ["map"], TOKENS, {"gralora", "lora"}),
    "convolution": (
        lambda: Of(nn.Conv1d(8, 12, 3, padding=1)),
        ["map"],
        torch.randn(2, 8, 7),
        {"gralora", "lora"},
    ),
    "grouped": (
        lambda: Of(nn.Conv2d(8, 4, 3, groups=2)),
        ["map"],
        torch.randn(2, 8, 7, 5),
        {"gralora", "lora"},
    ),
    "transposed": (
        lambda: Of(nn.ConvTranspose2d(8, 4, 3, stride=2)),
        ["map"],
        torch.randn(2, 8, 4, 3),
        {"gralora"},
    ),
    "attention": (
        Attention,
        ["q_proj", "v_proj", "out_proj"],
        torch.randn(2, 4, 8),
        {"gralora", "lora"},
    ),
    "experts": (lambda: Of(Experts(dtype=None)), ["up"], torch.randn(3, 8), {"gralora", "lora"}),
    "experts, transposed": (
        lambda: Of(Experts(True, None)),
        ["up"],
        torch.randn(3, 8),
        {"gralora", "lora"},
    ),
}
pytestmark = [
    pytest.mark.parametrize("case", CASES),
    pytest.mark.filterwarnings("ignore:PEFT up to 0.21.2 applies the update"),
]


def built(case, dtype=torch.float64, adapt=True, **config):
    make, targets, x, _ = CASES[case]
    torch.manual_seed(0)
    model = make().to(dtype)
    if adapt:
        gralora.inject(model, targets, random_config(**config))
    return model, x.to(dtype) if x.is_floating_point() else x


def by_hand(model):
    """The base with W + ΔW in its weights."""
    plain = copy.deepcopy(model)
    for _, layer in [each for each in gralora_layers(plain) if list(each[1].gralora_adapters)]:
        delta, (owner, name) = layer.delta_weight().detach(), layer.map.place
        with torch.no_grad():
            if delta.shape == owner._parameters[name].shape:
                owner._parameters[name].add_(delta)
            else:  # a third of a packed projection
                layer.map.base_matrix().add_(delta)
    return gralora.unload(plain)


def test_the_table_covers_every_kind(case):
    covered = {type(layer.map) for name in CASES for _, layer in gralora_layers(built(name)[0])}
    assert covered == set(KINDS)


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_the_output_and_the_gradients_are_those_of_w_plus_delta_w(case, hybrid_r):
    model, x = built(case, hybrid_r=hybrid_r)
    base, _ = built(case, adapt=False)
    assert relative(model(x), by_hand(model)(x)) < 1e-12 and relative(model(x), base(x)) > 1e-2
    assert torch.autograd.gradcheck(lambda *_: model(x), gralora.adapter_parameters(model))
    if x.is_floating_point():
        leaf = x.clone().requires_grad_()
        mine, theirs = (
            torch.autograd.grad(m(leaf).square().sum(), leaf)[0] for m in (model, by_hand(model))
        )
        assert relative(mine, theirs) < 1e-11
    gralora.check_effect(model, x)


def test_inject_changes_nothing_and_unload_gives_back_every_bit(case):
    base, x = built(case, adapt=False)
    before, y = fingerprint(base), base(x)
    gralora.inject(base, CASES[case][1], GraloraConfig(r=4))
    # an attention is put together of its projections, in another order of kernels
    assert relative(base(x), y) < 1e-14 if case == "attention" else same_bits(base(x), y)
    with gralora.disable_adapter(base):
        assert same_bits(base(x), y)
    gralora.unload(base)
    assert_same(fingerprint(base), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_computes_the_same_and_is_undone_bit_for_bit(case, dtype):
    model, x = built(case, dtype)
    y, before = model(x), fingerprint(model)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    gralora.merge(model)
    assert relative(model(x).double(), y.double()) < tolerance
    gralora.unmerge(model)
    assert_same(fingerprint(model), before)
    plain = gralora.merge_and_unload(model)
    assert relative(plain(x).double(), y.double()) < tolerance
    assert not any("gralora" in name for name, _ in plain.named_modules())


@pytest.mark.parametrize("format", ["gralora", "peft", "lora"])
def test_saved_and_loaded_in_every_format_that_can_hold_it(case, format, tmp_path):
    model, x = built(case, torch.float32, hybrid_r=2)
    if format not in CASES[case][3]:
        with pytest.raises(ValueError, match="map"):
            gralora.save_adapter(model, tmp_path / "a", format=format)
        assert not list(tmp_path.iterdir())
        return
    gralora.save_adapter(model, tmp_path / "a", format=format)
    base, _ = built(case, torch.float32, adapt=False)
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert relative(again(x), model(x)) < 1e-5 and relative(base(x), model(x)) > 1e-2


def test_peft_computes_the_same_from_the_lora_folder(case, tmp_path):
    if "lora" not in CASES[case][3] or case == "attention":  # whose out_proj PEFT applies twice
        return
    from .peft_reference import in_peft

    model, x = built(case, torch.float32, hybrid_r=2)
    gralora.save_adapter(model, tmp_path / "a", format="lora")
    base, _ = built(case, torch.float32, adapt=False)
    if case in (
        "read, never called",
        "embedding and head",
    ):  # PEFT's adapters are dead where a weight is read
        assert relative(in_peft(base, tmp_path / "a")(x), model(x)) > 1e-2
    else:
        assert relative(in_peft(base, tmp_path / "a")(x), model(x)) < 1e-5


def test_a_failure_on_the_way_leaves_the_model_as_it_was(case, monkeypatch):
    model, _ = built(case, adapt=False)
    before = fingerprint(model)
    monkeypatch.setattr("gralora.model.inject.record", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gralora.inject(model, CASES[case][1], random_config())
    assert_same(fingerprint(model), before)


def test_copies_pickles_and_models_over_the_same_weights(case):
    model, x = built(case)
    y = model(x)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        gralora.shared_copy(model),
    ):
        assert same_bits(other(x), y)
        with torch.no_grad():
            for parameter in gralora.adapter_parameters(other):
                parameter.mul_(2)
        assert relative(other(x), y) > 1e-2 and same_bits(model(x), y)


def test_two_adapters_weighted_and_threads_that_switch_them_off(case):
    model, x = built(case)
    one = model(x)
    gralora.inject(model, CASES[case][1], random_config(gralora_k=1), adapter_name="other")
    gralora.set_adapter(model, {"default": 0.5, "other": -1.0})
    assert relative(model(x), by_hand(model)(x)) < 1e-12
    gralora.set_adapter(model, "default")
    inside, outside, results = threading.Event(), threading.Event(), {}

    def off():
        with gralora.disable_adapter(model):
            inside.set()
            outside.wait()
            results["off"] = model(x)

    thread = threading.Thread(target=off)
    thread.start()
    inside.wait()
    results["on"] = model(x)
    outside.set()
    thread.join()
    base, _ = built(case, adapt=False)
    assert same_bits(results["on"], one) and same_bits(results["off"], base(x))


def test_built_on_meta_and_loaded(case, tmp_path):
    model, x = built(case, torch.float32)
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        other, _ = built(case, torch.float32, adapt=False)
    gralora.inject(other, CASES[case][1], random_config())
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    assert same_bits(other(x), model(x))


def test_compiled_and_under_autocast(case):
    model, x = built(case)
    compiled = torch.compile(model, backend="aot_eager")
    assert relative(compiled(x), model(x)) < 1e-12
    model, x = built(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert relative(y.float(), model(x)) < 0.05
