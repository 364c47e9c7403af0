"""Injecting into a Llama-shaped model of 70 billion parameters on the meta device: seconds, and
memory of the process.

python -m benchmarks.speed.meta
"""

from __future__ import annotations

import resource

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import gralora
from benchmarks import common

SIZES = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def resident() -> float:
    """MiB of the process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="8 of 80 layers").parse_args(argv)
    config = LlamaConfig(num_hidden_layers=8 if args.quick else 80, vocab_size=128256, **SIZES)
    with torch.device("meta"):
        LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=1, vocab_size=128, **SIZES)
        )  # what the first one imports
    seconds, mib = {}, {}
    model, adapter = torch.nn.Module(), gralora.GraloraConfig(r=64, gralora_k=4)

    def build() -> None:
        nonlocal model
        with torch.device("meta"):
            model = LlamaForCausalLM(config)

    steps = {
        "build": build,
        "inject": lambda: gralora.inject(model, "all-linear", adapter),
        "summary": lambda: gralora.summary(model),
    }
    for name, step in tqdm(steps.items(), desc="meta", mininterval=1):
        before = resident()
        seconds[name], _ = common.timed(step)
        mib[name] = resident() - before
    trainable, total = gralora.count_parameters(model)
    rows = [(name, f"{seconds[name]:.2f}", f"{mib[name]:.1f}") for name in steps]
    print(common.table(("", "seconds", "MiB more at the peak"), rows))
    print(
        f"\n{total - trainable:,} parameters, {trainable:,} in adapters of"
        f" {len(gralora.summary(model))} layers"
    )
    figure = common.bars(
        f"{total / 1e9:.0f} billion parameters on meta",
        "seconds",
        list(steps),
        {"seconds": list(seconds.values())},
    )
    counts = {
        "parameters": total - trainable,
        "trainable": trainable,
        "layers": len(gralora.summary(model)),
    }
    common.write(args.out, "meta", {**counts, "seconds": seconds, "mib": mib}, figure)


if __name__ == "__main__":
    main()
