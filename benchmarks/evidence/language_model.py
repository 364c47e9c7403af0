"""A small GPT-2, trained from nothing on the documentation of Python's standard library, adapted to
its source code.

The model reads bytes: 4 layers of width 256, GPT-2's `Conv1D` throughout, 3.3 million parameters.
The text is what the running interpreter's own standard library says in docstrings (1.7 MB), then
its code without them, as `ast.unparse` writes it (6.7 MB). A tenth of the files is for validation,
which chooses the learning rate, and a tenth is held out. LoRA, GraLoRA and full fine-tuning see the
same windows of 128 bytes in the same order. Told are bits per byte on code, against steps, and what
the adapted model has lost on documentation.

    python -m benchmarks.evidence.language_model             25 minutes on two cores
    python -m benchmarks.evidence.language_model --quick     20 steps, a smaller model, one learning
    rate, two methods
"""

from __future__ import annotations

import ast
import functools
import math
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import common
from benchmarks.evidence import _methods as methods

RANK = 32
NAMES = (methods.BEFORE, methods.LORA, "GraLoRA k=2", "GraLoRA k=4", "GraLoRA k=8", methods.FULL)
WINDOW, BATCH = 128, 8
PRETRAIN_STEPS, PRETRAIN_RATE = 1200, 1e-3
STEPS, LOOKS = 200, 10
ADAPTER_RATES, FULL_RATES = (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)
SEEDS = (0, 1)
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Run(NamedTuple):
    """One adaptation."""

    name: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Text:
    """The bytes of one kind of text, by what they are for."""

    training: Tensor
    validation: Tensor
    held_out: Tensor


def read(limit: int | None) -> tuple[Text, Text]:
    """(documentation, code) of the standard library, split by file; every tenth file is held out,
    every tenth validates.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if not LEFT_OUT & set(p.relative_to(root).parts)]
    parts: dict[str, tuple[list[str], list[str]]] = {
        each: ([], []) for each in Text.__dataclass_fields__
    }
    for i, path in enumerate(tqdm(files[:limit], desc="standard library", mininterval=1)):
        documentation, code = told_apart(path.read_bytes())
        docs, codes = parts[{0: "held_out", 5: "validation"}.get(i % 10, "training")]
        docs.extend(documentation)
        codes.append(code)
    texts = ({use: "\n\n".join(both[kind]) for use, both in parts.items()} for kind in (0, 1))
    documentation, code = (
        Text(
            **{
                use: torch.tensor(list(text.encode(errors="replace")), dtype=torch.uint8)
                for use, text in each.items()
            }
        )
        for each in texts
    )
    return documentation, code


def told_apart(source: bytes) -> tuple[list[str], str]:
    """The docstrings of a module, and its code without them or any comment."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            found.append(text)
            node.body = node.body[1:] or [ast.Pass()]
    return found, ast.unparse(tree)


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, WINDOW) bytes from anywhere in the text."""
    starts = torch.randint(len(text) - WINDOW, (count, 1), generator=generator, device="cpu")
    return text[starts + torch.arange(WINDOW, device="cpu")].long()


def model_of(*, quick: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    width, layers = (64, 2) if quick else (256, 4)
    sizes = {
        "vocab_size": 256,
        "n_positions": WINDOW,
        "n_embd": width,
        "n_layer": layers,
        "n_head": 4,
    }
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**sizes, **no_dropout, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config)


def train(
    model: nn.Module,
    text: Tensor,
    lr: float,
    steps: int,
    name: str,
    seed: int,
    *,
    watched: Tensor | None = None,
) -> list[tuple[int, float]]:
    """AdamW with a warm-up and a cosine: (step, bits per byte of `watched`) at LOOKS places."""
    generator = torch.Generator("cpu").manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    seen = [] if watched is None else [(0, bits(model, watched))]
    for step in tqdm(range(1, steps + 1), desc=name, unit="step", mininterval=1):
        model.train()
        batch = windows(text, BATCH, generator)
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if watched is not None and step % (steps // LOOKS) == 0:
            seen.append((step, bits(model, watched)))
    return seen


@torch.no_grad()
def bits(model: nn.Module, watched: Tensor) -> float:
    """Bits per byte, the mean over windows."""
    model.eval()
    losses = [
        model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in watched.split(32)
    ]
    return sum(losses) / len(watched) / math.log(2)


@dataclass
class Setting:
    """What every run starts from, and what it is measured on."""

    model: nn.Module
    code: Tensor
    watched: Tensor
    held_out: dict[str, Tensor]


def setting(*, quick: bool) -> Setting:
    documentation, code = read(limit=60 if quick else None)
    fixed, count = torch.Generator("cpu").manual_seed(1), 64 if quick else 256
    watched = windows(code.validation, 64, fixed)
    held_out = {
        "code": windows(code.held_out, count, fixed),
        "documentation": windows(documentation.held_out, count, fixed),
    }
    torch.manual_seed(0)
    model = model_of(quick=quick)
    train(
        model,
        documentation.training,
        PRETRAIN_RATE,
        20 if quick else PRETRAIN_STEPS,
        "pretraining",
        0,
    )
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{total:,} parameters; {len(documentation.training):,} bytes of documentation,"
        f" {len(code.training):,} of code"
    )
    return Setting(model, code.training, watched, held_out)


def measure(run: Run, path: Path, steps: int) -> dict[str, Any]:
    """One adaptation from the setting that `main` left in the file `path`."""
    start: Setting = torch.load(path, weights_only=False)
    torch.manual_seed(run.seed)
    model = methods.prepared(start.model, run.name, RANK, "all-linear")
    curve = []
    if run.name != methods.BEFORE:
        curve = train(
            model,
            start.code,
            run.lr,
            steps,
            f"{run.name}, lr {run.lr:g}",
            run.seed,
            watched=start.watched,
        )
    told = {kind: bits(model, text) for kind, text in start.held_out.items()}
    return {
        "curve": curve,
        "validation": bits(model, start.watched),
        "trainable": methods.trained(model),
        **told,
    }


def summary(done: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of every method and learning rate; `chosen` is the rate that validation
    chooses.
    """
    runs = ((run.name, run.lr, result) for run, result in done.items())
    cases = []
    for name, by_rate, best in methods.by_case(runs, lambda result: result["validation"]):
        for lr, results in by_rate.items():
            kinds = ("validation", "code", "documentation")
            told = {kind: methods.spread([result[kind] for result in results]) for kind in kinds}
            case = {
                "name": name,
                "lr": lr,
                "chosen": lr == best,
                **told,
                "trainable": results[0]["trainable"],
            }
            cases.append({**case, "curve": results[0]["curve"]})
    return cases


