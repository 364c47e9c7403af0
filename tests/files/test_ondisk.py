"""Merging into, and extracting from, checkpoints on disk."""

import copy
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gralora
from gralora.layers.base import gralora_layers

from ..command_line import run
from ..models import Block, bert, gpt2, llama, logits, random_config, relative, same_bits
from ..written import big_checkpoint


def saved_checkpoint(model, folder, shard="200MB", **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=shard, **kwargs)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "note").write_text("kept")
    return folder


MODELS = {
    "llama": (llama, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "attn.c_proj"]),
    "bert": (bert, ["query"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["200MB", "20KB"])
@pytest.mark.parametrize("name", MODELS)
def test_merging_on_disk_equals_merging_in_memory(tmp_path, name, shard, dtype):
    make, targets = MODELS[name]
    base = make().to(dtype)
    folder = saved_checkpoint(base, tmp_path / "base", shard)
    config = random_config(r=8, gralora_k=4, hybrid_r=1, bias="all" if name == "bert" else "none")
    model = gralora.inject(copy.deepcopy(base), targets, config)
    with torch.no_grad():
        for p in gralora.adapter_parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    for format in ("gralora", "peft"):
        gralora.save_adapter(model, tmp_path / format, format=format)
        assert run("merge", folder, tmp_path / format, tmp_path / f"out-{format}") == 0
    gralora.merge_and_unload(model)
    out = tmp_path / "out-gralora"
    there = type(base).from_pretrained(out, dtype=dtype)
    for key, tensor in model.state_dict().items():
        assert same_bits(there.state_dict()[key], tensor), key
    assert relative(logits(model), logits(base)) > 1e-3
    names = {p.name for p in out.iterdir()}
    assert names == {p.name for p in folder.iterdir()}
    assert (len([n for n in names if n.endswith(".safetensors")]) > 1) == (shard == "20KB")
    assert (out / "extra" / "note").read_text() == "kept"
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out-peft" / path.name).read_bytes()
        load_file(path)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 8}])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_attention_and_experts_are_merged_on_disk(tmp_path, transposed, sizes, prefix):
    from ..models import Experts

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.attention = (
                torch.nn.Conv2d(4, 8, 3),
                torch.nn.MultiheadAttention(16, 4, **sizes),
            )
            self.experts = Experts(transposed, dtype=torch.float32)

    model = Net()
    save_file(
        {prefix + key: tensor for key, tensor in model.state_dict().items()},
        tmp_path / "base.safetensors",
    )
    gralora.inject(model, ["conv", "q_proj", "v_proj", "out_proj", "up"], random_config(hybrid_r=1))
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    assert run("info", tmp_path / "a.safetensors") == 0
    assert (
        run(
            "merge",
            tmp_path / "base.safetensors",
            tmp_path / "a.safetensors",
            tmp_path / "out.safetensors",
        )
        == 0
    )
    before = {
        key: tensor.clone() for key, tensor in load_file(tmp_path / "base.safetensors").items()
    }
    there, changed = load_file(tmp_path / "out.safetensors"), 0
    for key, tensor in gralora.merge_and_unload(model).state_dict().items():
        assert same_bits(there[prefix + key], tensor), key
        changed += not torch.equal(tensor, before[prefix + key])
    assert changed == 1 + (3 if sizes else 2) + 1


def test_square_weights_are_merged_in_their_layout_or_refused(tmp_path, capsys):
    base = gpt2()
    model = gralora.inject(copy.deepcopy(base), ["attn.c_proj"], random_config())  # 32 x 32
    save_file(
        {k: t.clone() for k, t in base.transformer.state_dict(prefix="transformer.").items()},
        tmp_path / "m",
    )
    for format in ("gralora", "peft", "lora"):
        gralora.save_adapter(model, tmp_path / format, format=format)
        assert run("merge", tmp_path / "m", tmp_path / format, tmp_path / f"{format}-merged") == 0
    state = gralora.adapter_state_dict(model)
    names = {key.rpartition(".")[0] for key in state}
    fields = {"r": 4, "hybrid_r": 0, "alpha": 8, "gralora_k": 2, "gralora_dropout": 0.0}
    metadata = {
        "format": "gralora",
        "format_version": "1",
        "modules": json.dumps(dict.fromkeys(names, fields)),
    }
    save_file(state, tmp_path / "bare", metadata)
    assert run("merge", tmp_path / "m", tmp_path / "bare", tmp_path / "out") == 1
    assert "c_proj' is square" in capsys.readouterr().err
    gralora.merge_and_unload(model)
    key = "transformer.h.0.attn.c_proj.weight"
    for format in ("gralora", "peft", "lora"):
        assert (
            relative(load_file(tmp_path / f"{format}-merged")[key], model.state_dict()[key]) < 1e-6
        )


def test_heads_trained_whole_are_written_into_the_checkpoint(tmp_path, capsys):
    base = bert()

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.head = copy.deepcopy(base), nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.bert(x).last_hidden_state)

    model = Classifier()
    save_file(
        {k: t.clone() for k, t in model.bert.state_dict(prefix="bert.").items()},
        tmp_path / "m.safetensors",
    )
    gralora.inject(model, ["query"], random_config(modules_to_save=["head", "pooler"]))
    gralora.save_adapter(model, tmp_path / "a")
    assert run("merge", tmp_path / "m.safetensors", tmp_path / "a", tmp_path / "out") == 0
    merged, expected = load_file(tmp_path / "out"), gralora.merge_and_unload(model).state_dict()
    assert set(merged) == set(expected)
    assert all(same_bits(merged[key], expected[key]) for key in expected)
    save_file({k: t.clone() for k, t in base.state_dict().items()}, tmp_path / "m.safetensors")
    assert run("merge", tmp_path / "m.safetensors", tmp_path / "a", tmp_path / "out2") == 1
    assert "of the adapter has no place there" in capsys.readouterr().err


