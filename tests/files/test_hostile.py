"""Nothing let in: an adapter file comes from strangers."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gralora
from gralora import AdapterFileError

from ..fuzzing import Target, fuzz, joined, seeds, split
from ..models import assert_same, fingerprint, mlp, random_config
from ..needs import parts

CHUNKS, MUTANTS = 8, 1500


@pytest.mark.parametrize("seed", parts(CHUNKS))
def test_mutants_are_refused_cleanly_or_load_rightly(seed, tmp_path):
    outcomes = fuzz(tmp_path, MUTANTS, seed)
    assert sum(outcomes.values()) == MUTANTS
    assert (
        outcomes["refused"] > MUTANTS / 4 and outcomes["loaded"] > MUTANTS / 20
    )  # neither is trivial


@pytest.mark.parametrize("name", ["everything", "lora"])
def test_truncated_at_every_byte_of_the_header_and_at_some_of_the_body(name, tmp_path):
    valid = next(path for path in seeds(tmp_path) if path.name == name)
    place = valid if valid.is_file() else valid / "adapter_model.safetensors"
    data, target = place.read_bytes(), Target()
    (length,) = struct.unpack("<Q", data[:8])
    for end in [*range(8 + length), *range(8 + length, len(data), 97), len(data) - 1]:
        place.write_bytes(data[:end])
        assert target.meets(valid) == "refused"
    place.write_bytes(data + b"\0")
    assert target.meets(valid) == "refused"
    place.write_bytes(data)
    assert target.meets(valid) == "loaded"


def adapter(tmp_path, **fields):
    """A valid file, its header and its body."""
    path = tmp_path / "adapter.safetensors"
    gralora.save_adapter(gralora.inject(mlp(16, 8), ["0"], random_config(**fields)), path)
    return path, *split(path.read_bytes())


def refused(path, text, model=None):
    model = model or mlp(16, 8)
    before = fingerprint(model)
    with pytest.raises(AdapterFileError) as error:
        gralora.load_adapter(model, path)
    assert text in str(error.value), error.value
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("r", 0, "r=0 is not legal"),
        ("r", -4, "r=-4 is not legal"),
        ("r", 4.0, "r=4.0 is a float"),
        ("r", True, "r=True is a bool"),
        ("r", "4", "r='4' is a str"),
        ("r", 2**31, "the metadata means"),
        ("r", 2**80, "at most 2**31"),
        ("hybrid_r", -1, "hybrid_r=-1"),
        ("hybrid_r", 2**30, "the metadata means"),
        ("gralora_k", 0, "gralora_k=0"),
        ("gralora_k", 4, "gralora_A has shape (2, 8, 4)"),
        ("gralora_k", 3, "does not divide r=4"),
        ("alpha", 0, "alpha=0 is not legal"),
        ("alpha", -1.5, "alpha=-1.5"),
        ("alpha", 1e300, "at most 1e+30"),
        ("alpha", 10**400, "no finite float"),
        ("alpha", None, "alpha=None"),
        ("gralora_dropout", -1, "gralora_dropout=-1"),
        ("gralora_dropout", 1, "gralora_dropout=1"),
        ("gralora_dropout", [0.1], "gralora_dropout=[0.1]"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_every_field_of_the_metadata_is_checked_before_anything_is_allocated(
    tmp_path, monkeypatch, field, value, text
):
    path, header, body = adapter(tmp_path)
    modules = json.loads(header["__metadata__"]["modules"])
    modules["0"][field] = value
    header["__metadata__"]["modules"] = json.dumps(modules)
    path.write_bytes(joined(header, body))
    model = mlp(16, 8)
    monkeypatch.setattr("gralora.layers.adapter.GraloraAdapter.__init__", None)
    monkeypatch.setattr(torch, "empty", None)
    refused(path, text, model)


def test_names_that_lead_elsewhere(tmp_path):
    for name in (
        "..",
        "../../etc/passwd",
        "0.weight",
        "1",
        "0.",
        ".0",
        "",
        "gralora_adapters",
        "0.gralora_adapters.x",
    ):
        path, header, body = adapter(tmp_path)
        modules = json.loads(header["__metadata__"]["modules"])
        header["__metadata__"]["modules"] = json.dumps({name: modules["0"]})
        header = {
            key.replace("0.", f"{name}.", 1) if key[0] == "0" else key: value
            for key, value in header.items()
        }
        path.write_bytes(joined(header, body))
        model = mlp(16, 8)
        before = fingerprint(model)
        with pytest.raises(AdapterFileError):
            gralora.load_adapter(model, path)
        assert_same(fingerprint(model), before)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter.safetensors"}


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
@pytest.mark.parametrize("format", ["gralora", "peft", "lora"])
def test_types_that_no_adapter_has(tmp_path, dtype, format):
    path = tmp_path / "adapter"
    model = gralora.inject(nn.ModuleDict({"fc": nn.Linear(16, 8)}), ["fc"], random_config())
    gralora.save_adapter(model, path, format=format)
    place = path if path.is_file() else path / "adapter_model.safetensors"
    header, _ = split(place.read_bytes())
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(place).items()}
    save_file(tensors, place, header.get("__metadata__"))
    with pytest.raises(AdapterFileError, match="is of type .*; legal are F64, F32, F16, BF16"):
        gralora.load_adapter(nn.ModuleDict({"fc": nn.Linear(16, 8)}), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", ["gralora", "peft", "lora"])
def test_values_that_are_not_finite_are_refused_unless_allowed(tmp_path, format, value):
    def net():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(16, 8), "head": nn.Linear(8, 2)})

    for place in ("fc", "head"):
        model = gralora.inject(net(), ["fc"], random_config(modules_to_save=["head"]))
        with torch.no_grad():
            owner = (
                model["fc"].gralora_adapters["default"].A if place == "fc" else model["head"].weight
            )
            owner.view(-1)[3] = value
        path = tmp_path / f"{format}-{place}"
        gralora.save_adapter(model, path, format=format)
        other = net()
        before = fingerprint(other)
        with pytest.raises(
            AdapterFileError,
            match=f"{place}.*holds values that are not finite.*allow_nonfinite=True",
        ):
            gralora.load_adapter(other, path)
        assert_same(fingerprint(other), before)
        gralora.load_adapter(other, path, allow_nonfinite=True)
        state = gralora.adapter_state_dict(other)
        assert not all(tensor.isfinite().all() for tensor in state.values())


def test_a_header_of_100_megabytes_is_not_read(tmp_path):
    path, header, body = adapter(tmp_path)
    path.write_bytes(joined(json.dumps(header).encode().ljust(10**8), body))
    refused(path, "claims a header of 100000000 bytes")
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(path, "claims a header of")


def test_deep_and_doubled_json(tmp_path):
    for depth in (100, 1000, 100_000):
        path, header, body = adapter(tmp_path)
        header["__metadata__"]["modules"] = "[" * depth + "]" * depth
        path.write_bytes(joined(header, body))
        refused(path, "metadata 'modules'")
    path, header, body = adapter(tmp_path)
    text = header["__metadata__"]["modules"]
    header["__metadata__"]["modules"] = text[:-1] + ", " + text[1:]
    path.write_bytes(joined(header, body))
    refused(path, "a key stands twice")


def test_overlapping_tensors_and_lengths_beyond_the_file(tmp_path):
    for change in ([0, 8], [8, 4], [0, 2**40], [-8, 0], [0]):
        path, header, body = adapter(tmp_path)
        key = next(key for key in header if key.endswith("gralora_B"))
        header[key]["data_offsets"] = change
        path.write_bytes(joined(header, body))
        refused(path, "cannot be read as a safetensors file")


def test_a_folder_with_a_pickle_is_refused_by_name_and_the_pickle_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    folder = tmp_path / "folder"
    gralora.save_adapter(
        gralora.inject(nn.ModuleDict({"0": nn.Linear(16, 8)}), ["0"], random_config()),
        folder,
        format="peft",
    )
    torch.save(Trap(), folder / "adapter_model.bin")
    refused(folder, "holds adapter_model.bin, a pickle, which can run any code and is never opened")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "adapter_model.bin, a pickle")
    plain = tmp_path / "adapter.safetensors"
    torch.save(Trap(), plain)
    refused(plain, "cannot be read as a safetensors file")
    assert not (tmp_path / "opened").exists()


def test_a_config_that_is_no_json(tmp_path):
    folder = tmp_path / "folder"
    gralora.save_adapter(
        gralora.inject(nn.ModuleDict({"0": nn.Linear(16, 8)}), ["0"], random_config()),
        folder,
        format="lora",
    )
    for content in (
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[1]",
        b'{"peft_type": "LORA", "r": NaN}',
        b"[" * 100_000,
    ):
        (folder / "adapter_config.json").write_bytes(content)
        refused(folder, "adapter_config.json")


CODE = """
import sys, resource, torch, gralora
from torch import nn
model = nn.Linear(8, 8)
try:
    gralora.load_adapter(model, sys.argv[1] + ".warm-up")
