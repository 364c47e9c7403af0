"""Mutated adapter files, from a seed, and what loading one must come to: a clean error, or an
adapter that works.

python -m tests.fuzzing --count 100000      more of what tests/test_hostile.py runs
python -m tests.fuzzing --atheris 600       coverage-guided, for so many seconds (needs atheris)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import gralora
from gralora import GraloraConfig

from .models import Experts, assert_same, fingerprint

SLOWEST, LONGEST = 1.0, 20_000  # second, letters


class Net(nn.Module):
    """One of each kind of layer, small."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.head = nn.Linear(8, 8), nn.Conv1d(8, 8, 2), nn.Linear(8, 4)
        self.experts, self.attention = (
            Experts(dtype=torch.float32),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )

    def forward(self, x):
        x = self.conv(self.fc(x).mT).mT
        return self.head(self.attention(x, x, x)[0]).sum() + self.experts(x).sum()


def seeds(folder: Path) -> list[Path]:
    """Valid adapters of every format and with everything in them."""
    torch.manual_seed(0)
    everything = gralora.inject(
        Net(),
        ["fc", "conv", "up", "attention"],
        GraloraConfig(
            r=4, hybrid_r=1, bias="gralora_only", modules_to_save=["head"], init_weights=False
        ),
    )
    gralora.save_adapter(everything, folder / "everything")
    linear = gralora.inject(
        Net(), ["fc"], GraloraConfig(r=4, bias="gralora_only", modules_to_save=["head"])
    )
    for format in ("gralora", "peft", "lora"):
        gralora.save_adapter(linear, folder / format, format=format)
    varied = {
        "fc": GraloraConfig(r=2),
        "conv": GraloraConfig(r=4),
        "attention": GraloraConfig(r=4, alpha=3),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gralora.save_adapter(gralora.inject(Net(), varied), folder / "varied", format="lora")
    return [folder / name for name in ("everything", "gralora", "peft", "lora", "varied")]


WEIRD = [
    *(
        0,
        1,
        -1,
        3,
        2**31,
        2**63,
        2**70,
        -(2**63),
        0.5,
        1e308,
        -0.0,
        True,
        False,
        None,
        "",
        "4",
        "fc",
        "..",
        "../../x",
    ),
    *(
        "\x00",
        "é" * 50,
        [],
        {},
        [1],
        [[]],
        {"a": 1},
        [2, 4, 4],
        [0],
        [-1, 4],
        [2**40, 2**40],
        [1] * 70,
        "F32",
        "I64",
        "C64",
    ),
    *(
        "BOOL",
        "gralora",
        "head",
        "fc.gralora_A",
        "fc.bias",
        "1" * 5000,
        ".*" * 300,
        "(a+)+$",
        float("nan"),
        float("inf"),
    ),
]


def mutated_json(rng: random.Random, value: object, depth: int = 0) -> object:
    """`value` with something in it changed, removed, doubled or put elsewhere."""
    if (
        isinstance(value, str) and value[:1] in '{["' and depth < 8
    ):  # JSON within JSON: the metadata
        try:
            return json.dumps(mutated_json(rng, json.loads(value), depth + 1))
        except ValueError:
            pass
    if isinstance(value, dict) and value and rng.random() < 0.85:
        result, key = dict(value), rng.choice(list(value))
        action = rng.random()
        if action < 0.6:
            result[key] = mutated_json(rng, result[key], depth + 1)
        elif action < 0.7:
            del result[key]
        elif action < 0.85:
            result[
                rng.choice([str(rng.choice(WEIRD)), key + "x", key[1:], rng.choice(list(value))])
            ] = result.pop(key)
        else:
            result[str(rng.choice(WEIRD))] = copy.deepcopy(rng.choice(list(value.values())))
        return result
    if isinstance(value, list) and value and rng.random() < 0.7:
        result = list(value)
        index = rng.randrange(len(result))
        result[index : index + 1] = rng.choice(
            [[], [result[index]] * 2, [mutated_json(rng, result[index], depth + 1)]]
        )
        return result
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice([-8, -1, 1, 4, 8, value])
    return rng.choice(WEIRD)


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, body: bytes) -> bytes:
    text = (
        header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    )
    return struct.pack("<Q", len(text)) + text + body


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with something wrong in it."""
    header, body = split(data)
    kind = rng.randrange(10)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        return bytes(broken)
    if kind == 2:
        length = rng.choice(
            [0, 1, 7, len(data), 2**24, 2**32, 2**63, 2**64 - 1, rng.randrange(2 * len(data))]
        )
        return struct.pack("<Q", length) + data[8:]
    if kind == 3:  # values that no training gives
        broken, place = bytearray(body), 4 * rng.randrange(len(body) // 4)
        broken[place : place + 4] = struct.pack(
            "<f", rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])
        )
        return joined(header, bytes(broken))
    if kind == 4:
        text = json.dumps(header).encode()
        deep = rng.choice([100, 1000, 100_000])
        piece = rng.choice(
            [
                b"[" * deep,
                b'{"a":' * deep,
                b" " * deep,
                text[: rng.randrange(len(text))],
                b'"' + b"x" * deep,
            ]
        )
        return joined(text[:1] + piece + text[1:], body)
    if kind == 5:  # a key twice
        text, key = json.dumps(header), rng.choice(list(header))
        return joined(
            (
                "{"
                + json.dumps(key)
                + ":"
                + json.dumps(mutated_json(rng, header[key]))
                + ","
                + text[1:]
            ).encode(),
            body,
        )
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        new = mutated_json(rng, header)
        header = new if isinstance(new, dict) else header
    return joined(header, body)


def mutant(rng: random.Random, seed: Path, target: Path) -> None:
    """Write a mutation of `seed` to `target`."""
    if seed.is_file():
        target.write_bytes(mutated(rng, seed.read_bytes()))
        return
    shutil.copytree(seed, target)
    weights, config = target / "adapter_model.safetensors", target / "adapter_config.json"
    which = rng.random()
    if which < 0.4:
        weights.write_bytes(mutated(rng, weights.read_bytes()))
    elif which < 0.5:
        data = bytearray(config.read_bytes())
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        config.write_bytes(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
    elif which < 0.53:
        (target / "adapter_model.bin").write_bytes(b"\x80\x04.")
    elif which < 0.56:
        rng.choice([weights, config]).unlink()
    else:
        content = json.loads(config.read_text())
        for _ in range(rng.choice([1, 1, 2])):
            content = mutated_json(rng, content)
        config.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


class Target:
    """A model, and the check that a file does it no harm."""

    def __init__(self) -> None:
        self.model = Net()
        self.before = fingerprint(self.model)
        self.x = torch.randn(2, 5, 8)
        self.slowest = 0.0

    def meets(self, path: Path) -> str:
        """Load `path`; "refused" or "loaded". Anything else that happens is raised."""
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                gralora.load_adapter(self.model, path, trainable=True)
        except gralora.AdapterFileError as error:
            self._took(start)
            if not 0 < len(str(error)) < LONGEST:
                raise RuntimeError(f"{path}: an error of {len(str(error))} letters") from error
            assert_same(fingerprint(self.model), self.before)
            return "refused"
        self._took(start)
        for mode in (True, False):
            self.model.train(mode)(self.x)
        state = gralora.adapter_state_dict(self.model)
        assert all(t.isfinite().all() for t in state.values())
        gralora.summary(self.model)
        gralora.unload(self.model).train()
        assert_same(fingerprint(self.model), self.before)
        return "loaded"

    def _took(self, start: float) -> None:
        self.slowest = max(self.slowest, time.perf_counter() - start)
        assert self.slowest < SLOWEST, f"{self.slowest} s"


def fuzz(folder: Path, count: int, seed: int) -> Counter:
    """`count` mutants; raises at the first that is neither refused cleanly nor loaded rightly,
    which is left in `folder`.
    """
    rng, valid, target, outcomes = random.Random(seed), seeds(folder), Target(), Counter()
    for each in valid:
        assert target.meets(each) == "loaded"
    for number in range(count):
        path = folder / f"mutant {seed} {number}"
        mutant(rng, rng.choice(valid), path)
        outcomes[target.meets(path)] += 1
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return outcomes


def coverage_guided(folder: Path, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["gralora"]):
        for name in [name for name in sys.modules if name.startswith("gralora")]:
            del sys.modules[name]
        from gralora.files import own
    valid = [path for path in seeds(folder) if path.is_file()]
    corpus = folder / "corpus"
    corpus.mkdir()
    for each in valid:
        shutil.copy(each, corpus)

    def one(data: bytes) -> None:
        path = folder / "input"
        path.write_bytes(data)
        with contextlib.suppress(own.AdapterFileError):
            own.read_gralora(path)

    atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={seconds}"], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", type=int, metavar="SECONDS")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    if args.atheris:
        coverage_guided(folder, args.atheris)
        return
    start = time.perf_counter()
    print(dict(fuzz(folder, args.count, args.seed)), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