def test_merge_refuses_what_it_would_do_wrongly(adapter, tmp_path, capsys):
    _, path = adapter
    good = {key: t.clone() for key, t in Block().state_dict().items()}
    target = tmp_path / "m.safetensors"
    for change, text in [
        ({"q.weight": torch.ones(16, 16, dtype=torch.int8)}, "q.weight is of type I8"),
        ({"q.weight": torch.ones(16, 8)}, "'q' is of shape (16, 8)"),
        ({"v.weight": torch.full((16, 16), torch.inf)}, "not finite"),
    ]:
        save_file({**good, **change}, target)
        assert run("merge", target, path, tmp_path / "out") == 1
        assert text in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m.safetensors"]
    save_file({**good, "v.weight": good["v.weight"] + 0.1}, target)
    assert run("merge", target, path, tmp_path / "out") == 0
    assert (
        "warning: the adapter was trained on another base: the weights differ in q, v"
        in capsys.readouterr().err
    )
    assert run("merge", target, path, target, "--force") == 1
    assert run("merge", target, path, tmp_path / "out", "--force") == 0


def test_unmerged_weights_beside_are_named_and_force_replaces_a_folder(tmp_path, capsys):
    base = llama()
    folder = saved_checkpoint(base, tmp_path / "base")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    gralora.save_adapter(gralora.inject(base, ["q_proj"], random_config()), tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").write_text("")
    assert run("merge", folder, tmp_path / "a", tmp_path / "out") == 1
    assert run("merge", folder, tmp_path / "a", folder / "out") == 1
    capsys.readouterr()
    assert run("merge", folder, tmp_path / "a", tmp_path / "out", "--force") == 0
    assert "without the adapter: pytorch_model.bin" in capsys.readouterr().err
    assert not (tmp_path / "out" / "stale").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "out"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../a"}}))
    assert run("merge", folder, tmp_path / "a", tmp_path / "out2") == 1
    assert "outside its folder" in capsys.readouterr().err


def test_extract_on_disk_equals_extract_in_memory(tmp_path, capsys):
    base, tuned = gpt2(), gpt2()
    with torch.no_grad():
        for p, q in zip(tuned.parameters(), base.parameters(), strict=True):
            p.copy_(q + torch.randn_like(q) * 0.1)
    one, two = (
        saved_checkpoint(m, tmp_path / n, "20KB") for m, n in ((base, "one"), (tuned, "two"))
    )
    regex = r"transformer\.h\.\d\.attn\.c_(attn|proj)"
    assert run("extract", one, two, tmp_path / "out", "--targets", regex, "-r", 8, "-k", 4) == 0
    shown = capsys.readouterr().out
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "out")
    errors = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gralora.extract(
            base, tuned, regex, gralora.GraloraConfig(r=8, gralora_k=4, alpha=8), errors=errors
        )
    for name, layer in gralora_layers(expected):
        assert (
            relative(gralora.delta_weight(loaded.get_submodule(name)), gralora.delta_weight(layer))
            < 1e-4
        )
        delta = tuned.get_submodule(name).weight - layer.weight
        S = torch.linalg.svdvals(delta.detach())
        assert f"{errors[name]:.4g}" in shown
        assert f"{float(S[8:].norm() / S.norm()):.4g}" in shown
    for args, text in [
        (("--targets", "nothing"), "matches no layer"),
        (
            ("--targets", regex, "-r", 9, "-k", 3),
            "gralora_k=3 does not divide both sizes of 'transformer.h.0.attn.c_attn'",
        ),
        (("--targets", ".*ln_1"), "no plain matrix"),
    ]:
        assert run("extract", one, two, tmp_path / "out2", *args) == 1
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


def test_an_interrupted_merge_leaves_nothing_under_the_final_name(tmp_path):
    model = big_checkpoint(tmp_path / "base", 256)
    gralora.inject(model, "all-linear", random_config(r=2))
    for _, layer in gralora_layers(model):
        layer.gralora_adapters.to_empty(device="cpu")
        layer.gralora_adapters["default"].reset_parameters()
    gralora.save_adapter(model, tmp_path / "a")
    stops = (
        "import os, signal, time; from gralora.files import ondisk; from gralora.__main__ import"
        " main\n"
        # where the tests run in the background, a shell has them ignore it
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "write = ondisk._Merging.write\n"
        "def stopped(self, shard, path):\n"
        "    write(self, shard, path)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        # till the signal is here: code in C may swallow what is raised in its midst
        "    while True: time.sleep(0.01)\n"
        "ondisk._Merging.write = stopped\n"
        "raise SystemExit(main())"
    )
    args = [
        sys.executable,
        "-c",
        stops,
        "merge",
        *(str(tmp_path / n) for n in ("base", "a", "out")),
    ]
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
        os.waitid(
            os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT
        )  # until it has written its first shard
        assert list(tmp_path.glob(".out.*/*.safetensors"))
        process.send_signal(signal_number)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate()
        assert process.returncode == (1 if signal_number == signal.SIGINT else -signal.SIGKILL)
        assert not (tmp_path / "out").exists()
        if signal_number == signal.SIGINT:
            assert "gralora: interrupted" in err and "Traceback" not in err
            assert not list(tmp_path.glob(".out*"))
