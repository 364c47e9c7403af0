"""All or nothing: a failure injected at every call and allocation leaves the model as it was, bit
for bit.
"""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gralora

from ..models import Block, assert_same, fingerprint, random_config, same_bits
from ..needs import parts

PACKAGE = str(Path(gralora.__file__).parent)
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Injected(BaseException):
    """Nothing catches it by mistake."""


class failing_at:
    """Raise `Injected` at the `number`-th call of a function of ours, or by one of ours of a
    built-in one.
    """

    def __init__(self, number):
        self.number, self.count = number, 0

    def _profile(self, frame, event, argument):
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        self.count += 1
        if self.count == self.number:
            sys.setprofile(None)
            code = frame.f_code
            name = code.co_qualname if sys.version_info > (3, 11) else code.co_name
            raise Injected(f"{event} in {name}")

    def __enter__(self):
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.attention = Block(), nn.MultiheadAttention(16, 4, batch_first=True)
        self.conv, self.norm = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return self.block(self.norm(self.conv(x.mT)).mT)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A plain model, one with adapters a (active, with a head and biases) and b, one with both
    merged, and a file.
    """
    torch.manual_seed(0)
    plain = Net().eval()
    config = random_config(alpha=4, bias="gralora_only", modules_to_save=["head", "norm"])
    adapted = gralora.inject(
        copy.deepcopy(plain), ["q", "attention", "conv"], config, adapter_name="a"
    )
    gralora.inject(adapted, ["q", "v", "k_proj"], random_config(r=8, gralora_k=4), adapter_name="b")
    merged = copy.deepcopy(adapted)
    gralora.merge(merged, ["a", "b"])
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    changed = copy.deepcopy(adapted)
    with torch.no_grad():
        for parameter in gralora.adapter_parameters(changed):
            parameter.add_(1)
    gralora.save_adapter(changed, path, "a")
    return {"plain": plain, "adapted": adapted, "merged": merged, "file": path}


OPERATIONS = {
    "inject": (
        "plain",
        lambda m, f: gralora.inject(m, ["q", "attention", "conv"], _config(), adapter_name="a"),
    ),
    "inject a further one": (
        "adapted",
        lambda m, f: gralora.inject(m, ["q", "k", "conv"], _config(), adapter_name="c"),
    ),
    "load": ("plain", lambda m, f: gralora.load_adapter(m, f, "a", trainable=True)),
    "load beside": ("adapted", lambda m, f: gralora.load_adapter(m, f, "c")),
    "swap": ("adapted", lambda m, f: gralora.load_adapter(m, f, "a", trainable=True)),
    "merge": ("adapted", lambda m, f: gralora.merge(m)),
    "merge more": ("merged", lambda m, f: gralora.merge(m, {"a": 0.5, "b": 2.0})),
    "unmerge": ("merged", lambda m, f: gralora.unmerge(m)),
    "set": ("adapted", lambda m, f: gralora.set_adapter(m, {"b": 0.5})),
    "set while merged": ("merged", lambda m, f: gralora.set_adapter(m, "b")),
    "delete": ("adapted", lambda m, f: gralora.delete_adapter(m, "a")),
    "combine": ("adapted", lambda m, f: gralora.combine(m, ["a", "b"], None, "c")),
    "reblock": ("adapted", lambda m, f: gralora.reblock(m, 1, "b")),
    "unload": ("merged", lambda m, f: gralora.unload(m)),
}


def _config():
    return random_config(bias="gralora_only", modules_to_save=["head", "norm"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("part", parts(4))
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failure_at_any_call_changes_nothing(name, part, models):
    start, operation = OPERATIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(models[start])
        y, changes = model(X), fingerprint(model)
        with failing_at(None) as counted:
            operation(model, models["file"])
        with pytest.raises(AssertionError):
            assert_same(fingerprint(model), changes)
        # every one of the first and last, and of the rest as many as take a few seconds
        last, step = counted.count, max(1, counted.count // 400)
        points = sorted({*range(1, 60), *range(60, last, step), *range(last - 60, last)})
        model = copy.deepcopy(models[start])
        before = fingerprint(model)
        for point in points[part::4]:
            try:
                with failing_at(point):
                    operation(model, models["file"])
            except Injected as injected:
                try:
                    assert_same(fingerprint(model), before)
                    assert same_bits(model(X), y)
                except AssertionError as changed:
                    raise AssertionError(
                        f"{injected}, point {point} of {counted.count}"
                    ) from changed
            else:
                model = copy.deepcopy(models[start])  # it was done by then
                before = fingerprint(model)
