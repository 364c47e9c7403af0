"""Starts out of data."""

import copy

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

import gralora
from gralora.layers.base import gralora_layers

from ..models import Block, Experts, assert_same, fingerprint, llama, mlp, same_bits

CONFIG = gralora.GraloraConfig(r=8, gralora_k=2, alpha=8)


def batches(count=4, shape=(3, 5, 16), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(3, 0.2, shape[-1], dtype=dtype)
    return [torch.randn(shape, generator=generator, dtype=dtype) * scale for _ in range(count)]


def squared(model, x):
    return model(x).square().mean()


def inputs_of(model, data):
    """What every adapted layer gets, as rows; of the plain model."""
    seen: dict[str, list[torch.Tensor]] = {}
    plain = gralora.unload(copy.deepcopy(model)).eval()
    for name, _ in gralora_layers(model):
        layer = plain.get_submodule(name)
        layer.register_forward_hook(
            lambda m, args, out, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
    with torch.no_grad():
        for x in data:
            plain(x)
    return {name: torch.cat([x.flatten(0, -2) for x in own]) for name, own in seen.items()}


def rows_of(adapter):
    """A as the rows of block (i, j): (j, i, s, m)."""
    return rearrange(adapter.A.detach(), "i m (j s) -> j i s m", j=len(adapter.B))


def test_eva_begins_with_the_leading_directions_of_a_full_svd_of_the_activations():
    model = gralora.inject(Block().double(), "all-linear", CONFIG)
    x, y = batches(1)[0], model(batches(1)[0])
    gralora.initialize(model, "eva", batches())
    assert same_bits(model(x), y)
    seen = inputs_of(model, batches())
    for name, layer in gralora_layers(model):
        found = rows_of(layer.gralora_adapters["default"])
        assert torch.equal(found[0], found[1])
        for i, block in enumerate(seen[name].chunk(2, dim=-1)):
            V = torch.linalg.svd(block, full_matrices=False).Vh[:4]
            torch.testing.assert_close(
                (found[0, i] * V).sum(-1).abs(),
                torch.ones(4, dtype=torch.float64),
                atol=1e-4,
                rtol=0,
            )


def test_gradient_begins_with_the_leading_right_directions_of_each_block_of_the_full_gradient():
    model = gralora.inject(Block().double(), "all-linear", CONFIG)
    x, y = batches(1)[0], model(batches(1)[0])
    gralora.initialize(model, "gradient", batches(), forward=squared)
    assert same_bits(model(x), y) and all(p.grad is None for p in model.parameters())
    plain = gralora.unload(copy.deepcopy(model)).eval().requires_grad_(True)
    for batch in batches():
        squared(plain, batch).backward()
    for name, layer in gralora_layers(model):
        found = rows_of(layer.gralora_adapters["default"])
        blocks = rearrange(
            plain.get_submodule(name).weight.grad, "(j o) (i m) -> j i o m", j=2, i=2
        )
        V = torch.linalg.svd(blocks, full_matrices=False).Vh[:, :, :4]
        found = found[
            :, :, : V.shape[2]
        ]  # the head has fewer outputs, and its blocks so fewer directions
        ones = torch.ones(found.shape[:-1], dtype=torch.float64)
        torch.testing.assert_close((found * V).sum(-1).abs(), ones, atol=1e-4, rtol=0)


def test_the_first_step_follows_the_full_gradient_as_far_as_the_rank_allows():
    model = gralora.inject(
        mlp(16, 16, dtype=torch.float64), ["0"], gralora.GraloraConfig(r=8, gralora_k=2, alpha=8)
    )
    data = batches(1, (64, 16))
    plain = copy.deepcopy(gralora.unload(copy.deepcopy(model))).requires_grad_(True)
    squared(plain, data[0]).backward()
    wanted = -plain[0].weight.grad
    share = {}
    for start in ("uniform", "gradient"):
        tried = copy.deepcopy(model)
        if start == "gradient":
            gralora.initialize(tried, "gradient", data, forward=squared)
        squared(tried, data[0]).backward()
        torch.optim.SGD(gralora.adapter_parameters(tried), lr=1e-3).step()
        delta = gralora.delta_weight(tried[0])
        share[start] = F.cosine_similarity(delta.flatten(), wanted.flatten(), dim=0).item()
    S = torch.linalg.svdvals(rearrange(wanted, "(j o) (i m) -> j i o m", j=2, i=2))
    best = (S[..., :4].square().sum() / S.square().sum()).sqrt().item()
    assert share["gradient"] == pytest.approx(best, abs=1e-3)
    assert share["uniform"] < best - 0.05


@pytest.mark.parametrize("method", ["eva", "gradient"])
def test_the_same_on_every_run_with_hybrid_pairs_and_as_a_second_adapter(method):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = gralora.inject(Block(), ["q"], gralora.GraloraConfig(r=4), adapter_name="first")
        config = gralora.GraloraConfig(r=4, hybrid_r=3, gralora_k=2)
        gralora.inject(model, "all-linear", config, adapter_name="second")
        before = fingerprint(model)
        data = batches(2, dtype=torch.float32)
        gralora.initialize(model, method, data, adapter_name="second", forward=squared)
        now = fingerprint(model)
        assert {k: v for k, v in now.items() if k != "tensors"} == {
            k: v for k, v in before.items() if k != "tensors"
        }
        changed = {k for k, t in before["tensors"].items() if not torch.equal(t, now["tensors"][k])}
        assert changed and all(".second.A" in key for key in changed)
        found.append(gralora.adapter_state_dict(model, "second"))
        general = model.q.gralora_adapters["second"].A_general
        torch.testing.assert_close(general @ general.T, torch.eye(3), atol=1e-5, rtol=0)
    assert all(same_bits(a, found[1][key]) for key, a in found[0].items())


@pytest.mark.parametrize("start", ["orthogonal", "eva", "gradient", "eva, ranks"])
def test_gradcheck_through_every_start(start):
    config = gralora.GraloraConfig(
        r=4, gralora_k=2, hybrid_r=1, init_weights="orthogonal" if start == "orthogonal" else True
    )
    model = gralora.inject(mlp(6, 8, 4, dtype=torch.float64), "all-linear", config)
    if start != "orthogonal":
        data, method = batches(3, (5, 6)), start.partition(",")[0]
        gralora.initialize(model, method, data, forward=squared, redistribute="ranks" in start)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    parameters = gralora.adapter_parameters(model)

    def run(x, *_):
        return model(x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_convolutions_attentions_heads_that_are_read_and_gpt2s_layers_get_their_rows():
    torch.manual_seed(0)
    conv = gralora.inject(nn.Conv2d(4, 8, 3, stride=2, padding=1).double(), "", CONFIG)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    gralora.initialize(conv, "gradient", [x], forward=squared)
    plain = gralora.unload(copy.deepcopy(conv)).requires_grad_(True)
    squared(plain, x).backward()
    V = torch.linalg.svd(
        rearrange(plain.weight.grad.flatten(1), "(j o) (i m) -> j i o m", j=2, i=2),
        full_matrices=False,
    ).Vh
    found = rows_of(conv.gralora_adapters["default"])
    torch.testing.assert_close(
        (found * V).sum(-1).abs(), torch.ones(2, 2, 4, dtype=torch.float64), atol=1e-4, rtol=0
    )

    attention = gralora.inject(
        nn.MultiheadAttention(16, 2, batch_first=True), "", gralora.GraloraConfig(r=4)
    )
    x = torch.randn(3, 5, 16)
    gralora.initialize(attention, "eva", [(x, x, x)])
    V = torch.linalg.svd(x.reshape(-1, 16)[:, :8], full_matrices=False).Vh[:2]
    found = rows_of(attention.gralora_q_proj.gralora_adapters["default"])
    torch.testing.assert_close((found[0, 0] * V).sum(-1).abs(), torch.ones(2), atol=1e-4, rtol=0)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 16, bias=False)

        def forward(self, x):
            return F.cross_entropy(
                F.linear(self.body(x), self.head.weight), torch.zeros(len(x), dtype=torch.long)
            )

    reads = gralora.inject(Reads(), ["body", "head"], gralora.GraloraConfig(r=4))
    gralora.initialize(reads, "gradient", [torch.randn(6, 8)])
    assert gralora.check_effect(reads, torch.randn(6, 8))


def test_a_language_model_with_labels_needs_no_forward_over_a_quantised_base():
    model = gralora.inject(llama(), "all-linear", gralora.GraloraConfig(r=4))
    tokens = torch.arange(24).reshape(2, 12)
    gralora.initialize(model, "gradient", [{"input_ids": tokens, "labels": tokens}])
    gralora.check_effect(model, tokens)

    class Packed(nn.Linear):  # as a quantised layer: its weight can't have a gradient
        def __init__(self):
            super().__init__(8, 8)
            self.weight = nn.Parameter(torch.randint(-8, 8, (8, 8)), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight.float() / 8, self.bias)

    packed = gralora.inject(
        nn.Sequential(Packed(), nn.Tanh(), Packed()), "all-linear", gralora.GraloraConfig(r=4)
    )
    gralora.initialize(packed, "gradient", [torch.randn(5, 8)], forward=squared)
    norms = rows_of(packed[0].gralora_adapters["default"]).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_under_checkpointing_each_token_counts_once():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.up, self.reentrant = nn.Linear(16, 16), reentrant

        def forward(self, x):
            if self.reentrant is None:
                return self.up(x)
            return torch.utils.checkpoint.checkpoint(self.up, x, use_reentrant=self.reentrant)

    found = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        model = gralora.inject(Checkpointed(reentrant).double(), ["up"], CONFIG)
        gralora.initialize(model, "gradient", batches(), forward=squared)
        found.append(rows_of(model.up.gralora_adapters["default"]))
    torch.testing.assert_close(found[0], found[1])


def test_ranks_go_where_a_direction_holds_most_at_no_more_parameters_and_scalings_stay():
    model = mlp(16, 32, 16, 8, dtype=torch.float64)
    gralora.inject(
        model, "all-linear", gralora.GraloraConfig(r=8, gralora_k=2, alpha=3, use_rslora=True)
    )
    before = sum(p.numel() for p in gralora.adapter_parameters(model))
    scaling, narrow = (
        model[0].gralora_adapters["default"].config.scaling,
        torch.zeros(16, dtype=torch.float64),
    )
    narrow[:2], narrow[8:10] = (
        1.0,
        1.0,
    )  # each half of the first layer's input has two directions and no more
    data = [torch.randn(50, 16, dtype=torch.float64) * (narrow + 1e-6) for _ in range(3)]
    y = model(data[0])
    gralora.initialize(model, "eva", data, redistribute=True)
    configs = [layer.gralora_adapters["default"].config for _, layer in gralora_layers(model)]
    assert (
        configs[0].r == 4
        and max(c.r for c in configs) > 8
        and all(c.r <= 16 and c.r % 2 == 0 for c in configs)
    )
    after = sum(p.numel() for p in gralora.adapter_parameters(model))
    assert before - 2 * (16 + 32) < after <= before
    assert [c.scaling for c in configs] == pytest.approx([scaling] * 3)
    torch.testing.assert_close(model(data[0]), y)
    assert all(p.requires_grad for p in gralora.adapter_parameters(model))


def test_where_there_are_fewer_directions_than_ranks_the_rest_stays():
    model = gralora.inject(nn.Linear(4, 64), "", gralora.GraloraConfig(r=16, gralora_k=2))
    before = rows_of(model.gralora_adapters["default"]).clone()
    gralora.initialize(model, "eva", [torch.randn(9, 4)])
    now = rows_of(model.gralora_adapters["default"])
    assert torch.equal(now[:, :, 2:], before[:, :, 2:]) and not torch.equal(
        now[:, :, :2], before[:, :, :2]
    )


def test_layers_out_of_reach_are_named_and_stay_as_they_are():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), Experts())
    gralora.inject(model, ["0", "up"], gralora.GraloraConfig(r=4))
    before = model[1].gralora_up.gralora_adapters["default"].A.clone()
    with pytest.warns(UserWarning, match=r"1 of 2 layers start as they were: '?1\.up"):
        gralora.initialize(model, "eva", batches(1, (3, 8)))
    assert torch.equal(model[1].gralora_up.gralora_adapters["default"].A, before)
    only = gralora.inject(Experts(), ["up"], gralora.GraloraConfig(r=4))
    with pytest.raises(ValueError, match="on no layer whose inputs are rows"):
        gralora.initialize(only, "eva", batches(1, (3, 8)))


