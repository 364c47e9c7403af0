"""Many adapters resident in one model: what loading, holding, switching and mixing them costs, with
1, 10 and 100 of them.

A Llama of 8 blocks (width 512, 56 linear layers), r = 16, k = 2, in eval. Beside it PEFT's LoRA of
the same rank, and a switch over 1,000 layers with two adapters that changes no training flag.

    python -m benchmarks.speed.many_adapters
    python -m benchmarks.speed.many_adapters --quick
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from tqdm import tqdm

import gralora
from benchmarks import common

R, K = 16, 2
COUNTS = (1, 10, 100)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIB = 2**20


def llama(width: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=1000, num_attention_heads=8, use_cache=False, **sizes)
    ).eval()


def milliseconds(call: Callable[[int], object], rounds: int) -> float:
    """Median over calls with 0, 1, ..."""
    return statistics.median(common.timed(call, index)[0] for index in range(rounds)) * 1e3


def ours(width: int, layers: int, count: int, folder: Path, rounds: int) -> dict[str, float]:
    model = gralora.inject(
        llama(width, layers),
        PROJECTIONS,
        gralora.GraloraConfig(r=R, gralora_k=K, init_weights=False),
    )
    gralora.save_adapter(model, folder / "a.safetensors")
    gralora.unload(model)
    load = milliseconds(
        lambda i: gralora.load_adapter(model, folder / "a.safetensors", f"a{i}"), count
    )
    held = sum(p.numel() * p.element_size() for p in gralora.adapter_parameters(model)) / MIB
    switch = milliseconds(
        lambda i: gralora.set_adapter(model, f"a{i % count}", trainable=False), rounds
    )
    tokens = torch.randint(1000, (8, 16))
    names = [f"a{i % count}" for i in range(8)]

    def mixed(_: int) -> None:
        with gralora.mixed_batch(model, names):
            model(tokens)

    with torch.no_grad():
        forward = milliseconds(lambda i: model(tokens), rounds)
        return {
            "load, ms each": load,
            "MiB held": held,
            "switch, ms": switch,
            "forward of 8 x 16 tokens, ms": forward,
            "each row another, ms": milliseconds(mixed, rounds),
        }


def theirs(width: int, layers: int, count: int, folder: Path, rounds: int) -> dict[str, float]:
    config = peft.LoraConfig(r=R, target_modules=PROJECTIONS, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(width, layers), config, adapter_name="a0")
        model.save_pretrained(str(folder / "peft"))
        load = milliseconds(
            lambda i: model.load_adapter(str(folder / "peft" / "a0"), f"b{i}"), count
        )
        names = [f"b{i}" for i in range(count)]
        switch = milliseconds(lambda i: model.set_adapter(names[i % count]), rounds)
    own = [p for name, p in model.named_parameters() if ".b" in name and "lora_" in name]
    held = sum(p.numel() * p.element_size() for p in own) / MIB
    tokens, rows = torch.randint(1000, (8, 16)), [names[i % count] for i in range(8)]
    with torch.no_grad():
        forward = milliseconds(lambda i: model(tokens), rounds)
        mixed = milliseconds(lambda i: model(tokens, adapter_names=rows), rounds)
    return {
        "load, ms each": load,
        "MiB held": held,
        "switch, ms": switch,
        "forward of 8 x 16 tokens, ms": forward,
        "each row another, ms": mixed,
    }


def thousand(count: int, rounds: int) -> float:
    """set_adapter over `count` layers with two adapters, no training flag changed: ms."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)])
    for name in ("a", "b"):
        gralora.inject(model, "all-linear", gralora.GraloraConfig(r=2), adapter_name=name)
    gralora.set_adapter(model, "a", trainable=False)
    return milliseconds(lambda i: gralora.set_adapter(model, "ba"[i % 2], trainable=False), rounds)


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="width 64, 1 block, 1 and 3 adapters").parse_args(argv)
    (width, layers), counts, rounds = ((64, 1), (1, 3), 4) if args.quick else ((512, 8), COUNTS, 21)
    result: dict[str, dict[str, Any]] = {}
    for count in tqdm(counts, desc="many_adapters"):
        with tempfile.TemporaryDirectory() as folder:
            result[f"{count} adapters"] = {
                "gralora": ours(width, layers, count, Path(folder), rounds),
                "LoRA (PEFT)": theirs(width, layers, count, Path(folder), rounds),
            }
    flat = thousand(100 if args.quick else 1000, rounds)
    what = list(next(iter(result.values()))["gralora"])
    rows = [
        (case, who, *(f"{v[w]:.2f}" for w in what))
        for case, own in result.items()
        for who, v in own.items()
    ]
    print(common.table(("", "", *what), rows))
    print(f"\nset_adapter over 1,000 layers with two adapters: {flat:.1f} ms")
    series = {
        who: [own[who]["switch, ms"] for own in result.values()]
        for who in ("gralora", "LoRA (PEFT)")
    }
    figure = common.bars("A switch among many adapters", "ms", list(result), series)
    common.write(args.out, "many_adapters", {"cases": result, "thousand_layers_ms": flat}, figure)


if __name__ == "__main__":
    main()
