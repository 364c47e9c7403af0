"""What a format costs: bytes, and what is lost where the exact LoRA is kept in half precision.

An adapter on every linear layer of SmolLM2-135M (r = 16, k = 2, trained for a few steps on the chat
job's data) is written in every format and type, read back, and compared with the adapter itself:
the largest difference of log-probabilities over what the adapter changes, and the share of equal
answers.

    python -m benchmarks.evidence.formats            30 steps, 200 questions; five minutes on two
    cores python -m benchmarks.evidence.formats --quick    six blocks, 2 steps, 8 questions
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import gralora
from benchmarks import common
from benchmarks.jobs.chat import QUICK_BLOCKS, answers, load_chat, load_data, train

FORMATS = ("gralora", "peft", "lora", "gguf", "mlx")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def measure(steps: int, questions: int, blocks: int | None = None) -> dict[str, dict[str, Any]]:
    chat, (training, held_out) = load_chat(), load_data()
    model = gralora.inject(
        chat.model(blocks), "all-linear", gralora.GraloraConfig(r=16, gralora_k=2, alpha=32)
    )
    asked = held_out[:questions]
    base = answers(model, chat, asked)
    train(model, chat, training, steps)
    exact = answers(model, chat, asked)
    moved = (exact - base).abs().max()
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            for dtype in DTYPES:
                path = Path(folder) / f"{format}-{dtype}"
                path = path.with_suffix(".gguf") if format == "gguf" else path
                gralora.save_adapter(model, path, format=format, dtype=dtype)
                files = (
                    [path]
                    if path.is_file()
                    else [each for each in path.iterdir() if each.suffix == ".safetensors"]
                )
                gralora.delete_adapter(model, "again") if "again" in gralora.adapter_names(
                    model
                ) else None
                gralora.load_adapter(model, path, "again")
                gralora.set_adapter(model, "again")
                found = answers(model, chat, asked)
                gralora.set_adapter(model, "default")
                result[f"{format}, {str(dtype).removeprefix('torch.')}"] = {
                    "bytes": sum(file.stat().st_size for file in files),
                    "error": ((found - exact).abs().max() / moved).item(),
                    "same": (found.argmax(-1) == exact.argmax(-1)).float().mean().item(),
                }
    return result


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="six blocks, 2 steps, 8 questions").parse_args(argv)
    result = measure(*((2, 8, QUICK_BLOCKS) if args.quick else (30, 200)))
    rows = [
        (name, f"{v['bytes'] / 2**20:.2f}", f"{v['error']:.1e}", f"{v['same']:.1%}")
        for name, v in result.items()
    ]
    print(
        "\n"
        + common.table(
            ("format, type", "MiB", "largest error over the adapter's effect", "equal answers"),
            rows,
        )
    )
    figure = common.Figure(figsize=(8, 4))
    axes = figure.subplots()
    for dtype in ("float32", "float16", "bfloat16"):
        own = {name: v for name, v in result.items() if name.endswith(f", {dtype}")}
        axes.scatter(
            [v["bytes"] / 2**20 for v in own.values()],
            [max(v["error"], 1e-9) for v in own.values()],
            label=dtype,
        )
        for name, v in own.items():
            axes.annotate(
                name.split(",")[0], (v["bytes"] / 2**20, max(v["error"], 1e-9)), fontsize=7
            )
    axes.set(
        xlabel="MiB",
        ylabel="largest error over the adapter's effect",
        yscale="log",
        title="Formats",
    )
    axes.legend()
    common.write(args.out, "formats", {"formats": result}, figure)


if __name__ == "__main__":
    main()
