"""Checkpoints on disk, tensor by tensor."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gralora
from gralora.layers.base import gralora_layers

from ..command_line import run
from ..models import gpt2, random_config, relative, same_bits
from ..written import big_checkpoint


def test_other_prefixes_are_matched_or_refused_by_name(tmp_path, capsys):
    base = gpt2()
    model = gralora.inject(copy.deepcopy(base), ["c_attn"], random_config())
    gralora.save_adapter(model, tmp_path / "a")
    gralora.merge_and_unload(model)
    tensors = {key: t.clone() for key, t in base.transformer.state_dict().items()}
    for prefix in ("", "transformer.", "wrapped.transformer."):
        save_file({prefix + key: t for key, t in tensors.items()}, tmp_path / "m.safetensors")
        assert (
            run("merge", tmp_path / "m.safetensors", tmp_path / "a", tmp_path / f"out{prefix}") == 0
        )
        merged = load_file(tmp_path / f"out{prefix}")
        key = "h.1.attn.c_attn.weight"
        assert same_bits(merged[prefix + key], model.transformer.state_dict()[key])
        assert not torch.equal(merged[prefix + key], tensors[key])
    capsys.readouterr()
    tensors.pop("h.1.attn.c_attn.weight")
    save_file(tensors, tmp_path / "m.safetensors")
    assert run("merge", tmp_path / "m.safetensors", tmp_path / "a", tmp_path / "x") == 1
    assert (
        "lacks 2 of the adapter's 2 layers, under any prefix: 'transformer.h.0"
        in capsys.readouterr().err
    )
    twice = {
        f"{p}.transformer.{key}": t.clone()
        for key, t in base.transformer.state_dict().items()
        for p in "ab"
    }
    save_file(twice, tmp_path / "m.safetensors")
    assert run("merge", tmp_path / "m.safetensors", tmp_path / "a", tmp_path / "x") == 1
    assert "more than one prefix: a., b." in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_added_tensors_lie_where_readers_expect_them(tmp_path):
    base = nn.ModuleDict({"q": nn.Linear(16, 16, bias=False), "norm": nn.Linear(1, 3, bias=False)})
    tensors = {
        "q.weight": base.q.weight.detach(),
        "norm.weight": base.norm.weight.detach().bfloat16(),
    }  # six bytes
    save_file(tensors, tmp_path / "m.safetensors")
    model = nn.ModuleDict({**base, "head": nn.Linear(16, 5)})
    gralora.inject(model, ["q"], random_config(modules_to_save=["head"]))
    gralora.save_adapter(model, tmp_path / "a")
    assert run("merge", tmp_path / "m.safetensors", tmp_path / "a", tmp_path / "out") == 0
    merged = load_file(tmp_path / "out")
    assert same_bits(merged["head.weight"], model.head.gralora_saved["default"].weight)
    assert same_bits(merged["norm.weight"], tensors["norm.weight"])
    with open(tmp_path / "out", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["head.bias"]["data_offsets"][0] % 4 == 0


PEAK = """
import resource, runpy, sys
import gralora.__main__
limit = sys.argv.pop(1)
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(limit) * 2**20,) * 2)
sys.exit(gralora.__main__.main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux's RLIMIT_DATA")
def test_merging_needs_memory_for_one_tensor_and_not_for_the_checkpoint(tmp_path):
    model = big_checkpoint(tmp_path / "base", 512)  # 128 tensors of 4 MiB
    gralora.inject(model, "all-linear", random_config(r=2))
    layers = [layer for _, layer in gralora_layers(model)]
    for layer in layers:
        layer.gralora_adapters.to_empty(device="cpu")
        layer.gralora_adapters["default"].reset_parameters()
    gralora.save_adapter(model, tmp_path / "a")

    def limited(mebibytes):
        args = [
            "merge",
            str(tmp_path / "base"),
            str(tmp_path / "a"),
            str(tmp_path / "out"),
            "--force",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", PEAK, str(mebibytes), *args],
            capture_output=True,
            text=True,
            env=environment,
        )

    result = limited(96)
    assert result.returncode == 0, result.stderr
    merged = load_file(tmp_path / "out" / "model-3.safetensors")["l.24.weight"]
    base = load_file(tmp_path / "base" / "model-3.safetensors")["l.24.weight"]
    assert relative(merged, base + gralora.delta_weight(layers[24]).detach()) < 1e-6
    assert not torch.equal(merged, base)
    assert limited(2).returncode == 1  # the limit does limit
