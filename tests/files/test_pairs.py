"""LoRA pairs as each format stores them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gralora
from gralora import AdapterFileError
from gralora.files.formats import read_adapter
from gralora.files.own import AdapterFile, BaseWeight, Header, out_in
from gralora.files.pairs import Pair, PairReader, Stored, pair_config, pair_of, put_pair

from ..models import random_config, relative

R, ALPHA = 4, 6.0


def peft_folder(path, tensors, **config):
    path.mkdir()
    fields = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, **config}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, path / "adapter_model.safetensors")


def as_peft(path, down, up):
    peft_folder(path, {"x.lora_A.weight": down, "x.lora_B.weight": up})


def as_diffusers(path, down, up):
    path.mkdir()
    metadata = {"unet.lora_alpha": ALPHA, "unet.r": R}
    tensors = {"unet.x.lora_A.weight": down, "unet.x.lora_B.weight": up}
    header = {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, path / "pytorch_lora_weights.safetensors", header)


def as_former_diffusers(path, down, up):
    path.mkdir()
    tensors = {"unet.x.lora.down.weight": down, "unet.x.lora.up.weight": up}
    tensors["unet.x.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path / "pytorch_lora_weights.safetensors")


def as_kohya(path, down, up):
    tensors = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}
    save_file({**tensors, "lora_unet_x.alpha": torch.tensor([ALPHA])}, path)


def as_mlx(path, down, up):
    path.mkdir()
    config = {"lora_parameters": {"scale": ALPHA / R}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"x.lora_a": down.mT.contiguous(), "x.lora_b": up.mT.contiguous()}
    save_file(tensors, path / "adapters.safetensors")


def as_gguf(path, down, up):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for letter, tensor in (("a", down), ("b", up)):
        writer.add_tensor(f"x.weight.lora_{letter}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LAYOUTS = [as_peft, as_diffusers, as_former_diffusers, as_kohya, as_mlx, as_gguf]


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_pair_is_read_as_the_same_update_from_every_layout(write, tmp_path):
    down, up = torch.randn(R, 16), torch.randn(8, R)
    write(tmp_path / "a", down, up)
    file = read_adapter(tmp_path / "a")
    (name,) = file.configs
    pair = pair_of(file, name)
    assert file.configs[name].scaling == ALPHA / R and out_in(file, name) == (8, 16)
    assert torch.equal(pair.down, down) and torch.equal(pair.up, up)


@pytest.mark.parametrize("write", LAYOUTS)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((R, 16), (8, R - 1)),
        ((R - 1, 16), (8, R)),
        ((R, 16), (8, 2 * R)),
        ((2 * R, 16), (8, R)),
        ((R, 16, 2), (8, R, 2)),
        ((R, 16, 1), (8, R)),
        ((3, R, 16), (3, 8, R)),
    ],
    ids=str,
)
def test_what_is_not_a_pair_is_refused_by_name(write, down, up, tmp_path):
    write(tmp_path / "a", torch.randn(down), torch.randn(up))
    with pytest.raises(AdapterFileError, match="x.* has a pair of shapes .*: no pair of matrices"):
        read_adapter(tmp_path / "a")


def test_shapes_and_types_are_checked_before_a_tensor_is_read(tmp_path):
    def header(**tensors):
        shapes = {key: shape for key, (shape, _) in tensors.items()}
        dtypes = {key: dtype for key, (_, dtype) in tensors.items()}
        return Header({}, shapes, dtypes, lambda key: pytest.fail(f"{key} was read"))

    down, up = Stored("a"), Stored("b")
    for tensors, why in (
        ({"a": ((R, 16), "F32")}, "holds 'a' without 'b'"),
        ({"b": ((R, 16), "F32")}, "holds 'b' without 'a'"),
        ({"a": ((R, 2**40), "F32"), "b": ((8, R + 1), "F32")}, "has a pair of shapes"),
        ({"a": ((R, 2**40), "I64"), "b": ((8, R), "F32")}, "a is of type I64"),
        ({"a": ((R, 0), "F32"), "b": ((8, R), "F32")}, "has a pair of shapes"),
        ({"a": ((), "F32"), "b": ((), "F32")}, "has a pair of shapes"),
        ({"a": ((2**40, 16), "F32"), "b": ((8, 2**40), "F32")}, "at most 2"),
    ):
        reader = PairReader(tmp_path, header(**tensors), "lora")
        with pytest.raises(AdapterFileError, match=why):
            reader.add("x", down, up)
    pair = {"a": ((R, 16), "F32"), "b": ((8, R), "F32")}
    for fields, why in (
        ({"alpha": "6"}, "alpha='6'"),
        ({"alpha": 10**400, "use_rslora": True}, "no finite float"),
        ({"alpha": 1e30, "use_rslora": True}, "at most 1e"),
        ({"dropout": 1}, "gralora_dropout=1"),
        ({"kind": "experts", "expert_rank": 3}, "no multiple of its rank 3"),
        ({"kind": "experts", "expert_rank": None}, "no multiple of its rank None"),
    ):
        with pytest.raises(AdapterFileError, match=why):
            PairReader(tmp_path, header(**pair), "lora").add("x", down, up, **fields)


def grouped(groups=2):
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=groups), "fc": nn.Linear(8, 8)})


def test_a_grouped_convolution_comes_back_from_a_pipelines_folder_and_kohya_refuses_it(tmp_path):
    model = gralora.inject(grouped(), ["conv", "fc"], random_config(alpha=3))
    gralora.save_adapter({"unet": model}, tmp_path / "a", format="diffusers")
    again = gralora.load_adapter({"unet": grouped()}, tmp_path / "a")["unet"]
    for name in ("conv", "fc"):
        both = [gralora.delta_weight(each[name]).detach() for each in (again, model)]
        assert relative(*both) < 1e-6
    with pytest.raises(ValueError, match="'unet.conv' is a convolution of several groups"):
        gralora.save_adapter({"unet": model}, tmp_path / "b", format="kohya")
    assert not (tmp_path / "b").exists()


def test_a_transposed_convolution_has_no_pair():
    model = gralora.inject(nn.Sequential(nn.ConvTranspose1d(4, 4, 2)), ["0"], random_config())
    with pytest.raises(ValueError, match="'0' is a transposed convolution, for which there is no"):
        gralora.to_lora(model)


def test_another_alpha_is_the_same_update():
    down, up = torch.randn(2, R, 16), torch.randn(2, 8, R)
    pair = Pair(down, up, pair_config(R, 6, 0.1))
    for other in (pair.folded(), pair.with_alpha(5)):
        assert relative(other.config.scaling * other.up @ other.down, 1.5 * up @ down) < 1e-6
    assert pair.folded().config.scaling == 1 and pair.folded().config.gralora_dropout == 0.1
    file = AdapterFile({}, {}, base={"x": BaseWeight((8, 16), "float32", False, None)})
    put_pair(file, "x", pair)
    assert all(torch.equal(a, b) for a, b in zip(pair_of(file, "x")[:2], pair[:2], strict=True))
