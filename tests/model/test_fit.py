"""Adapters fitted to an update, and ranks given as a share of its squared norm."""

import pytest
import torch
from einops import rearrange

import gralora
from gralora.maths import functional
from gralora.model.fit import is_share, rank_for

from ..models import Experts, mlp, random_config, randomize_

SHARES = (0.3, 0.8, 0.95, 0.999)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_smallest_rank_keeps_the_share_and_the_one_below_does_not(share, k):
    delta = torch.randn(16, 24, dtype=torch.float64)
    r = rank_for(delta, share, k, 0)
    assert r % k == 0
    blocks = rearrange(delta, "(j o) (i m) -> j i o m", j=k, i=k)
    S = torch.linalg.svdvals(blocks).square()
    kept = [S[..., : each // k].sum() / S.sum() for each in (r - k, r)]
    assert kept[0] < share <= kept[1]


def test_a_number_is_itself_and_none_is_the_default():
    delta = torch.randn(4, 4)
    assert (rank_for(delta, 3, 1, 7), rank_for(delta, None, 1, 7)) == (3, 7)
    assert rank_for(torch.zeros(8, 8), 0.9, 2, 7) == 2
    for wrong in (0.0, 1.0, -0.5, 2.5, float("nan")):
        with pytest.raises(ValueError, match="a share of the squared norm between 0 and 1"):
            is_share(wrong)


@pytest.mark.parametrize("share", SHARES)
def test_of_a_pair_it_is_found_without_the_product(share):
    down, up = torch.randn(6, 20, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    S = torch.linalg.svdvals(up @ down).square()
    r = functional.pair_rank_of_share(down, up, share)
    assert S[:r].sum() / S.sum() >= share > (S[: r - 1].sum() / S.sum() if r > 1 else 0)


def model_of(dtype=torch.float64):
    model = mlp(24, 48, 24, dtype=dtype)
    gralora.inject(model, "all-linear", random_config(r=8, gralora_k=4, alpha=3), adapter_name="a")
    gralora.inject(model, "all-linear", random_config(r=4, hybrid_r=2), adapter_name="b")
    randomize_(model)
    with torch.no_grad():
        model[0].gralora_adapters["a"].B[:, 1:].mul_(
            1e-3
        )  # so that the first layer needs fewer ranks
    return model


@pytest.mark.parametrize("share", SHARES)
def test_combine_and_reblock_give_each_layer_the_rank_that_keeps_the_share(share):
    model, errors = model_of(), {}
    gralora.combine(
        model, {"a": 1.0, "b": 0.1}, None, "new", "svd", r=share, gralora_k=2, errors=errors
    )
    ranks = [model[i].gralora_adapters["new"].config.r for i in (0, 2)]
    assert all(error**2 <= 1 - share + 1e-9 for error in errors.values()) and all(
        r % 2 == 0 for r in ranks
    )
    only, errors = model_of(), {}
    gralora.reblock(only, 2, "a", r=share, errors=errors)
    ranks = [only[i].gralora_adapters["a"].config.r for i in (0, 2)]
    assert all(error**2 <= 1 - share + 1e-9 for error in errors.values())
    assert ranks[0] < ranks[1] or share < 0.5
    torch.testing.assert_close(
        gralora.delta_weight(only[2], "a"),
        gralora.delta_weight(model_of()[2], "a"),
        atol=10.0,
        rtol=0,
    )


@pytest.mark.parametrize("format", ["lora", "mlx"])
def test_plain_lora_is_cut_to_the_share_layer_by_layer(format, tmp_path):
    model, errors = model_of(torch.float32), {}
    gralora.set_adapter(model, "a")
    before = {i: gralora.delta_weight(model[i], "a").detach() for i in (0, 2)}
    gralora.save_adapter(model, tmp_path / "out", "a", format=format, rank=0.95, errors=errors)
    gralora.load_adapter(model, tmp_path / "out", "again")
    pairs = gralora.to_lora(model, "a", 0.95)
    for i in (0, 2):
        delta = gralora.delta_weight(model[i], "again").detach()
        off = ((delta - before[i]).norm() / before[i].norm()).item()
        assert off**2 <= 0.05 and off == pytest.approx(errors[str(i)], abs=1e-5)
        r = model[i].gralora_adapters["again"].config.r
        assert pairs[f"{i}.lora_A.weight"].shape[0] == r or format == "mlx"
        S = torch.linalg.svdvals(before[i]).square()
        assert S[: pairs[f"{i}.lora_A.weight"].shape[0] - 1].sum() / S.sum() < 0.95


def test_experts_of_one_weight_get_one_rank():
    model, errors = gralora.inject(Experts(), ["up"], random_config()), {}
    pairs = gralora.to_lora(model, rank=0.9, errors=errors)
    assert all(error**2 <= 0.1 + 1e-9 for error in errors.values())
    assert 1 <= pairs["up.lora_A.weight"].shape[1] < 8
    for wrong in (1.0, 0.0, 1.5):
        with pytest.raises(ValueError, match="a share of the squared norm between 0 and 1"):
            gralora.to_lora(model, rank=wrong)
