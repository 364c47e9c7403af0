"""The command line."""

import copy
import json
import os
import subprocess
import sys

import peft
import pytest
import torch

import gralora
from gralora.layers.base import gralora_layers

from .command_line import command, run
from .models import Block, random_config, relative


def test_info_tells_what_the_adapter_holds(adapter, capsys):
    model, path = adapter
    assert run("info", path, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "gralora"
    assert result["parameters"] == sum(p.numel() for p in gralora.adapter_parameters(model))
    rows = {row["layer"]: row for row in result["layers"]}
    assert {k: rows["v"][k] for k in ("in", "out", "r", "k", "hybrid_r", "alpha")} == {
        "in": 16, "out": 16, "r": 8, "k": 4, "hybrid_r": 2, "alpha": 3,
    }  # fmt: skip
    for name, layer in gralora_layers(model):
        assert rows[name]["norm"] == pytest.approx(
            float(gralora.delta_weight(layer).detach().norm()), rel=1e-5
        )
    assert run("info", path) == 0
    text = capsys.readouterr().out
    assert "layer  in  out" in text and "2 layers" in text


@pytest.mark.parametrize("to", ["gralora", "peft", "lora"])
def test_convert_writes_every_format_with_the_same_update(tmp_path, to, capsys):
    base = Block()
    model = gralora.inject(
        copy.deepcopy(base),
        ["q", "mlp.0"],
        random_config(hybrid_r=1, bias="all", modules_to_save=["head"]),
    )
    x = torch.randn(2, 3, 16)
    for source in ("gralora", "peft"):
        gralora.save_adapter(model, tmp_path / source, format=source)
        assert run("convert", tmp_path / source, tmp_path / f"{source}-{to}", "--to", to) == 0
        loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / f"{source}-{to}").eval()
        assert relative(loaded(x), model.eval()(x)) < 1e-6
        capsys.readouterr()
        run("info", tmp_path / f"{source}-{to}", "--json")
        assert json.loads(capsys.readouterr().out)["format"] == to
    if to != "gralora":
        theirs = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / f"gralora-{to}"
        ).eval()
        assert relative(theirs(x), model(x)) < 1e-6


def test_convert_cuts_to_a_rank_and_prints_the_errors(adapter, tmp_path, capsys):
    model, path = adapter
    errors = {}
    gralora.to_lora(model, rank=3, errors=errors)
    assert run("convert", path, tmp_path / "out", "--to", "lora", "--rank", 3) == 0
    shown = capsys.readouterr().out
    for name, error in errors.items():
        assert f"{name}      {error:.4g}" in shown
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


def test_convert_cuts_to_a_share_of_the_squared_norm(adapter, tmp_path, capsys):
    model, path = adapter
    assert run("convert", path, tmp_path / "out", "--to", "lora", "--rank", "0.9") == 0
    assert "q" in capsys.readouterr().out
    pairs, cut = gralora.to_lora(model, rank=0.9), gralora.load_adapter(Block(), tmp_path / "out")
    for name, layer in gralora_layers(cut):
        assert (
            layer.gralora_adapters["default"].config.r
            == pairs[f"{name}.lora_A.weight"].shape[0]
            < 9
        )
    assert run("convert", path, tmp_path / "wrong", "--to", "lora", "--rank", "1.5") == 1
    assert "a share of the squared norm between 0 and 1" in capsys.readouterr().err


def test_exit_codes_and_one_line_of_failure(adapter, tmp_path, capsys):
    _, path = adapter
    (tmp_path / "bad").write_bytes(b"nonsense")
    before = path.read_bytes()
    for args in (
        ("info", tmp_path / "none"),
        ("info", tmp_path / "bad"),
        ("convert", path, path, "--to", "gralora"),
        ("convert", path, tmp_path / "out", "--to", "peft"),  # layers of different k
        ("convert", path, tmp_path / "no" / "out", "--to", "lora"),
        ("merge", tmp_path / "none", path, tmp_path / "out"),
        ("merge", path, path, tmp_path / "out"),
    ):
        assert run(*args) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("gralora: ") and captured.err.count("\n") == 1
        assert captured.out == ""
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "bad"]
    for args in (
        (),
        ("convert", path, path),
        ("convert", path, tmp_path / "x", "--to", "onnx"),
        ("convert", path, tmp_path / "x", "--to", "peft", "--rank", "3"),
        ("extract", path, path, tmp_path / "x", "--targets", ".*", "-r", "3", "-k", "2"),
    ):
        with pytest.raises(SystemExit) as exit:
            run(*args)
        assert exit.value.code == 2
        capsys.readouterr()
    assert run("convert", path, path, "--to", "gralora", "--force") == 0


def test_both_commands_start(adapter):
    _, path = adapter
    result = command("info", path)
    assert (result.returncode, result.stderr) == (0, "") and "2 layers" in result.stdout
    script = os.path.join(os.path.dirname(sys.executable), "gralora")
    failed = subprocess.run([script, "info", str(path) + "x"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr


def test_a_reader_that_stops_early_gets_no_complaint(adapter):
    _, path = adapter
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "gralora", "info", str(path)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (1, "")
