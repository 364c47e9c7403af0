"""A batch of 32 rows, each through one of 8 adapters: `mixed_batch` against running the rows one by
one.

python -m benchmarks.speed.mixed_batch

A GPT-2-shaped model in eval, "all-linear", r 16, k 2; rows of one token (as in decoding) to 64.
"One by one" runs a forward for each row and switches the adapter 8 times in all; "one by adapter"
runs 8 forwards of the 4 rows that share one; "base" is the 32 rows without any adapter.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import Any

import peft
import torch
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import gralora
from benchmarks import common

ROWS, ADAPTERS, R, K = 32, 8, 16, 2
ORDER = [f"a{row % ADAPTERS}" for row in range(ROWS)]


def gpt2(width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "n_embd": width,
        "n_layer": layers,
        "n_head": width // 64,
        "vocab_size": 1000,
        "n_positions": 128,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False)).eval()


def adapted(width: int, layers: int) -> nn.Module:
    model = gpt2(width, layers)
    for index in range(ADAPTERS):
        config = gralora.GraloraConfig(r=R, gralora_k=K, init_weights=False, alpha=R)
        gralora.inject(model, "all-linear", config, adapter_name=f"a{index}")
    return model.eval()


def peft_adapted(width: int, layers: int) -> nn.Module:
    config = peft.LoraConfig(
        r=R, target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D's layout
        model = peft.get_peft_model(gpt2(width, layers), config, adapter_name="a0")
        for index in range(1, ADAPTERS):
            model.add_adapter(f"a{index}", config)
    return model.eval()


def by_groups(model: nn.Module, tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Rows sorted by adapter, `size` of them in a forward."""
    rows = sorted(range(ROWS), key=lambda row: ORDER[row])
    result: list[Any] = [None] * ROWS
    for name, own in groupby(rows, key=lambda row: ORDER[row]):
        gralora.set_adapter(model, name)
        group = list(own)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            for row, logits in zip(part, model(tokens[part]).logits, strict=True):
                result[row] = logits
    return torch.stack(result)


def variants(width: int, layers: int, length: int) -> dict[str, Callable[[], torch.Tensor]]:
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = common.placed(
        torch.randint(0, 1000, (ROWS, length), generator=generator, device="cpu")
    )
    plain, ours, theirs = gpt2(width, layers), adapted(width, layers), peft_adapted(width, layers)

    def mixed() -> torch.Tensor:
        with gralora.mixed_batch(ours, ORDER):
            return ours(tokens).logits

    return {
        "base": lambda: plain(tokens).logits,
        "mixed_batch": mixed,
        "one by adapter": lambda: by_groups(ours, tokens, ROWS // ADAPTERS),
        "one by one": lambda: by_groups(ours, tokens, 1),
        "mixed LoRA (PEFT)": lambda: theirs(tokens, adapter_names=ORDER).logits,
    }


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = common.parser(
        __doc__, quick="width 128, 2 layers, rows of 1 and 8 tokens, 2 rounds"
    ).parse_args(argv)
    width, layers, rounds = (128, 2, 2) if args.quick else (768, 12, 5)
    lengths = (1, 8) if args.quick else (1, 4, 16, 64)
    rows, result = [], {}
    for length in tqdm(lengths, desc="mixed_batch", mininterval=1):
        runs = variants(width, layers, length)
        torch.testing.assert_close(
            runs["mixed_batch"](), runs["one by one"](), rtol=1e-3, atol=1e-4
        )
        times = common.interleaved(runs, rounds)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        faster = common.ratio(times, "one by one", "mixed_batch")
        rows.append((length, *(f"{value * 1e3:.1f}" for value in seconds.values()), faster))
        result[length] = {"seconds": seconds, "one by one over mixed_batch": faster}
    names = list(runs)
    print(
        common.table(
            ("tokens a row", *(f"{name}, ms" for name in names), "times faster than one by one"),
            rows,
        )
    )
    series = {
        name: [result[n]["seconds"][name] / result[n]["seconds"]["base"] for n in lengths]
        for name in names[1:]
    }
    figure = common.bars(
        f"{ROWS} rows, {ADAPTERS} adapters",
        "time over base",
        [f"{n} tokens" for n in lengths],
        series,
    )
    sizes = {"rows": ROWS, "adapters": ADAPTERS, "r": R, "k": K, "width": width, "layers": layers}
    common.write(args.out, "mixed_batch", {**sizes, "lengths": result}, figure)


if __name__ == "__main__":
    main()
