"""Adapters of other ranks in the place of one that is there."""

import copy

import pytest
import torch
from torch import nn

import gralora

from ..models import (
    Block,
    assert_same,
    fingerprint,
    mlp,
    pair,
    random_config,
    randomize_,
    relative,
    same_bits,
)


def saved(tmp_path, name="a", base=None, targets="all-linear", **fields):
    """A file of an adapter on `base`, and what the model computes with it."""
    model = gralora.inject(copy.deepcopy(base), targets, random_config(**fields))
    randomize_(model)
    gralora.save_adapter(model, tmp_path / f"{name}.safetensors")
    return tmp_path / f"{name}.safetensors", model


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


def test_room_changes_nothing_and_a_file_of_any_rank_up_to_it_computes_the_same():
    model = gralora.inject(Block(), "all-linear", random_config(hybrid_r=2))
    y, weights = (
        model(X),
        {name: gralora.delta_weight(model.get_submodule(name)) for name in ("q", "head")},
    )
    gralora.prepare_hotswap(model, 12)
    torch.testing.assert_close(model(X), y)
    for name, delta in weights.items():
        torch.testing.assert_close(gralora.delta_weight(model.get_submodule(name)), delta)
        assert model.get_submodule(name).gralora_adapters["default"].config.r == 12
    assert all(p.requires_grad for p in gralora.adapter_parameters(model))
    gralora.check_effect(model, X)


@pytest.mark.parametrize("roomy", [True, False])
def test_in_float64_the_swapped_adapter_is_the_file_s(tmp_path, roomy):
    base = mlp(16, 24, 8, dtype=torch.float64)
    x = torch.randn(4, 16, dtype=torch.float64)
    place = gralora.inject(copy.deepcopy(base), "all-linear", random_config(r=8, hybrid_r=1))
    if roomy:
        gralora.prepare_hotswap(place, 8)
    before = {name: (id(p), p.data_ptr()) for name, p in place.named_parameters()}
    for fields in (
        {"r": 4, "alpha": 3},
        {"r": 2, "hybrid_r": 1},
        {"r": 8, "alpha": 5, "use_rslora": True},
    ):
        path, own = saved(tmp_path, base=base, **fields)
        gralora.load_adapter(place, path)
        assert relative(place(x), base(x)) > 1e-2
        torch.testing.assert_close(place(x), own(x), rtol=1e-12, atol=1e-12)
        gralora.save_adapter(place, tmp_path / "again.safetensors")
        again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "again.safetensors")
        torch.testing.assert_close(again(x), own(x), rtol=1e-12, atol=1e-12)
    assert {name: (id(p), p.data_ptr()) for name, p in place.named_parameters()} == before


def test_compiled_code_stays_valid_over_ranks_scales_and_files_of_fewer_layers(tmp_path):
    from torch._dynamo.testing import CompileCounter

    base = mlp(16, 24, 8)
    model = gralora.inject(copy.deepcopy(base), "all-linear", random_config())
    gralora.prepare_hotswap(model, 16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, 16)
    compiled(x)
    files = [
        {"r": 16},
        {"r": 2, "alpha": 7},
        {"r": 8, "use_rslora": True},
        {"targets": ["2"], "r": 4},
        {"r": 4},
    ]
    for fields in files:
        path, own = saved(tmp_path, base=base, **fields)
        gralora.load_adapter(model, path)
        torch.testing.assert_close(compiled(x), own(x))
    assert counter.frame_count == 1


def test_a_place_that_was_not_made_for_it_takes_only_the_same_layers_and_no_larger_rank(tmp_path):
    base, _ = pair()
    model = gralora.inject(copy.deepcopy(base), ["q", "k"], random_config())
    larger, _ = saved(tmp_path, base=base, targets=["q", "k"], r=8)
    other_k, _ = saved(tmp_path, "k", base=base, targets=["q", "k"], gralora_k=4, r=4)
    fewer, _ = saved(tmp_path, "fewer", base=base, targets=["q"])
    more, _ = saved(tmp_path, "more", base=base, targets=["q", "k", "v"])
    before = fingerprint(model)
    for path, error in (
        (
            larger,
            r"\(2, 8, 8\) there and \(2, 8, 4\) here, of another k or larger. prepare_hotswap",
        ),
        (other_k, r"of another k or larger"),
        (fewer, "on other layers than the file's: k"),
        (more, "on other layers than the file's: v"),
    ):
        with pytest.raises(gralora.AdapterFileError, match=error):
            gralora.load_adapter(model, path)
        assert_same(fingerprint(model), before)
    gralora.prepare_hotswap(model, 8)
    gralora.load_adapter(model, fewer)
    assert (
        not model.k.gralora_adapters["default"].B.any()
        and model.q.gralora_adapters["default"].B.any()
    )
    with pytest.raises(gralora.AdapterFileError, match="on other layers than the file's: v"):
        gralora.load_adapter(model, more)


def test_tied_and_copied_and_pickled_places_stay_places(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = gralora.inject(Tied(), ["embed", "head"], random_config(ensure_weight_tying=True))
    gralora.prepare_hotswap(model, 8)
    assert model.embed.gralora_adapters["default"] is model.head.gralora_adapters["default"]
    torch.save(model.state_dict(), tmp_path / "state")
    copied = copy.deepcopy(model)
    assert copied.embed.gralora_adapters["default"].roomy
    assert same_bits(copied(torch.arange(4)), model(torch.arange(4)))


def test_what_does_not_fit_is_told_and_leaves_the_model_unchanged():
    model = gralora.inject(Block(), ["q"], random_config(r=8, gralora_k=4))
    before = fingerprint(model)
    for wrong in (4, 10):
        with pytest.raises(
            ValueError, match=f"max_r={wrong} does not fit 'q', of r=8 and gralora_k=4"
        ):
            gralora.prepare_hotswap(model, wrong)
    with pytest.raises(TypeError, match="max_r=16.0 is a float"):
        gralora.prepare_hotswap(model, 16.0)
    with pytest.raises(KeyError, match="no adapter 'b'"):
        gralora.prepare_hotswap(model, 16, "b")
    assert_same(fingerprint(model), before)
    gralora.merge(model)
    with pytest.raises(ValueError, match="is merged"):
        gralora.prepare_hotswap(model, 16)
