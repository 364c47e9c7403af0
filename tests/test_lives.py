"""Random lives of an adapted model, against a plain model of what its weights should be: W + Σ
weight * ΔW.

GRALORA_RUNS=2000 python -m pytest tests/test_states.py      the full run
"""

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers
from gralora.layers.linear import Conv1D

from .models import same_bits

NAMES = st.sampled_from(["a", "b", "a_b"])
WEIGHTS = st.sampled_from([1.0, 0.5, -2.0])
CONFIGS = st.sampled_from([(2, 1, 0), (4, 2, 0), (4, 4, 1), (2, 2, 2)])
LAYERS = {"fc": (8, 8), "gpt": (8, 8), "conv": (8, 8), "q_proj": (8, 8), "out_proj": (8, 8)}
TARGETS = st.lists(st.sampled_from(list(LAYERS)), min_size=1, unique=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gpt, self.conv = nn.Linear(8, 8), Conv1D(8, 8), nn.Conv1d(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = torch.tanh(self.conv(self.gpt(self.fc(x)).mT).mT)
        return self.attention(x, x, x, need_weights=False)[0]


def delta(A, B, A_general, B_general, scaling):
    """ΔW (out, in), block by block as the paper writes it."""
    k, m, r = A.shape
    o, s = B.shape[2], r // k
    rows = []
    for j in range(k):
        blocks = [B[j][i * s : (i + 1) * s].T @ A[i][:, j * s : (j + 1) * s].T for i in range(k)]
        assert blocks[0].shape == (o, m)
        rows.append(torch.cat(blocks, dim=1))
    total = torch.cat(rows)
    return scaling * (total if A_general is None else total + B_general @ A_general)


class Lives(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Net().double()
        self.plain = copy.deepcopy(self.model).requires_grad_(False)
        self.x = torch.randn(3, 4, 8, dtype=torch.float64)
        self.adapters, self.active, self.merged, self.trained = {}, {}, {}, set()  # the shadow
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    def _read(self, name):
        """The values that an adapter has now, of its own."""
        found = {}
        for path, layer in gralora_layers(self.model):
            if name in layer.gralora_adapters:
                adapter = layer.gralora_adapters[name]
                values = [None if t is None else t.detach().clone() for t in adapter.tensors]
                found[path.rpartition(".")[2]] = (
                    values,
                    adapter.config.alpha / (adapter.config.r + adapter.config.hybrid_r),
                )
        return found

    def _has_room(self, name, source):
        """Whether the values of `source` fit in the place of `name`: the same layers and k, no
        larger ranks.
        """
        here, there = self.adapters[name], self.adapters[source]
        if here.keys() != there.keys():
            return False
        pairs = [(here[layer][0], there[layer][0]) for layer in here]
        general = [tuple(0 if t[2] is None else t[2].shape[0] for t in pair) for pair in pairs]
        same_k = all(own[0].shape[0] == other[0].shape[0] for own, other in pairs)
        ranks = [(own[0].shape[-1], other[0].shape[-1]) for own, other in pairs]
        return same_k and all(mine >= given for mine, given in (*ranks, *general))

    def _expected(self):
        shares = {**self.active, **self.merged}
        change = dict.fromkeys(LAYERS, 0)
        for name, share in shares.items():
            for layer, (values, scaling) in self.adapters[name].items():
                change[layer] = change[layer] + share * delta(*values, scaling)
        weights = {
            "fc.weight": self.plain.fc.weight + change["fc"],
            "gpt.weight": self.plain.gpt.weight
            + (change["gpt"] if isinstance(change["gpt"], int) else change["gpt"].T),
            "conv.weight": self.plain.conv.weight
            + (
                0
                if isinstance(change["conv"], int)
                else change["conv"].view_as(self.plain.conv.weight)
            ),
            "attention.out_proj.weight": self.plain.attention.out_proj.weight + change["out_proj"],
        }
        packed = self.plain.attention.in_proj_weight
        q = packed[:8] + change["q_proj"]
        weights["attention.in_proj_weight"] = torch.cat([q, packed[8:]])
        return torch.func.functional_call(self.plain, weights, (self.x,))

    @rule(name=NAMES, where=TARGETS, config=CONFIGS)
    def inject(self, name, where, config):
        r, k, hybrid_r = config
        config = GraloraConfig(r=r, gralora_k=k, hybrid_r=hybrid_r, alpha=3, init_weights=False)
        if name in self.adapters:
            with pytest.raises(ValueError, match="is in this model already"):
                gralora.inject(self.model, where, config, adapter_name=name)
            return
        first = not self.adapters
        gralora.inject(self.model, where, config, adapter_name=name)
        self.adapters[name] = self._read(name)
        assert set(self.adapters[name]) == set(where)
        if first:
            self.active, self.trained = {name: 1.0}, {name}

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), as_list=st.booleans())
    def activate(self, data, as_list):
        names = data.draw(st.lists(st.sampled_from(sorted(self.adapters)), unique=True))
        weights = {name: 1.0 if as_list else data.draw(WEIGHTS) for name in names}
        gralora.set_adapter(self.model, names if as_list else weights)
        self.active, self.merged, self.trained = weights, {}, set(names)

    @rule()
    def disable(self):
        with gralora.disable_adapter(self.model):
            torch.testing.assert_close(
                self.model(self.x), self.plain(self.x), rtol=1e-12, atol=1e-12
            )

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), how=st.sampled_from(["active", "names", "weights"]))
    def merge(self, data, how):
        if how == "active":
            names, shares = None, dict(self.active)
        else:
            names = data.draw(st.lists(st.sampled_from(sorted(self.adapters)), unique=True))
            shares = {name: self.active.get(name, 1.0) for name in names}
            if how == "weights":
                names = shares = {name: data.draw(WEIGHTS) for name in names}
        gralora.merge(self.model, names)
        if how == "weights":
            self.merged.update(shares)
        else:  # what is merged stays as it is, layer by layer: so only what is new counts
            self.merged = {**shares, **self.merged}

    @rule()
    def unmerge(self):
        gralora.unmerge(self.model)
        self.merged = {}

    @precondition(lambda self: self.trained and not self.merged)
    @rule()
    def train(self):
        leaves = [
            t.requires_grad_()
            for name in self.trained
            for values, _ in self.adapters[name].values()
            for t in values
            if t is not None
        ]
        gradients = torch.autograd.grad(self._expected().square().mean(), leaves)
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.requires_grad_(False).sub_(0.1 * gradient)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        assert len(parameters) == len(leaves)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        self.model(self.x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), name=NAMES)
    def save_and_load(self, data, name):
        source = data.draw(st.sampled_from(sorted(self.adapters)))
        path = Path(self.folder.name) / "adapter.safetensors"
        gralora.save_adapter(self.model, path, source)
        if name in self.adapters:
            if name in self.merged or not self._has_room(name, source):
                with pytest.raises(gralora.AdapterFileError):
                    gralora.load_adapter(self.model, path, name)
                return
        gralora.load_adapter(self.model, path, name)
        if not self.adapters:
            self.active = {name: 1.0}
        self.trained.discard(name)
        before, self.adapters[name] = self.adapters[source], self._read(name)
        for layer, (values, scaling) in before.items():
            now = self.adapters[name][layer]
            torch.testing.assert_close(delta(*now[0], now[1]), delta(*values, scaling))

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        if name in self.merged:
            with pytest.raises(ValueError, match="is merged"):
                gralora.delete_adapter(self.model, name)
            return
        gralora.delete_adapter(self.model, name)
        del self.adapters[name]
        self.active.pop(name, None)
        self.trained.discard(name)

    @precondition(lambda self: len(self.adapters) == 2)
    @rule()
    def combine(self):
        new = next(name for name in ("a", "b", "a_b") if name not in self.adapters)
        weights = dict(zip(self.adapters, (0.5, -1.0), strict=True))
        gralora.combine(self.model, weights, None, new)
        self.adapters[new] = self._read(new)
        for layer, (values, scaling) in self.adapters[new].items():
            parts = [
                (s, self.adapters[n][layer])
                for n, s in weights.items()
                if layer in self.adapters[n]
            ]
            total = sum(s * delta(*own, scale) for s, (own, scale) in parts)
            torch.testing.assert_close(delta(*values, scaling), total, rtol=1e-10, atol=1e-10)

    @rule(how=st.sampled_from(["deepcopy", "shared_copy"]))
    def copied(self, how):
        before = self.model
        y, state = before(self.x), {key: t.clone() for key, t in before.state_dict().items()}
        self.model = copy.deepcopy(before) if how == "deepcopy" else gralora.shared_copy(before)
        gralora.unload(copy.deepcopy(before))
        assert same_bits(before(self.x), y)
        assert all(same_bits(before.state_dict()[key], t) for key, t in state.items())

    @rule()
    def unload(self):
        gralora.unload(self.model)
        self.adapters, self.active, self.merged, self.trained = {}, {}, {}, set()
        assert {type(m) for m in self.model.modules()} == {type(m) for m in self.plain.modules()}
        for (key, mine), (_, base) in zip(
            self.model.named_parameters(), self.plain.named_parameters(), strict=True
        ):
            assert same_bits(mine, base), key

    @invariant()
    def is_as_it_should_be(self):
        assert set(gralora.adapter_names(self.model)) == set(self.adapters)
        with torch.no_grad():
            torch.testing.assert_close(self.model(self.x), self._expected(), rtol=1e-8, atol=1e-9)
        for path, layer in gralora_layers(self.model):
            owner, name = layer.map.place
            base = getattr(self.plain.get_submodule(self._path(owner)), name)
            assert same_bits(layer.map.base_matrix(), layer.map.matrix(base)), path
        if self.adapters:
            trained = {
                name
                for name in self.adapters
                if all(p.requires_grad for p in gralora.adapter_parameters(self.model, name))
            }
            assert trained == self.trained
            assert not any(
                p.requires_grad for n, p in self.model.named_parameters() if "gralora_" not in n
            )

    def _path(self, owner):
        return next(path for path, module in self.model.named_modules() if module is owner)


runs = int(os.environ.get("GRALORA_RUNS", "60"))
TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=runs,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
