"""Convolutions against those with W + ΔW."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig, GraloraConv, GraloraConvTranspose
from gralora.layers.base import gralora_layers

from ..models import assert_same, fingerprint, random_config, relative, same_bits

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KINDS = {
    "1d": (lambda **kw: nn.Conv1d(8, 12, 3, **kw), (2, 8, 11)),
    "1d padded, dilated": (
        lambda **kw: nn.Conv1d(8, 4, 4, padding="same", dilation=2, bias=False, **kw),
        (2, 8, 11),
    ),
    "2d 1x1": (lambda **kw: nn.Conv2d(8, 12, 1, **kw), (2, 8, 5, 6)),
    "2d": (lambda **kw: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=1, **kw), (2, 4, 9, 8)),
    "2d reflect": (
        lambda **kw: nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="reflect", **kw),
        (2, 4, 9, 8),
    ),
    "2d circular": (
        lambda **kw: nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular", **kw),
        (2, 4, 9, 8),
    ),
    "2d replicate": (
        lambda **kw: nn.Conv2d(4, 8, 3, padding=2, padding_mode="replicate", stride=2, **kw),
        (2, 4, 9, 8),
    ),
    "2d patches": (lambda **kw: nn.Conv2d(4, 16, 4, stride=4, **kw), (2, 4, 8, 8)),
    "1d grouped": (lambda **kw: nn.Conv1d(8, 16, 3, padding=1, groups=2, **kw), (2, 8, 11)),
    "2d grouped": (
        lambda **kw: nn.Conv2d(16, 16, (3, 2), stride=2, groups=4, bias=False, **kw),
        (2, 16, 9, 8),
    ),
    "1d transposed": (
        lambda **kw: nn.ConvTranspose1d(8, 12, 3, stride=2, output_padding=1, **kw),
        (2, 8, 5),
    ),
    "2d transposed": (
        lambda **kw: nn.ConvTranspose2d(
            8, 4, (3, 2), stride=(2, 3), padding=1, dilation=(1, 2), bias=False, **kw
        ),
        (2, 8, 5, 4),
    ),
    "3d transposed": (lambda **kw: nn.ConvTranspose3d(4, 8, 2, stride=2, **kw), (2, 4, 3, 2, 3)),
    "3d": (
        lambda **kw: nn.Conv3d(4, 8, (1, 3, 2), dilation=(1, 1, 2), padding=(0, 1, 0), **kw),
        (2, 4, 3, 6, 5),
    ),
}


def reference(conv, x, weight):
    """The convolution of PyTorch with another weight."""
    other = copy.copy(conv)
    other.__dict__["_parameters"] = {"bias": conv.bias}
    other.__dict__["weight"] = weight
    return conv._base_class.forward(other, x)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_output_and_gradients_are_those_of_w_plus_delta_w(name, k):
    make, shape = KINDS[name]
    conv, x = make(dtype=torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = conv(x)
    gralora.inject(conv, "", random_config(r=4, gralora_k=k, hybrid_r=2))
    adapter = conv.gralora_adapters["default"]
    with torch.no_grad():
        adapter.B.normal_()
    y = conv(x)
    assert not torch.allclose(y, base)
    expected = reference(conv, x, conv.weight + gralora.delta_weight(conv))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *adapter.parameters()]
    grad = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_one_example_without_a_batch_axis_and_channels_last(name):
    make, shape = KINDS[name]
    conv, x = make(), torch.randn(shape)
    gralora.inject(conv, "", random_config())
    y = conv(x)
    torch.testing.assert_close(conv(x[0]), y[0])
    if len(shape) == 4:
        torch.testing.assert_close(conv(x.to(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_merge_and_exact_unmerge(name, dtype):
    make, shape = KINDS[name]
    conv, x = make(dtype=dtype), torch.randn(shape, dtype=dtype)
    if len(shape) == 4:
        conv = conv.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(conv)
    gralora.inject(conv, "", random_config(hybrid_r=1, alpha=1))
    before, y = fingerprint(conv), conv(x)
    gralora.merge(conv)
    assert not same_bits(conv.weight, plain.weight)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative(conv(x).double(), y.double()) < tolerance
    gralora.unmerge(conv)
    assert_same(fingerprint(conv), before)
    gralora.merge_and_unload(conv)
    assert type(conv) is type(plain)
    assert conv.weight.stride() == plain.weight.stride()
    assert relative(conv(x).double(), y.double()) < tolerance


def test_a_1x1_kernel_is_the_linear_case():
    conv, linear = nn.Conv2d(8, 12, 1), nn.Linear(8, 12)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
    for layer in (conv, linear):
        torch.manual_seed(1)
        gralora.inject(layer, "", random_config())
    for mine, theirs in zip(
        conv.gralora_adapters.parameters(), linear.gralora_adapters.parameters()
    ):
        assert same_bits(mine, theirs)
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(conv(x), linear(x.movedim(1, -1)).movedim(-1, 1))


def test_parameters_are_those_of_lora_and_k_must_divide_the_channels():
    conv = gralora.inject(nn.Conv2d(8, 12, 3), "", GraloraConfig(r=8, gralora_k=4))
    assert sum(p.numel() for p in conv.gralora_adapters.parameters()) == 8 * (8 * 9 + 12)
    conv = nn.Conv2d(4, 9, 3)  # 36 inputs of the matrix, but 4 channels
    with pytest.raises(
        ValueError, match=r"gralora_k=3 does not divide in_features=4 of '' .*Legal here: 1\."
    ):
        gralora.inject(conv, "", GraloraConfig(r=9, gralora_k=3))


def test_the_output_is_unchanged_at_the_start_and_dropout_falls_on_the_input_in_training_alone():
    conv, x = nn.Conv2d(8, 12, 3), torch.randn(2, 8, 6, 6)
    y = conv(x)
    assert same_bits(gralora.inject(conv, "", GraloraConfig(r=4))(x), y)
    conv = gralora.inject(nn.Conv2d(8, 12, 3), "", random_config(gralora_dropout=0.5))
    assert not torch.equal(conv(x), conv(x))
    conv.eval()
    assert same_bits(conv(x), conv(x))


def test_what_k_does_not_divide_and_grouped_transposed_convolutions_are_refused_by_name():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3)
    )
    before = fingerprint(model)
    with pytest.raises(ValueError) as error:
        gralora.inject(model, ["0", "1", "2"], random_config())
    depthwise = (
        "gralora_k=2 does not divide in_features=1 and out_features=1 of '0' (r=4). Legal here: 1."
    )
    assert depthwise in str(error.value)
    assert "'1' is a transposed convolution of 2 groups" in str(error.value)
    assert_same(fingerprint(model), before)


def test_all_linear_leaves_convolutions_alone_and_every_other_form_takes_them():
    def model():
        return nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "fc": nn.Linear(8, 8)})

    assert [
        n for n, _ in gralora_layers(gralora.inject(model(), "all-linear", random_config()))
    ] == ["fc"]
    for targets in (
        r"conv",
        ["conv"],
        lambda name, module: isinstance(module, nn.Conv2d),
        {"conv": random_config()},
    ):
        adapted = gralora.inject(model(), targets, random_config())
        assert [n for n, _ in gralora_layers(adapted)] == ["conv"]
        assert isinstance(adapted["conv"], GraloraConv) and isinstance(adapted["conv"], nn.Conv2d)
        assert type(adapted["conv"]) is gralora.adapted_class(nn.Conv2d)


def test_from_conv_shares_the_weight():
    conv = nn.Conv2d(4, 8, 3)
    adapted = GraloraConv.from_conv(conv, random_config())
    assert adapted.weight is conv.weight and type(conv) is nn.Conv2d
    x = torch.randn(1, 4, 5, 5)
    assert not torch.allclose(adapted(x), conv(x))
    with pytest.raises(ValueError, match="2 groups"):
        GraloraConvTranspose.from_conv(nn.ConvTranspose2d(4, 4, 3, groups=2))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_keeps_its_forward_and_merging_it_is_refused():
    conv = gralora.inject(Scaled(4, 8, 3), "", random_config())
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(
        conv(x), 2 * F.conv2d(x, conv.weight, conv.bias) + F.conv2d(x, gralora.delta_weight(conv))
    )
    with pytest.raises(ValueError, match="forward of its own"):
        gralora.merge(conv)


class ResNet(nn.Module):
    """Residual blocks with batch norm and a strided shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.head(F.relu(y + self.shortcut(x)).mean((2, 3)))


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def everything(model):
    """All of a model's layers: for the stem, whose 3 channels no even k divides, k = 1."""
    one, two = random_config(r=2, gralora_k=1, alpha=4), random_config(alpha=8)
    return gralora.inject(model, {"stem": one, r"conv\d|shortcut|head": two})


