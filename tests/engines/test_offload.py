"""`accelerate`: weights kept elsewhere, put on before and after `inject`; `Accelerator.prepare`."""

import copy
import os

import pytest
import torch
from torch import nn

import gralora

from ..models import Experts, gpt2, random_config, relative, same_bits, ten_losses
from ..needs import needs

accelerate = needs("accelerate")

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


class Model(nn.Module):
    """Layers that are called, experts whose weights are read, a head and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(8, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv, self.experts, self.head = (
            nn.Conv1d(16, 8, 3, padding=1),
            Experts(dtype=None),
            nn.Linear(12, 4),
        )

    def forward(self, x):
        x = x + self.embed(torch.zeros(1, dtype=torch.long)) + self.down(torch.tanh(self.up(x)))
        return self.head(self.experts(self.conv(x.mT).mT))


def model():
    torch.manual_seed(0)
    return Model().eval()


def adapt(model, **config):
    gralora.inject(
        model, r"up|down|conv|experts\.up", random_config(alpha=4, **config), adapter_name="a"
    )
    gralora.inject(model, ["up"], random_config(gralora_k=4), adapter_name="b")
    return model


WAYS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(
        model, folder, execution_device="cpu"
    ),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model,
        {
            "embed": "cpu",
            "up": "cpu",
            "down": "disk",
            "conv": "disk",
            "experts": "disk",
            "head": "cpu",
        },
        main_device="cpu",
        offload_dir=folder,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize("when", ["hooks before inject", "hooks after inject"])
@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_computes_and_trains_as_one_in_memory(way, when, tmp_path):
    # frozen, since a product of torch's is another one, to the last bit, where a gradient is asked
    # of a factor
    free, base, near, far = model()(X), model().requires_grad_(False)(X), adapt(model()), model()
    if when == "hooks before inject":
        WAYS[way](far, tmp_path)
        adapt(far)
    else:
        adapt(far)
        WAYS[way](far, tmp_path)
    assert far.down.weight.is_meta and not any(p.is_meta for p in gralora.adapter_parameters(far))
    for name in "ab":
        gralora.load_adapter_state_dict(far, gralora.adapter_state_dict(near, name), name)
    for names in ("a", {"a": 0.5, "b": 2.0}, "b", "a"):
        gralora.set_adapter(near, names)
        gralora.set_adapter(far, names)
        assert relative(near(X), base) > 1e-3
        torch.testing.assert_close(far(X), near(X))
        with gralora.disable_adapter(far):
            assert same_bits(far(X), base)
        assert not [
            name for name, p in far.named_parameters() if p.requires_grad and "gralora" not in name
        ]
    target = torch.zeros(3, 5, 4)
    losses = ten_losses(far, X, target)
    torch.testing.assert_close(losses, ten_losses(near, X, target), rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    gralora.save_adapter(far, tmp_path / "adapter", "a")
    fresh = adapt(model())
    gralora.load_adapter(fresh, tmp_path / "adapter", "a")
    torch.testing.assert_close(fresh(X), near(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="meta device"):
        gralora.merge(far)
    accelerate.hooks.remove_hook_from_submodules(far)
    assert not far.down.weight.is_meta
    torch.testing.assert_close(far(X), near(X), rtol=1e-4, atol=1e-5)
    gralora.merge(far)
    torch.testing.assert_close(far(X), near(X), rtol=1e-4, atol=1e-5)
    assert same_bits(gralora.unload(far)(X), free)


class Router(nn.Linear):
    """Returns more than a tensor, so that it is run with W + ΔW as its weight."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.softmax(-1)


@pytest.mark.parametrize("when", ["hooks before inject", "hooks after inject"])
def test_an_offloaded_layer_that_is_run_with_its_sum_stays_frozen(when):
    torch.manual_seed(0)
    near, config = nn.Sequential(Router(16, 4)), random_config()
    far = copy.deepcopy(near)
    if when == "hooks before inject":
        accelerate.cpu_offload(far, execution_device="cpu")
    gralora.inject(far, ["0"], config)
    if when == "hooks after inject":
        accelerate.cpu_offload(far, execution_device="cpu")
    gralora.inject(near, ["0"], config)
    gralora.load_adapter_state_dict(far, gralora.adapter_state_dict(near))
    for _ in range(2):
        for one, other in zip(far(X), near(X), strict=True):
            torch.testing.assert_close(one, other)
        assert (
            far[0]._parameters["weight"].is_meta and not far[0]._parameters["weight"].requires_grad
        )


@pytest.mark.parametrize("way", WAYS)
def test_saved_modules_and_biases_are_right_under_offloading_and_refused_after_it(way, tmp_path):
    far = model()
    WAYS[way](far, tmp_path)
    for offence in ({"modules_to_save": ["conv"]}, {"bias": "all"}):
        with pytest.raises(ValueError, match="offloaded"):
            gralora.inject(far, ["down"], random_config(**offence))
    assert not [name for name, _ in far.named_parameters() if "gralora" in name]

    config = random_config(bias="gralora_only", modules_to_save=["head", "embed"])
    near = gralora.inject(model(), ["up", "down"], config)
    with torch.no_grad():
        for p in gralora.adapter_parameters(near):
            p.add_(0.1)
    far = WAYS[way](copy.deepcopy(near), tmp_path / "again")
    torch.testing.assert_close(far(X), near(X))
    with gralora.disable_adapter(far), gralora.disable_adapter(near):
        base = near(X)
        torch.testing.assert_close(far(X), base)
    assert relative(near(X), base) > 1e-2
    torch.testing.assert_close(far(X), near(X))


def test_gpt2_offloaded_generates(tmp_path):
    torch.manual_seed(0)
    near = gralora.inject(gpt2(), ["c_attn", "c_fc"], random_config())
    far = accelerate.cpu_offload(copy.deepcopy(near), execution_device="cpu")
    tokens = torch.arange(6)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(far.generate(tokens, **options), near.generate(tokens, **options))


def _prepared(rank, mixed_precision):
    """Ten steps of a model that `Accelerator` has prepared: under DistributedDataParallel where
    there are processes.
    """
    accelerate.state.AcceleratorState._reset_state(True)
    if rank is not None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="0",
        )
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    torch.manual_seed(0)
    near = gralora.inject(
        nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), "all-linear", random_config()
    )
    alone, x, target = copy.deepcopy(near), torch.randn(8, 16), torch.zeros(8, 4)
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(near), lr=1e-2)
    prepared, optimizer = accelerator.prepare(near, optimizer)
    losses, own = [], slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    for _ in range(10):
        loss = nn.functional.mse_loss(prepared(x[own]).float(), target[own])
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    tolerance = 1e-4 if mixed_precision == "no" else 2e-2
    torch.testing.assert_close(losses, ten_losses(alone, x, target), rtol=tolerance, atol=tolerance)
    assert type(accelerator.unwrap_model(prepared)) is nn.Sequential
    assert set(gralora.adapter_state_dict(accelerator.unwrap_model(prepared))) == set(
        gralora.adapter_state_dict(alone)
    )
    accelerate.state.AcceleratorState._reset_state(True)
    return type(prepared).__name__


@pytest.mark.parametrize("mixed_precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_accelerator_prepares_a_model(mixed_precision):
    assert _prepared(None, mixed_precision) == "Sequential"


@pytest.mark.parametrize("mixed_precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_accelerator_prepares_a_model_on_two_processes(processes, mixed_precision):
    assert processes.run(_prepared, mixed_precision) == ["DistributedDataParallel"] * 2
