"""The tensor that stands for a sum, made by hand; how layers use it is in `test_unevaluated`."""

import pytest
import torch

from gralora.layers.stand_in import UnevaluatedWeight
from gralora.layers.sums import sum_of_one
from gralora.layers.unevaluated import unevaluated

from ..models import relative
from .test_sums import one


def standing(**kwargs):
    weight, shares = one(**kwargs)
    for tensors, _, _ in shares:
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_()
    return unevaluated(sum_of_one(weight, shares, False)), weight, shares


def test_it_looks_like_the_weight_and_is_the_sum():
    stand_in, weight, _ = standing()
    assert type(stand_in) is UnevaluatedWeight
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda"):
        assert getattr(stand_in, name) == getattr(weight, name)
    assert (
        stand_in.stride() == weight.stride()
        and len(stand_in) == len(weight)
        and stand_in.requires_grad
    )
    assert stand_in.computed == {}
    assert relative(stand_in + 0, weight) > 0.1
    assert torch.equal(stand_in + 0, stand_in.dense()) and "UnevaluatedWeight(tensor" in repr(
        stand_in
    )


def test_gradients_reach_a_and_b_through_what_does_not_know_it():
    stand_in, _, shares = standing()
    torch.ops.aten.mul.Tensor(stand_in, 2.0).sum().backward()
    again, _, others = standing()
    (again * 2).sum().backward()
    assert relative(shares[0][0][0].grad, others[0][0][0].grad) < 1e-12
    bare = stand_in.detach()
    assert not bare.requires_grad and torch.equal(bare * 1, stand_in.dense().detach())


@pytest.mark.parametrize(
    "edit",
    [lambda w: w.add_(1), lambda w: w.__setitem__(0, 1.0), lambda w: torch.ops.aten.zero_(w)],
)
def test_it_is_not_edited(edit):
    with pytest.raises(RuntimeError, match="edited in place while a forward runs"):
        edit(standing()[0])