@pytest.mark.parametrize("format", ["gralora", "lora"])
def test_a_resnet_saved_and_loaded_and_read_by_peft(format, tmp_path):
    base = ResNet().eval()
    model = everything(copy.deepcopy(base))
    y = model(IMAGES)
    assert not torch.allclose(y, base(IMAGES))
    gralora.save_adapter(model, tmp_path / "a", format=format)
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(loaded(IMAGES), y, rtol=1e-4, atol=1e-5)
    if format == "lora":
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
        torch.testing.assert_close(theirs(IMAGES), y, rtol=1e-4, atol=1e-5)


def test_what_peft_saves_of_convolutions_loads(tmp_path):
    base = ResNet().eval()
    config = peft.LoraConfig(
        r=4, target_modules=["stem", "conv1", "conv2", "shortcut", "head"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path)
    assert not torch.allclose(ours(IMAGES), base(IMAGES))
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-5)


def test_to_lora_gives_kernels_and_their_product_is_delta_w():
    model = everything(ResNet().double())
    pairs = gralora.to_lora(model)
    for name, layer in gralora_layers(model):
        down, up = pairs[f"{name}.lora_A.weight"], pairs[f"{name}.lora_B.weight"]
        assert down.dim() == up.dim() == layer.weight.dim()
        product = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        torch.testing.assert_close(product, gralora.delta_weight(layer))


