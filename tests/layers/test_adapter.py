"""One adapter: its name, and its first values."""

import copy

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig, GraloraLinear
from gralora.layers.adapter import GraloraAdapter

from ..models import mlp, random_config, relative


def test_a_model_on_meta_is_injected_there_and_reset_later():
    with torch.device("meta"):
        model = mlp(16, 8)
    gralora.inject(model, ["0"], GraloraConfig(r=4))
    assert model[0].gralora_adapters["default"].A.is_meta
    model.to_empty(device="cpu")
    model[0].gralora_adapters["default"].reset_parameters()
    assert model[0].gralora_adapters["default"].B.count_nonzero() == 0


@pytest.mark.parametrize("name", ["forward", "training", "items", "a b", "ä"])
def test_any_name_without_a_dot_names_an_adapter(name):
    model = gralora.inject(mlp(16, 8), ["0"], random_config(), adapter_name=name)
    assert gralora.adapter_names(model) == [name]
    assert model(torch.randn(2, 16)).shape == (2, 8)


@pytest.mark.parametrize(
    ("name", "error"), [("a.b", ValueError), ("", ValueError), (3, TypeError), (None, TypeError)]
)
def test_other_names_are_refused(name, error):
    with pytest.raises(error, match="adapter_name"):
        gralora.inject(mlp(16, 8), ["0"], adapter_name=name)


KINDS = {
    "linear": (lambda: nn.Linear(8, 8), lambda layer: layer(torch.randn(3, 8))),
    "convolution": (lambda: nn.Conv1d(8, 8, 3), lambda layer: layer(torch.randn(3, 8, 5))),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        lambda layer: layer(*[torch.randn(3, 2, 8)] * 3)[0],
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_an_adapter_fire(kind):
    make, run = KINDS[kind]
    layer = (
        gralora.inject(make(), "", random_config(gralora_dropout=0.5))
        if kind != "attention"
        else None
    )
    layer = layer or gralora.inject(make(), ["q_proj"], random_config(gralora_dropout=0.5))
    adapter = next(module for module in layer.modules() if isinstance(module, GraloraAdapter))
    torch.manual_seed(1)
    y = run(layer)
    seen = []
    handles = [
        adapter.register_forward_hook(
            lambda module, args, out: seen.append(("forward", out.shape))
        ),
        adapter.register_forward_pre_hook(
            lambda module, args: seen.append(("before", args[0].shape))
        ),
        adapter.register_full_backward_hook(
            lambda module, into, out: seen.append(("backward", out[0].shape))
        ),
    ]
    torch.manual_seed(1)
    again = run(layer)
    torch.testing.assert_close(again, y)
    again.sum().backward()
    assert [what for what, _ in seen] == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    run(layer)
    assert len(seen) == 3


def test_hooks_that_see_the_rows_of_a_mixed_batch_and_those_of_all_modules():
    model = gralora.inject(nn.Sequential(nn.Linear(8, 8)), ["0"], random_config())
    adapter, seen = model[0].gralora_adapters["default"], []
    with torch.no_grad(), gralora.mixed_batch(model, ["default", None, "default"]):
        handle = adapter.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model(torch.randn(3, 8))
        handle.remove()
    assert seen == [(2, 8)]
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    model(torch.randn(3, 8))
    handle.remove()
    assert adapter in seen


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_by_sample_of_a_tool_that_rests_on_hooks():
    model = gralora.inject(nn.Linear(8, 4), "", random_config(hybrid_r=0))
    adapter, inputs, found = model.gralora_adapters["default"], [], []
    adapter.register_forward_hook(lambda module, args, out: inputs.append(args[0]))

    def by_sample(module, into, out):
        for x, grad in zip(inputs[-1], out[0], strict=True):
            with torch.enable_grad():
                y = type(module).forward(module, x)
                found.append(torch.autograd.grad(y, module.B, grad)[0])

    adapter.register_full_backward_hook(by_sample)
    x = torch.randn(3, 8)
    model(x).square().sum().backward()
    torch.testing.assert_close(sum(found), adapter.B.grad)
    for each, grad in zip(x, found, strict=True):
        model.zero_grad()
        adapter._backward_hooks.clear()
        model(each[None]).square().sum().backward()
        torch.testing.assert_close(grad, adapter.B.grad)


@pytest.mark.filterwarnings("ignore:.*was trained on another base")
@pytest.mark.parametrize("mode", [False, True])
def test_every_module_below_is_in_the_mode_of_its_model(mode, tmp_path):
    def model():
        modules = {
            "fc": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "head": nn.Linear(8, 8),
        }
        return nn.ModuleDict(modules).train(mode)

    one = gralora.inject(
        model(), ["fc", "attention"], random_config(bias="gralora_only", modules_to_save=["head"])
    )
    gralora.save_adapter(one, tmp_path / "a")
    two = gralora.load_adapter(model(), tmp_path / "a")
    for each in (one, two):
        assert {
            name for name, module in each.named_modules() if module.training is not mode
        } == set()


CASTS = {
    "half": (lambda m: m.half(), torch.float16, torch.float32),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16, torch.float32),
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
    "to(float8)": (lambda m: m.to(torch.float8_e4m3fn), torch.float8_e4m3fn, torch.float32),
    "to(cpu, float16)": (lambda m: m.to("cpu", torch.float16), torch.float16, torch.float32),
    "double": (lambda m: m.double(), torch.float64, torch.float64),
    "half, float": (lambda m: m.half().float(), torch.float32, torch.float32),
    "layer by layer": (lambda m: [layer.half() for layer in m] and m, torch.float16, torch.float32),
    "the adapters too": (
        lambda m: m.half() and m[0].gralora_adapters.to(torch.bfloat16) and m,
        torch.float16,
        torch.bfloat16,
    ),
    "one of them": (
        lambda m: m[0].gralora_adapters["default"].to(torch.float16) and m.half(),
        torch.float16,
        torch.float16,
    ),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_a_model_leaves_its_adapters_in_a_type_in_which_they_learn(cast):
    to, base, adapter = CASTS[cast]
    model = gralora.inject(mlp(16, 8), ["0"], random_config(hybrid_r=2))
    before = gralora.adapter_state_dict(model)
    model = to(model)
    assert model[0].weight.dtype is base
    state = gralora.adapter_state_dict(model)
    assert {tensor.dtype for tensor in state.values()} == {adapter}
    if adapter in (torch.float32, torch.float64):
        assert all(torch.equal(tensor, before[key].to(adapter)) for key, tensor in state.items())
    if base.itemsize > 1:
        assert model(torch.randn(3, 16, dtype=base)).dtype is base


def test_an_adapter_in_half_precision_keeps_it_and_grows_with_its_model():
    model = gralora.inject(mlp(16, 8), ["0"], random_config(), dtype=torch.bfloat16)
    assert model.half()[0].gralora_adapters["default"].A.dtype is torch.bfloat16
    assert model.float()[0].gralora_adapters["default"].A.dtype is torch.float32


def test_layerwise_casting_of_diffusers_leaves_adapters_alone():
    from diffusers.hooks import apply_layerwise_casting

    model = mlp(16, 24, 8)
    gralora.inject(model, "all-linear", random_config())
    before, x = gralora.adapter_state_dict(model), torch.randn(3, 16)
    before = {key: tensor.clone() for key, tensor in before.items()}
    y = model(x)
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model[0]._parameters["weight"].dtype is torch.float8_e4m3fn
    assert all(
        torch.equal(tensor, before[key])
        for key, tensor in gralora.adapter_state_dict(model).items()
    )
    assert relative(model(x), y) < 0.2


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_an_adapter_without_values_says_so_at_its_first_forward():
    with torch.device("meta"):
        model = nn.Sequential(GraloraLinear(16, 8, config=GraloraConfig(r=4)))
    model.to_empty(device="cpu")
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="built on the meta device, and has been given memory but no values"
        ):
            model(torch.randn(3, 16))
        with pytest.raises(RuntimeError, match="Call reset_parameters"):
            gralora.delta_weight(model[0])
    filled = copy.deepcopy(model)
    filled[0].gralora_adapters["default"].reset_parameters()
    filled(torch.randn(3, 16))
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(filled.state_dict())
    assert torch.equal(loaded(torch.ones(3, 16)), filled(torch.ones(3, 16)))
    written = copy.deepcopy(model)
    with torch.no_grad():
        for ours, theirs in zip(written.parameters(), filled.parameters(), strict=True):
            ours.copy_(theirs)
    assert torch.equal(written(torch.ones(3, 16)), filled(torch.ones(3, 16)))
    named = copy.deepcopy(model)
    named.load_state_dict({k: t for k, t in filled.state_dict().items() if "gralora_" not in k})
    gralora.load_adapter_state_dict(named, gralora.adapter_state_dict(filled))
    assert torch.equal(named(torch.ones(3, 16)), filled(torch.ones(3, 16)))


