"""All that matters on one GPU, in one command and within ten minutes: one JSON, one table, one
picture.

Layers of a 7-billion model (4096 x 4096 and 4096 x 14336; 2,048 tokens of training, one token of
decoding) in float32, bfloat16 and bitsandbytes' nf4, as they are, as CUDA graphs
(`torch.cuda.make_graphed_callables`) and compiled (`mode="reduce-overhead"`); beside them the
frozen layer and PEFT's LoRA and GraLoRA. Time is what the GPU has done (synchronised, warmed up),
bytes are the allocator's peak. Nothing is claimed about a GPU that was not measured on one.

    python -m benchmarks.speed.gpu --out DIR
    python -m benchmarks.speed.gpu --quick                    the same code, small, on whatever
    there is, as the tests run it
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import common
from benchmarks.speed._counting import peak
from benchmarks.speed._variants import FROZEN, OURS, PEFT_GRALORA, PEFT_LORA, build

NAMES = (FROZEN, OURS, PEFT_GRALORA, PEFT_LORA)
R, K = 32, 2
MIB = 2**20


class Case(NamedTuple):
    """One thing that is timed of every variant."""

    n_in: int
    n_out: int
    tokens: int
    weight: str  # float32, bfloat16 or nf4
    how: str  # as it is, CUDA graph or compiled
    training: bool

    @property
    def title(self) -> str:
        what = "training" if self.training else "decoding"
        return (
            f"{what}, {self.n_in} x {self.n_out}, {self.tokens} tokens, {self.weight}, {self.how}"
        )


def cases(device: str, quick: bool) -> Iterator[Case]:
    shapes, many = (((64, 64),), 32) if quick else (((4096, 4096), (4096, 14336)), 2048)
    hows = [
        "as it is",
        *(["CUDA graph"] if device.startswith("cuda") else []),
        *([] if quick else ["compiled"]),
    ]
    weights = ["float32", "bfloat16", *(["nf4"] if device.startswith("cuda") else [])]
    for n_in, n_out in shapes:
        for weight in weights:
            for how in hows:
                yield Case(n_in, n_out, many, weight, how, training=True)
                yield Case(n_in, n_out, 1, weight, how, training=False)


def base_layer(case: Case, device: str) -> nn.Module:
    linear = nn.Linear(case.n_in, case.n_out, bias=False)
    if case.weight != "nf4":
        return nn.Sequential(linear.to(device, getattr(torch, case.weight)))
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        case.n_in, case.n_out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.load_state_dict(linear.state_dict())
    return nn.Sequential(layer.to(device))


def run_of(case: Case, model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """One step, or one token."""
    trained = [p for p in model.parameters() if p.requires_grad]
    call: Callable[..., torch.Tensor] = model.train(case.training)
    if case.how == "compiled":
        call = torch.compile(model, mode="reduce-overhead")
    if not case.training:
        if case.how == "CUDA graph":
            call = _graph_of(model, x)
        return torch.no_grad()(lambda: call(x))
    if case.how == "CUDA graph":
        call = torch.cuda.make_graphed_callables(model, (x,))
    gradient = torch.ones_like(model(x))

    def step() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        call(x).backward(gradient)

    return step


@torch.no_grad()
def _graph_of(model: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y: torch.Tensor = model(x)

    def replay(_: torch.Tensor) -> torch.Tensor:
        graph.replay()
        return y

    return replay


def measure(case: Case, device: str, rounds: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    models = build(base_layer(case, device), ["0"], R, K, names=NAMES)
    dtype = torch.bfloat16 if case.weight == "nf4" else getattr(torch, case.weight)
    x = torch.randn(
        1, case.tokens, case.n_in, device=device, dtype=dtype, requires_grad=case.training
    )
    runs, failed = {}, {}
    for name, model in models.items():
        try:
            runs[name] = run_of(case, model, x)
            runs[name]()
        except (
            Exception
        ) as error:  # what a variant can't do in this way is told, and the others are measured
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            runs.pop(name, None)
    times = common.interleaved(runs, rounds, repeats)
    result: dict[str, Any] = {
        **case._asdict(),
        "us": {n: statistics.median(t) * 1e6 for n, t in times.items()},
    }
    if FROZEN in times:
        above = {name: common.above(times, name, FROZEN) * 1e6 for name in times if name != FROZEN}
        result["us above frozen"] = above
        for other in (PEFT_GRALORA, PEFT_LORA):
            if OURS in above and other in above:
                result[f"over {other}"] = above[OURS] / above[other]
    if case.training and case.how == "as it is":
        result["peak MiB"] = {name: peak(run) / MIB for name, run in runs.items()}
    return {**result, "failed": failed}


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, quick="64 x 64, few rounds, nothing compiled; on a CPU too")
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = args.device
    if device == "cpu" and not args.quick:
        raise SystemExit(
            "no GPU here, and nothing is claimed about one that was not measured; --quick tries the"
            " code out"
        )
    rounds, repeats = (3, 2) if args.quick else (15, 10)
    results = []
    for case in tqdm(list(cases(device, args.quick)), desc="gpu", mininterval=1):
        torch.compiler.reset()
        results.append(measure(case, device, rounds, repeats))
    rows = []
    for row in results:
        case = Case(*(row[field] for field in Case._fields))
        us = [f"{row['us'][name]:.1f}" if name in row["us"] else "failed" for name in NAMES]
        ratios = [
            f"{row[key]:.2f}" if (key := f"over {name}") in row else ""
            for name in (PEFT_GRALORA, PEFT_LORA)
        ]
        held = "; ".join(
            f"{row['peak MiB'][name]:.0f}" for name in NAMES if name in row.get("peak MiB", {})
        )
        rows.append((case.title, *us, *ratios, held))
    head = (
        "us",
        *NAMES,
        "above frozen, over GraLoRA (PEFT)",
        "over LoRA (PEFT)",
        f"peak MiB: {'; '.join(NAMES)}",
    )
    print("\n" + common.table(head, rows))
    for row in results:
        for name, reason in row["failed"].items():
            print(f"{Case(*(row[f] for f in Case._fields)).title}: {name} failed: {reason}")
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    shown = [row for row in results if f"over {PEFT_LORA}" in row]
    series = {
        f"over {name}": [row.get(f"over {name}", 0.0) for row in shown]
        for name in (PEFT_GRALORA, PEFT_LORA)
    }
    titles = [Case(*(row[field] for field in Case._fields)).title for row in shown]
    figure = common.bars(
        f"{card}: time above the frozen layer, over PEFT's", "ratio", titles, series
    )
    common.write(args.out, "gpu", {"card": card, "rows": results}, figure)


if __name__ == "__main__":
    main()