def picture(cases: list[dict[str, Any]]) -> common.Figure:
    figure = common.Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2)
    adapted = [case for case in cases if case["curve"]]
    for name in dict.fromkeys(case["name"] for case in adapted):
        own = [case for case in adapted if case["name"] == name]
        best = next(case for case in own if case["chosen"])
        left.plot(*zip(*best["curve"], strict=True), label=f"{name}, lr {best['lr']:g}")
        rates = [case["lr"] / own[0]["lr"] for case in own]
        right.plot(rates, [case["code"][0] for case in own], marker="o", label=name)
    right.axhline(cases[0]["code"][0], color="grey", linestyle="--", label=methods.BEFORE)
    left.set(
        xlabel="step",
        ylabel="bits per byte of code (validation)",
        title=f"documentation to code, r = {RANK}",
    )
    right.set_xscale("log")
    right.set(xlabel="learning rate, over the lowest", ylabel="bits per byte of code (held out)")
    for axes in (left, right):
        axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    args = common.parser(
        __doc__, quick="20 steps, a smaller model, one learning rate, two methods"
    ).parse_args(argv)
    names, seeds, steps = (NAMES[:4:2], SEEDS[:1], 20) if args.quick else (NAMES, SEEDS, STEPS)
    rates = {
        name: methods.rates(name, ADAPTER_RATES, FULL_RATES)[: 1 if args.quick else None]
        for name in names
    }
    runs = [Run(name, lr, seed) for seed in seeds for name in names for lr in rates[name]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "setting.pt"
        torch.save(setting(quick=args.quick), path)
        measured = functools.partial(measure, path=path, steps=steps)
        ended = dict(common.each(measured, runs, "language model", here=args.quick))
    done = {run: ended[run] for run in runs}
    cases, rows = summary(done), []
    for case in cases:
        code, documentation = (
            "{:.3f} ± {:.3f}".format(*case[kind]) for kind in ("code", "documentation")
        )
        mark = "*" if case["chosen"] else ""
        rows.append(
            (case["name"], f"{case['lr']:g}", mark, code, documentation, f"{case['trainable']:,}")
        )
    print(
        "\n"
        + common.table(
            ("", "lr", "chosen", "code, bits per byte", "documentation", "trainable"), rows
        )
    )
    listed = [{**run._asdict(), **result} for run, result in done.items()]
    common.write(args.out, "language_model", {"summary": cases, "runs": listed}, picture(cases))


if __name__ == "__main__":
    main()
