"""A training step of a mixture of experts with adapters on its fused weights, against the frozen
model and PEFT.

A Qwen3-MoE-like model (hidden 512, 2 layers, 4 experts a token, 512 tokens), r 16, k 2 on every
expert, float32; gradients by way of the same embedded inputs everywhere; 8, 32 and 128 experts, and
both implementations that transformers runs.

    python -m benchmarks.speed.experts
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from tqdm import tqdm

import gralora
from benchmarks import common
from benchmarks.speed._counting import kept_for_backward

FROZEN, OURS, PEFT = "frozen", "gralora", "LoRA (PEFT)"
PARTS = ("gate_up_proj", "down_proj")


def mixture(experts: int, implementation: str, *, quick: bool) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    width = 64 if quick else 512
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width // 2,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=1000, num_experts=experts, num_experts_per_tok=4, **sizes, **heads
        )
    )
    model.set_experts_implementation(implementation)
    return model.requires_grad_(False)


def variants(base: nn.Module) -> dict[str, nn.Module]:
    config = gralora.GraloraConfig(r=16, gralora_k=2, init_weights=False)
    theirs = peft.LoraConfig(
        r=16, target_modules=[], target_parameters=[f"experts.{part}" for part in PARTS]
    )
    return {
        FROZEN: base,
        OURS: gralora.inject(copy.deepcopy(base), r".*experts\.(gate_up|down)_proj", config),
        PEFT: peft.get_peft_model(copy.deepcopy(base), theirs).base_model.model,
    }


def step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()

    def run() -> None:
        embedded.grad = None
        model.zero_grad()
        model(inputs_embeds=embedded).logits.square().mean().backward()

    return run


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="width 64, 4 and 8 experts, two rounds").parse_args(argv)
    counts, rounds, length = ((4, 8), 2, 32) if args.quick else ((8, 32, 128), 7, 512)
    rows, result = [], []
    cases = [
        (count, implementation) for count in counts for implementation in ("eager", "grouped_mm")
    ]
    for count, implementation in tqdm(cases, desc="experts", mininterval=1):
        tokens = torch.randint(0, 1000, (1, length))
        models = variants(mixture(count, implementation, quick=args.quick))
        times = common.interleaved(
            {name: step(model, tokens) for name, model in models.items()}, rounds
        )
        kept = {}
        for name, model in models.items():
            embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
            forward: Callable[[], Any] = lambda m=model, e=embedded: m(inputs_embeds=e).logits  # noqa: E731
            kept[name] = kept_for_backward(forward, list(model.parameters())) / 2**20
        seconds = {name: statistics.median(values) for name, values in times.items()}
        ratios = {name: common.ratio(times, name, FROZEN) for name in (OURS, PEFT)}
        case = f"{count} experts, {implementation}"
        result.append({"case": case, "seconds": seconds, "over frozen": ratios, "MiB kept": kept})
        told = [f"{seconds[name] * 1e3:.0f}" for name in models] + [
            f"{ratio:.2f}" for ratio in ratios.values()
        ]
        rows.append((case, *told, *(f"{kept[name]:.1f}" for name in models)))
    head = (
        "",
        *(f"{n}, ms" for n in models),
        f"{OURS} over frozen",
        f"{PEFT} over frozen",
        *(f"{n}, MiB kept" for n in models),
    )
    print("\n" + common.table(head, rows))
    series = {name: [case["over frozen"][name] for case in result] for name in (OURS, PEFT)}
    figure = common.bars(
        "A training step, over the frozen model's",
        "ratio",
        [case["case"] for case in result],
        series,
    )
    common.write(args.out, "experts", {"cases": result}, figure)


if __name__ == "__main__":
    main()
