"""Files of pipelines, read by the real diffusers."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import gralora
from gralora.files.diffusers import part_of_pipeline

from ..models import mlp, random_config, relative
from ..needs import needs
from ..peft_reference import quietly

diffusers = needs("diffusers")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return CLIPTextModel(CLIPTextConfig(vocab_size=32, projection_dim=16, **sizes)).eval()


def sd3():
    torch.manual_seed(0)
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
    }
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        **sizes,
    ).eval()


def flux():
    torch.manual_seed(0)
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        **sizes,
    ).eval()


@torch.no_grad()
def out(module):
    torch.manual_seed(1)
    name = type(module).__name__
    if "CLIPText" in name:
        return module(torch.arange(12).reshape(2, 6)).last_hidden_state
    if "UNet" in name:
        return module(torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 16)).sample
    if "SD3" in name:
        return module(
            torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 16), torch.tensor([3, 7])
        ).sample
    return module(
        torch.randn(2, 6, 4),
        torch.randn(2, 5, 16),
        torch.randn(2, 16),
        torch.tensor([0.3, 0.7]),
        img_ids=torch.randn(6, 3),
        txt_ids=torch.randn(5, 3),
    ).sample


def pipeline(**parts):
    """The parts of a pipeline that load_lora_weights needs."""
    if "unet" in parts:
        mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    elif "SD3" in type(parts["transformer"]).__name__:
        mixin = diffusers.loaders.SD3LoraLoaderMixin
    else:
        mixin = diffusers.loaders.FluxLoraLoaderMixin
    made = type("Pipeline", (mixin,), {"components": parts, "hf_device_map": None})()
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        setattr(made, name, parts.get(name))
    made.config = {}
    return made


RULES = {  # of different rank, k and scaling
    ("to_q", "q_proj", "proj_in"): random_config(r=8, gralora_k=4, alpha=3),
    (*ATTENTION[1:], "fc1", "v_proj", "ff.net.2", "ff.net.0.proj"): random_config(hybrid_r=2),
}
MAKE = {"unet": unet, "sd3": sd3, "flux": flux}


def in_diffusers(path, **bases):
    loaded = pipeline(**{name: copy.deepcopy(module) for name, module in bases.items()})
    quietly(loaded.load_lora_weights, str(path))
    return loaded


@pytest.mark.filterwarnings("ignore:targets not found in this model")
@pytest.mark.parametrize("name", MAKE)
def test_load_lora_weights_computes_the_same_and_back(name, tmp_path):
    base, part = MAKE[name](), "unet" if name == "unet" else "transformer"
    rules = (
        {**RULES, ("conv1", "conv2", "time_emb_proj"): random_config(alpha=2)}
        if name == "unet"
        else RULES
    )
    model = gralora.inject(copy.deepcopy(base), rules).eval()
    gralora.save_adapter(model, tmp_path / "a", format="diffusers")
    keys = load_file(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    assert all(
        key.startswith(f"{part}.") and key.endswith((".lora_A.weight", ".lora_B.weight"))
        for key in keys
    )
    theirs = getattr(in_diffusers(tmp_path / "a", **{part: base}), part)
    assert relative(out(theirs), out(model)) < 1e-4 and relative(out(base), out(model)) > 1e-2
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()
    assert relative(out(again), out(model)) < 1e-4


@pytest.mark.filterwarnings("ignore:targets not found in this model")
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_several_modules_of_a_pipeline(format, tmp_path):
    bases = {"unet": unet(), "text_encoder": text_encoder()}
    rules = {"unet": RULES, "text_encoder": RULES}
    if (
        format == "kohya"
    ):  # whose attention pairs diffusers 0.42.1 drops beside transformers 5, from anybody's file
        rules["text_encoder"] = {("fc1", "fc2"): random_config(r=8, alpha=3)}
    models = {
        part: gralora.inject(copy.deepcopy(base), rules[part]).eval()
        for part, base in bases.items()
    }
    path = tmp_path / ("a.safetensors" if format == "kohya" else "a")
    gralora.save_adapter(models, path, format=format)
    loaded = in_diffusers(path, **bases)
    again = {part: copy.deepcopy(base) for part, base in bases.items()}
    assert gralora.load_adapter(again, path) is again
    for part, base in bases.items():
        assert relative(out(getattr(loaded, part)), out(models[part])) < 1e-4
        assert relative(out(again[part].eval()), out(models[part])) < 1e-4
        assert relative(out(base), out(models[part])) > 1e-2
    alone = gralora.load_adapter(copy.deepcopy(bases["text_encoder"]), path).eval()
    assert relative(out(alone), out(models["text_encoder"])) < 1e-4
    if format == "kohya":
        with safe_open(path, "pt") as file:
            assert (
                file.metadata()["ss_network_dim"] == "32"
                and file.metadata()["ss_network_module"] == "networks.lora"
            )
            assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight" in file.keys()  # noqa: SIM118


@pytest.mark.filterwarnings("ignore:targets not found in this model")
def test_what_diffusers_has_saved_is_read(tmp_path):
    import peft

    base = unet()
    theirs = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*ATTENTION, "conv1"],
        rank_pattern={"conv1": 2},
        alpha_pattern={"conv1": 5},
    )
    config.init_lora_weights = False
    theirs.add_adapter(config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    from peft.utils import get_peft_model_state_dict

    pairs = get_peft_model_state_dict(theirs)
    metadata = theirs.peft_config["default"].to_dict()
    metadata.update(
        target_modules=sorted(metadata["target_modules"]), alpha_pattern={}, lora_alpha=6
    )
    pairs_of_one = {k: v for k, v in pairs.items() if "conv1" not in k}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=pairs_of_one, unet_lora_adapter_metadata=metadata
    )
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path).eval()
    for key, layer in gralora.layers.base.gralora_layers(ours):
        module = theirs.get_submodule(key)
        assert relative(layer.delta_weight(), module.get_delta_weight("default")) < 1e-5
        assert layer.gralora_adapters["default"].config.scaling == 1.5
    old = {
        k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v
        for k, v in pairs_of_one.items()
    }
    save_file(
        {**{f"unet.{k}": v.contiguous() for k, v in old.items()}},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path)
    assert {
        c.gralora_adapters["default"].config.scaling
        for _, c in gralora.layers.base.gralora_layers(ours)
    } == {1.0}


def test_what_cannot_be_told_or_held_is_refused_by_name(tmp_path):
    model = gralora.inject(mlp(8, 8), ["0"], random_config())
    for format in ("diffusers", "kohya"):
        with pytest.raises(
            ValueError, match="which part of a pipeline a Sequential is can't be told"
        ):
            gralora.save_adapter(model, tmp_path / "a", format=format)
    with pytest.raises(ValueError, match="several modules are for 'diffusers' and 'kohya'"):
        gralora.save_adapter({"unet": model}, tmp_path / "a")
    with pytest.raises(ValueError, match="kohya's names for transformers are not diffusers'"):
        gralora.save_adapter({"transformer": model}, tmp_path / "a", format="kohya")
    saved = gralora.inject(mlp(8, 8, 8), ["0"], random_config(modules_to_save=["2"]))
    with pytest.raises(
        ValueError, match=r"trains 'unet.2' as well, which can't be saved with format='diffusers'"
    ):
        gralora.save_adapter({"unet": saved}, tmp_path / "a", format="diffusers")
    embedding = gralora.inject(nn.Sequential(nn.Embedding(8, 8)), ["0"], random_config())
    with pytest.raises(
        ValueError,
        match=r"'unet.0', of kind 'embedding', can't be saved .*: a LoRA of a pipeline holds",
    ):
        gralora.save_adapter({"unet": embedding}, tmp_path / "a", format="diffusers")
    twins = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    gralora.inject(twins, ["a_b", "a.b"], random_config())
    with pytest.raises(ValueError, match="and another layer are both 'lora_unet_a_b'"):
        gralora.save_adapter({"unet": twins}, tmp_path / "a", format="kohya")
    assert not list(tmp_path.iterdir())
    gralora.save_adapter({"unet": model}, tmp_path / "a", format="diffusers")
    with pytest.raises(
        gralora.AdapterFileError,
        match=r"nothing for the part 'text_encoder' of a pipeline; .*\['unet'\]",
    ):
        gralora.load_adapter({"text_encoder": mlp(8, 8)}, tmp_path / "a")
    with pytest.raises(gralora.AdapterFileError, match="which part of a pipeline a Sequential is"):
        gralora.load_adapter(mlp(8, 8), tmp_path / "a")
    gralora.save_adapter(model, tmp_path / "own.safetensors")
    with pytest.raises(
        gralora.AdapterFileError, match="of format 'gralora', which is of one module"
    ):
        gralora.load_adapter({"unet": mlp(8, 8)}, tmp_path / "own.safetensors")
    assert part_of_pipeline("CLIPTextModelWithProjection") == "text_encoder_2"
    file = tmp_path / "a" / "pytorch_lora_weights.safetensors"
    good = load_file(file)
    for tensors, metadata, why in (
        (
            {**good, "unet.0.lora_magnitude_vector": torch.ones(8)},
            {},
            "which is not part of a LoRA pair",
        ),
        ({k: v for k, v in good.items() if "lora_B" not in k}, {}, "without 'unet.0.lora_B.weight"),
        ({**good, "unet.0.alpha": torch.ones(2)}, {}, "'unet.0.alpha', which is not part of a"),
        ({**good, "unet.0.alpha": torch.tensor(1j)}, {}, "unet.0.alpha is complex"),
        (good, {"lora_adapter_metadata": json.dumps([1])}, "is no JSON object"),
        (good, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "x"})}, "alpha='x'"),
        (good, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 10**400})}, "no finite"),
        (
            good,
            {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": [1]})},
            "alpha_pattern is no JSON object",
        ),
    ):
        save_file(tensors, file, {"format": "pt", **metadata})
        with pytest.raises(gralora.AdapterFileError, match=why):
            gralora.load_adapter({"unet": mlp(8, 8)}, tmp_path / "a")
    gralora.save_adapter({"unet": model}, tmp_path / "k.safetensors", format="kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    save_file({**tensors, "lora_unet_0.hada_w1_a": torch.ones(2)}, tmp_path / "k.safetensors")
    with pytest.raises(gralora.AdapterFileError, match="which is not part of a LoRA pair"):
        gralora.load_adapter({"unet": mlp(8, 8)}, tmp_path / "k.safetensors")
    gralora.save_adapter({"text_encoder": model}, tmp_path / "k.safetensors", format="kohya")
    tensors = load_file(tmp_path / "k.safetensors")
    other = {k.replace("lora_te_", "lora_te1_"): t.clone() for k, t in tensors.items()}
    save_file({**tensors, **other}, tmp_path / "k.safetensors")
    with pytest.raises(gralora.AdapterFileError, match="two pairs for one layer of the part"):
        gralora.load_adapter({"text_encoder": mlp(8, 8)}, tmp_path / "k.safetensors")
