"""A whole training step (forward, backward, AdamW) of real architectures with random weights,
"all-linear".

python -m benchmarks.speed.step
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import common
from benchmarks.speed._variants import OURS, PEFT_GRALORA, PEFT_LORA, build

NAMES = (OURS, PEFT_GRALORA, PEFT_LORA)


def architectures(width: int, layers: int) -> dict[str, tuple[nn.Module, list[str]]]:
    """Causal or masked language models, and the names of their linear layers but the head."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "vocab_size": 1000,
    }
    bert = BertForMaskedLM(BertConfig(intermediate_size=4 * width, **shape))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=8, vocab_size=1000))
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=3 * width, **shape))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "BERT": (bert, ["query", "key", "value", "dense"]),
        "GPT-2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
        "Llama": (llama, projections),
    }


def step_of(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="two small layers, few rounds").parse_args(argv)
    width, layers, rounds = (64, 2, 3) if args.quick else (512, 4, 9)
    tokens = torch.arange(4 * 128).reshape(4, 128)
    results: dict[str, dict[str, float]] = {}
    for name, (base, targets) in tqdm(
        architectures(width, layers).items(), desc="step", mininterval=1
    ):
        models = build(base, targets, 32, 2, names=NAMES)
        times = common.interleaved({n: step_of(m, tokens) for n, m in models.items()}, rounds)
        results[name] = {n: statistics.median(t) for n, t in times.items()}
        results[name] |= {"over_peft_gralora": common.ratio(times, OURS, PEFT_GRALORA)}
        results[name] |= {"over_peft_lora": common.ratio(times, OURS, PEFT_LORA)}
    head = ("", *(f"{n}, ms" for n in NAMES), "over GraLoRA (PEFT)", "over LoRA (PEFT)")
    rows = [
        (
            name,
            *(f"{v[n] * 1e3:.0f}" for n in NAMES),
            f"{v['over_peft_gralora']:.2f}",
            f"{v['over_peft_lora']:.2f}",
        )
        for name, v in results.items()
    ]
    print(common.table(head, rows))
    series = {n: [v[n] * 1e3 for v in results.values()] for n in NAMES}
    title = f"A training step, width {width}, {layers} layers, 512 tokens, r = 32, k = 2"
    common.write(
        args.out, "step", {"results": results}, common.bars(title, "ms", list(results), series)
    )


if __name__ == "__main__":
    main()
