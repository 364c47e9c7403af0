"""A real language model: training, prefill and decoding of SmolLM2-135M, adapted on all linear
layers but the head.

Beside it the frozen model, PEFT's LoRA and GraLoRA, and the adapter merged. "Above" is the time
above the frozen model's, round by round. Training is forward, backward and AdamW over 4 x 128 and 1
x 512 tokens, with and without activation checkpointing (its frozen step has a gradient through the
same layers, to the embeddings); decoding is greedy, one token at a time behind 64, with a dynamic
and a static cache, in eager mode and compiled. Bytes are the allocator's peak above what was held
before.

    python -m benchmarks.speed.chat_model                     40 minutes on two cores; goes on where
    it was interrupted python -m benchmarks.speed.chat_model --parts training    some of it python
    -m benchmarks.speed.chat_model --quick             two blocks of the model, few tokens python -m
    benchmarks.speed.chat_model --device cuda
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gralora
from benchmarks import common
from benchmarks.jobs.chat import load_chat
from benchmarks.speed._counting import peak
from benchmarks.speed._variants import FROZEN, OURS, PEFT_GRALORA, PEFT_LORA, build

MERGED = "merged"
NAMES = (FROZEN, OURS, PEFT_GRALORA, PEFT_LORA)
SHAPES = ((32, 2), (64, 4))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = ("training", "prefill", "decoding", "compiled")
FILE = "speed_chat_model"  # the experiment of that name has a file too
MIB = 2**20


class Case(NamedTuple):
    """One thing that is measured."""

    part: str
    what: str
    r: int
    k: int
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.part}, {self.what}, r = {self.r}, k = {self.k}, {self.dtype}"


def base_model(dtype: torch.dtype, device: str, quick: bool) -> nn.Module:
    model = load_chat().model(2 if quick else None)
    return model.to(device, dtype).requires_grad_(False)


def variants(base: nn.Module, r: int, k: int) -> dict[str, nn.Module]:
    """Each of the four, with an adapter that acts."""
    models = build(base, PROJECTIONS, r, k, names=NAMES)
    with torch.no_grad():
        for model in models.values():
            for name, parameter in model.named_parameters():
                if name.endswith((".B", "lora_B.default.weight", "gralora_B.default")):
                    parameter.normal_(std=1e-3)
    return models


def training(model: Any, tokens: torch.Tensor, checkpointing: bool) -> Callable[[], None]:
    """A step; the frozen model's has a gradient to the embeddings' output, which is what every
    adapter needs of it too.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None

    def step() -> None:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        x = model.get_input_embeddings()(tokens).detach().requires_grad_()
        if optimizer is not None:
            optimizer.zero_grad()
        model(inputs_embeds=x, labels=tokens, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


@torch.no_grad()
def prefill(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model(tokens, use_cache=False, logits_to_keep=1)

    model.eval()
    return torch.no_grad()(run)


def decoding(
    model: Any, prompt: torch.Tensor, count: int, static: bool, compiled: bool
) -> Callable[[], None]:
    """`count` tokens behind the prompt, the likeliest each."""
    from transformers import DynamicCache, StaticCache

    model.eval()
    # it looks at what a layer is, and a module that is replaced is compiled anew
    run = torch.compile(model, dynamic=not static) if compiled else model
    length = prompt.shape[1]

    def fresh() -> Any:
        return (
            StaticCache(model.config, max_cache_len=length + count)
            if static
            else DynamicCache(config=model.config)
        )

    @torch.no_grad()
    def generate() -> None:
        cache = fresh()
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        for index in range(count - 1):
            position = torch.arange(length + index, length + index + 1, device=prompt.device)
            out = run(token, past_key_values=cache, position_ids=position[None])
            token = out.logits[:, -1:].argmax(-1)

    return generate


def cases(parts: list[str], quick: bool) -> Iterator[Case]:
    shapes, dtypes = (SHAPES[:1], ("float32",)) if quick else (SHAPES, ("float32", "bfloat16"))
    for part, (r, k), dtype in itertools.product(parts, shapes, dtypes):
        if part == "training":
            for what in ("4 x 128", "1 x 512", "4 x 128, checkpointing", "1 x 512, checkpointing")[
                : 1 if quick else None
            ]:
                yield Case(part, what, r, k, dtype)
        elif part == "prefill":
            yield Case(part, "1 x 512", r, k, dtype)
        elif part == "decoding":
            yield from (Case(part, what, r, k, dtype) for what in ("dynamic cache", "static cache"))
        elif (r, k) == SHAPES[0] and dtype == "float32":
            yield from (
                Case("decoding", f"{what}, compiled", r, k, dtype)
                for what in ("dynamic cache", "static cache")
            )


def runs_of(
    case: Case, models: dict[str, nn.Module], device: str, quick: bool
) -> tuple[dict[str, Callable[[], None]], int]:
    """What is timed of every model, and by how many tokens its time is to be divided."""
    generator = torch.Generator("cpu").manual_seed(0)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(1000, 40_000, shape, generator=generator, device="cpu").to(device)

    if case.part == "training":
        batch = (
            tokens(2, 16) if quick else tokens(*map(int, case.what.partition(",")[0].split(" x ")))
        )
        checkpointing = "checkpointing" in case.what
        return {
            name: training(model, batch, checkpointing) for name, model in models.items()
        }, batch.numel()
    if case.part == "prefill":
        batch = tokens(1, 32 if quick else 512)
        return {name: prefill(model, batch) for name, model in models.items()}, batch.numel()
    prompt, count = tokens(1, 8 if quick else 64), 4 if quick else 33
    static, compiled = case.what.startswith("static"), "compiled" in case.what
    return {n: decoding(m, prompt, count, static, compiled) for n, m in models.items()}, count


def measure(
    case: Case, models: dict[str, nn.Module], device: str, quick: bool, rounds: int
) -> dict[str, Any]:
    if case.part != "training":
        merged = copy.deepcopy(models[OURS])
        models = {**models, MERGED: gralora.merge_and_unload(merged)}
    runs, count = runs_of(case, models, device, quick)
    times = common.interleaved(runs, rounds)
    above = {name: common.above(times, name, FROZEN) for name in models if name != FROZEN}
    result = {
        **case._asdict(),
        "ms": {name: statistics.median(each) * 1e3 for name, each in times.items()},
        "tokens": count,
        "over GraLoRA (PEFT)": above[OURS] / above[PEFT_GRALORA],
        "over LoRA (PEFT)": above[OURS] / above[PEFT_LORA],
    }
    if case.part == "training":
        result["peak MiB"] = {name: peak(run) / MIB for name, run in runs.items()}
    return result


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(
        __doc__, quick="two blocks, few tokens, float32, r = 32, k = 2, nothing compiled"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    args = parser.parse_args(argv)
    parts = [part for part in args.parts.split(",") if not (args.quick and part == "compiled")]
    done = there(args.out, args.quick)
    left = [case for case in cases(parts, args.quick) if case not in done]
    for (r, k, dtype), group in itertools.groupby(left, lambda case: (case.r, case.k, case.dtype)):
        models = variants(base_model(getattr(torch, dtype), args.device, args.quick), r, k)
        for case in group:
            rounds = 3 if args.quick or "compiled" in case.what else 7
            done[case] = measure(case, models, args.device, args.quick, rounds)
            print(
                case.title,
                {name: round(value, 1) for name, value in done[case]["ms"].items()},
                flush=True,
            )
            write(args.out, done, args.quick, quiet=True)
        del models  # before the next four are made
    rows = []
    for case, row in done.items():
        one = row["tokens"] if case.part == "decoding" else 1
        ms = [f"{row['ms'][n] / one:.1f}" if n in row["ms"] else "" for n in (*NAMES, MERGED)]
        ratios = [f"{row[f'over {name}']:.2f}" for name in (PEFT_GRALORA, PEFT_LORA)]
        held = row.get("peak MiB", {})
        told = "; ".join(f"{held[name]:.0f}" for name in NAMES if name in held)
        rows.append(
            (f"{case.part}, {case.what}", f"{case.r}, {case.k}", case.dtype, *ms, *ratios, told)
        )
    head = ("ms a step, a prefill, or a token decoded", "r, k", "", *NAMES, MERGED)
    head += (
        "above frozen, over GraLoRA (PEFT)",
        "over LoRA (PEFT)",
        f"peak MiB: {'; '.join(NAMES)}",
    )
    print("\n" + common.table(head, rows))
    write(args.out, done, args.quick)


def there(out: Path, quick: bool) -> dict[Case, dict[str, Any]]:
    """What an earlier call has measured, if on this very machine."""
    found = common.written(out, FILE)
    if (found.get("quick"), found.get("machine")) != (quick, common.machine()):
        return {}
    return {Case(*(row[field] for field in Case._fields)): row for row in found["rows"]}


def write(out: Path, done: dict[Case, dict[str, Any]], quick: bool, *, quiet: bool = False) -> None:
    labels = [f"{case.part}, {case.what}\nr = {case.r}, {case.dtype}" for case in done]
    series = {
        f"over {name}": [row[f"over {name}"] for row in done.values()]
        for name in (PEFT_GRALORA, PEFT_LORA)
    }
    figure = common.bars(
        "SmolLM2-135M: time above the frozen model, over PEFT's", "ratio", labels, series
    )
    common.write(out, FILE, {"quick": quick, "rows": list(done.values())}, figure, quiet=quiet)


if __name__ == "__main__":
    main()