except (gralora.AdapterFileError, FileNotFoundError):
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    gralora.load_adapter(model, sys.argv[1])
    print("loaded")
except gralora.AdapterFileError as error:
    print(str(error)[:100])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(
    "case",
    ["long header", "many modules", "a rank of a billion", "a large adapter of another model"],
)
def test_no_memory_beyond_ten_times_the_file(tmp_path, case):
    path, header, body = adapter(tmp_path)
    modules = json.loads(header["__metadata__"]["modules"])
    if case == "long header":
        data = joined(json.dumps(header).encode().ljust(2**25 - 100), body)
    elif case == "many modules":
        header["__metadata__"]["modules"] = json.dumps(
            {f"layer{i}": modules["0"] for i in range(100_000)}
        )
        data = joined(header, body)
    elif case == "a rank of a billion":
        modules["0"]["r"] = 2**30
        header["__metadata__"]["modules"] = json.dumps(modules)
        data = joined(header, body.ljust(2**22))
    else:
        gralora.save_adapter(gralora.inject(nn.Linear(4096, 4096), "", random_config(r=256)), path)
        data = path.read_bytes()
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=True
    )
    outcome, grown = done.stdout.splitlines()
    assert outcome != "loaded"
    assert int(grown) < 10 * len(data) + 2**24, (outcome, int(grown) / len(data))
