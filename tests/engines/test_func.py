"""`torch.func` over whole models; single layers are in `test_autograd.py`."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import gralora

from ..models import Block, Everything, mlp, random_config, relative

pytestmark = [  # of torch's own
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
X, V = (
    torch.randn(5, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for seed in (0, 1)
)
TARGETS = {
    "block": (Block, "all-linear"),
    "every kind": (Everything, r"block\.(q|mlp\.0)|attention|conv1?d?|experts\.up|embed"),
}


@pytest.fixture(params=TARGETS)
def model(request):
    make, targets = TARGETS[request.param]
    return gralora.inject(make().double().eval(), targets, random_config(hybrid_r=2))


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_per_sample_gradients_equal_those_of_one_sample_at_a_time(model):
    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(trained(model), X)
    for index, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad.abs().sum() > 0
                torch.testing.assert_close(found[name][index], p.grad, rtol=1e-9, atol=1e-9)


def test_functional_call_takes_other_values_and_leaves_the_model_alone(model):
    y, other = model(X), {name: torch.randn_like(p) for name, p in trained(model).items()}
    replaced = functional_call(model, other, (X,))
    assert relative(replaced, y) > 1e-2
    torch.testing.assert_close(model(X), y)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in other:
                p.copy_(other[name])
    torch.testing.assert_close(model(X), replaced)


def test_forward_mode_equals_reverse_mode(model):
    parameters = trained(model)
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # torch's others have no forward mode
        _, tangent = jvp(loss, (parameters, X), (directions, V))
    by_parameters, by_x = grad(loss, argnums=(0, 1))(parameters, X)
    expected = (by_x * V).sum() + sum(
        (g * directions[name]).sum() for name, g in by_parameters.items()
    )
    assert expected.abs() > 1e-3
    torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)


def test_jacobian_and_hessian():
    model = gralora.inject(mlp(6, 8, 4).double(), "all-linear", random_config(r=2))
    x = X[0, 0, :6]
    jacobian = jacrev(model)(x)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(model, x))
    curvature = hessian(lambda x: model(x).pow(3).sum())(x)
    torch.testing.assert_close(
        curvature, torch.autograd.functional.hessian(lambda x: model(x).pow(3).sum(), x)
    )
    assert curvature.abs().sum() > 0


def test_an_ensemble_of_adapters_by_vmap():
    models = [
        gralora.inject(mlp(16, 32, 16).double(), "all-linear", random_config()) for _ in range(3)
    ]
    parameters, buffers = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (X,)))(parameters, buffers)
    for one, y in zip(models, found):
        torch.testing.assert_close(y, one(X))


def test_per_sample_gradients_with_dropout_draw_for_every_sample():
    model = gralora.inject(
        nn.Sequential(nn.Linear(16, 4)).double(), "all-linear", random_config(gralora_dropout=0.5)
    )

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).square().sum()

    same = X[:1, 0].repeat(4, 1)
    found = vmap(grad(loss), in_dims=(None, 0), randomness="different")(trained(model), same)
    assert all(relative(g[0], g[1]) > 1e-3 for g in found.values())