def test_what_can_not_be_is_told_and_leaves_the_model_unchanged():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model = gralora.inject(Branch().double(), ["used"], CONFIG)
    both = gralora.inject(Branch().double(), ["used", "unused"], CONFIG)
    trained = gralora.inject(Branch().double(), ["used"], CONFIG)
    nn.init.ones_(trained.used.gralora_adapters["default"].B)
    merged = gralora.inject(Branch().double(), ["used"], CONFIG)
    gralora.merge(merged)
    x, nan = batches(1)[0], [torch.full((2, 16), torch.nan, dtype=torch.float64)]
    loss = {"forward": squared}
    for who, method, data, more, error in (
        (model, "pissa", [x], {}, "method='pissa' is not known; there are: 'eva', 'gradient'"),
        (model, "eva", None, {}, "needs data: batches must be an iterable"),
        (model, "eva", "x", {}, "needs data"),
        (model, "eva", [], {}, "batches is empty"),
        (model, "gradient", [x], {"redistribute": True}, 'redistribute is for "eva"'),
        (model, "gradient", [x], {}, "returns no loss"),
        (
            model,
            "gradient",
            [x],
            {"forward": lambda m, b: b.sum()},
            "give no gradient: the loss does not depend",
        ),
        (
            model,
            "gradient",
            [x],
            {"forward": lambda m, b: m(b).sum() * 0},
            "1 of 1 layers get no gradient .*used",
        ),
        (
            both,
            "eva",
            [x],
            {},
            "1 of 2 layers get no input, or only zeros, from these batches: unused",
        ),
        (both, "gradient", [x], loss, "1 of 2 layers get no gradient from these batches: unused"),
        (model, "eva", nan, {}, "is not finite at used"),
        (trained, "eva", [x], {}, "B of 'used' is not zero"),
        (merged, "eva", [x], {}, "is merged"),
    ):
        before = fingerprint(who)
        with pytest.raises(ValueError, match=error):
            gralora.initialize(who, method, data, **more)
        assert_same(fingerprint(who), before)
    with pytest.raises(KeyError, match="no adapter 'other'"):
        gralora.initialize(model, "eva", [x], adapter_name="other")
    with pytest.raises(ValueError, match=r"Starts from data are for initialize"):
        gralora.GraloraConfig(init_weights="eva")