@pytest.mark.parametrize("half", [False, True])
def test_from_pretrained_initialises_what_the_checkpoint_lacks_and_keeps_the_base_frozen(
    half, tmp_path
):
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "mixer"

    class Plain(PreTrainedModel):
        config_class, linear = Config, nn.Linear

        def __init__(self, config):
            super().__init__(config)
            self.up, self.down = self.linear(16, 32), self.linear(32, 16)
            self.post_init()

        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.5)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    class Adapted(Plain):
        linear = staticmethod(lambda n, m: GraloraLinear(n, m, config=GraloraConfig(r=4)))

    plain, x = Plain(Config()), torch.randn(3, 16)
    plain.save_pretrained(tmp_path / "plain")
    kwargs = {"dtype": torch.bfloat16} if half else {}
    model = Adapted.from_pretrained(tmp_path / "plain", **kwargs)
    assert relative(model(x.to(model.dtype)).float(), plain(x)) < (0.05 if half else 1e-6)
    adapter = model.up.gralora_adapters["default"]
    assert adapter.B.abs().max() == 0 and 0.1 < adapter.A.std() * 8**0.5 < 1
    assert all(
        parameter.requires_grad is ("gralora_" in name)
        for name, parameter in model.named_parameters()
    )
    with torch.no_grad():
        adapter.B.normal_()
    y = model(x.to(model.dtype))
    model.save_pretrained(tmp_path / "adapted")
    assert torch.equal(
        Adapted.from_pretrained(tmp_path / "adapted", **kwargs)(x.to(model.dtype)), y
    )