def test_pefts_gralora_has_no_convolutions(tmp_path):
    with pytest.raises(
        ValueError,
        match="of kind 'convolution', can't be saved .*PEFT's GraLoRA adapts linear layers only",
    ):
        gralora.save_adapter(everything(ResNet()), tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


def test_a_resnet_trains_and_a_kernel_of_another_size_is_refused(tmp_path):
    base = ResNet()
    model = gralora.inject(copy.deepcopy(base), r"conv\d|shortcut", GraloraConfig(r=4, gralora_k=2))
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(IMAGES), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    base.conv1 = nn.Conv2d(8, 16, 5, stride=2, padding=2, bias=False)
    with pytest.raises(
        gralora.AdapterFileError, match=r"conv1.gralora_A must have shape \(2, 100, 4\)"
    ):
        gralora.load_adapter(base, tmp_path / "a.safetensors")


def test_extract_finds_the_kernels_of_a_tuned_resnet():
    base = ResNet()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.conv1.weight.add_(torch.randn_like(tuned.conv1.weight) * 0.1)
    errors = {}
    gralora.extract(
        base, tuned, ["conv1"], GraloraConfig(r=16, gralora_k=2, alpha=16), errors=errors
    )
    assert errors["conv1"] < 1e-5
    torch.testing.assert_close(base.eval()(IMAGES), tuned.eval()(IMAGES))


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_the_unet_of_diffusers_with_every_convolution_and_linear_layer_adapted(tmp_path):
    base = unet()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16))
    taken = lambda name, module: isinstance(module, (nn.Conv2d, nn.Linear))  # noqa: E731
    model = gralora.inject(copy.deepcopy(base), taken, random_config(r=2, gralora_k=2, alpha=4))
    layers = dict(gralora_layers(model))
    assert sum(isinstance(layer, GraloraConv) for layer in layers.values()) > 15
    assert any(isinstance(layer, gralora.GraloraLinear) for layer in layers.values())
    with torch.no_grad():
        y, plain = model(*inputs).sample, base(*inputs).sample
        for alone in layers:
            for name, layer in layers.items():
                layer.gralora_adapters.active = {"default": 1.0} if name == alone else {}
            assert not torch.allclose(model(*inputs).sample, plain, rtol=1e-6, atol=1e-7), (
                f"{alone} has no effect"
            )
        gralora.set_adapter(model, "default")
        gralora.save_adapter(model, tmp_path / "a", format="lora")
        torch.testing.assert_close(
            gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")(*inputs).sample,
            y,
            rtol=1e-3,
            atol=1e-4,
        )
        gralora.merge(model)
        torch.testing.assert_close(model(*inputs).sample, y, rtol=1e-3, atol=1e-4)
        gralora.unload(model)
        assert same_bits(model(*inputs).sample, plain)


def test_a_transposed_convolution_is_asked_for_a_size():
    conv, x = nn.ConvTranspose2d(8, 4, 3, stride=3).double(), torch.randn(2, 8, 4, 5).double()
    base = conv(x, output_size=[14, 16])
    gralora.inject(conv, "", random_config())
    y = conv(x, output_size=[14, 16])
    assert y.shape == base.shape == (2, 4, 14, 16)
    expected = reference(conv, x, conv.weight + gralora.delta_weight(conv))
    torch.testing.assert_close(y[..., :12, :15], expected, rtol=1e-12, atol=1e-12)
    assert relative(y, base) > 1e-2
    gralora.merge(conv)
    torch.testing.assert_close(conv(x, [14, 16]), y, rtol=1e-12, atol=1e-12)


def test_transposed_convolutions_have_no_lora(tmp_path):
    model = gralora.inject(nn.Sequential(nn.ConvTranspose2d(8, 4, 3)), ["0"], random_config())
    with pytest.raises(
        ValueError, match="'0', of kind 'transposed convolution', can't be saved .*there is no LoRA"
    ):
        gralora.save_adapter(model, tmp_path / "a", format="lora")
    assert not list(tmp_path.iterdir())


def test_a_pair_of_pefts_that_mixes_groups_is_refused(tmp_path):
    import warnings

    theirs = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        peft.get_peft_model(theirs, config).save_pretrained(tmp_path)
    with pytest.raises(
        gralora.AdapterFileError,
        match="'0', a convolution of 2 groups, mixes channels of different groups",
    ):
        gralora.load_adapter(nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)), tmp_path)
