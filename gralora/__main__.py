"""The command line: `gralora`, or `python -m gralora`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gralora.config import GraloraConfig
from gralora.files.formats import (
    FORMATS,
    LORA_FORMATS,
    convertible,
    located,
    model_fields,
    read_adapter,
)
from gralora.files.ondisk import extract_checkpoint, merge_checkpoint, refuse_existing
from gralora.files.own import AdapterFile, layer_tensors, out_in, read_json
from gralora.files.serving import FORMAT as SERVERS
from gralora.files.serving import check_serving
from gralora.maths import functional
from gralora.model.summary import table
from gralora.version import __version__

LAYER = ("layer", "in", "out", "r", "k", "hybrid_r", "alpha", "scaling", "parameters", "norm")


def info(args: argparse.Namespace) -> None:
    file = read_adapter(located(args.adapter))
    layers = [_describe(file, name) for name in file.configs]
    total = sum(tensor.numel() for tensor in file.tensors.values())
    result = {
        "format": file.format,
        "layers": layers,
        "parameters": total,
        "modules_to_save": file.modules_to_save,
        "biases": file.biases,
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(_table(LAYER, [[layer[column] for column in LAYER] for layer in layers]))
    print(f"\n{len(layers)} layers, {total:,} parameters, format {file.format}")
    for what, names in (("modules_to_save", file.modules_to_save), ("biases", file.biases)):
        if names:
            print(f"{what}: {', '.join(names)}")


def check(args: argparse.Namespace) -> None:
    result = check_serving(args.adapter, args.server, base=args.base)
    print(result)
    if not result.ok:
        raise ValueError(f"{args.server} would not serve {args.adapter} as it is")


def convert(args: argparse.Namespace) -> None:
    if args.rank is not None and args.to not in LORA_FORMATS:
        args.parser.error(f"--rank is for --to {', '.join(sorted(LORA_FORMATS))}")
    if args.experts is not None and args.to != "lora":
        args.parser.error("--experts is for --to lora")
    refuse_existing(args.out, args.force)
    file = read_adapter(args.adapter)
    if args.base is not None:
        config = args.base / "config.json" if args.base.is_dir() else args.base
        file.model = model_fields(read_json(config))
    errors: dict[str, float] = {}
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    FORMATS[args.to].write(
        convertible(file, args.to, args.rank, errors, args.experts or "fused", dtype), args.out
    )
    if args.rank is not None:
        print(_table(("layer", "relative error"), list(errors.items())))
    print(f"wrote {args.out}")


def merge(args: argparse.Namespace) -> None:
    file = read_adapter(args.adapter)
    unmerged = merge_checkpoint(args.model, file, args.out, force=args.force, progress=_progress)
    if unmerged:
        warnings.warn(
            f"copied as they were, without the adapter: {', '.join(unmerged)}", stacklevel=1
        )
    print(f"wrote {args.out}")


def extract(args: argparse.Namespace) -> None:
    alpha = args.r + args.hybrid_r if args.alpha is None else args.alpha
    try:
        config = GraloraConfig(r=args.r, hybrid_r=args.hybrid_r, gralora_k=args.k, alpha=alpha)
    except (TypeError, ValueError) as error:
        args.parser.error(str(error))
    rows = extract_checkpoint(
        args.base, args.tuned, args.out, args.targets, config, force=args.force, progress=_progress
    )
    head = (
        "layer",
        "out x in",
        f"error of GraLoRA k={args.k}",
        "of the best LoRA, equal parameters",
    )
    print(
        _table(
            head,
            [
                (row.layer, "{} x {}".format(*row.shape), row.error, row.best_lora_error)
                for row in rows
            ],
        )
    )
    print(f"wrote {args.out}")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser("gralora", description="GraLoRA adapters on disk.")
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any, help: str, *positional: str) -> argparse.ArgumentParser:
        result = commands.add_parser(function.__name__, help=help, description=help)
        result.set_defaults(run=function, parser=result)
        for name in positional:
            result.add_argument(name, type=Path, metavar=name.upper())
        if "out" in positional:
            result.add_argument("--force", action="store_true", help="overwrite OUT")
        return result

    command(info, "What an adapter holds: layers, sizes, norms.", "adapter").add_argument(
        "--json", action="store_true"
    )
    checked = command(check, "What a server will refuse, ignore or need of an adapter.", "adapter")
    checked.add_argument("--for", dest="server", choices=list(SERVERS), required=True)
    checked.add_argument("--base", type=Path, help="the base model's folder or config.json")
    converted = command(convert, "Rewrite an adapter in another format.", "adapter", "out")
    converted.add_argument("--to", choices=list(FORMATS), required=True)
    converted.add_argument(
        "--rank",
        type=_rank,
        help=(
            "for plain LoRA: of every layer, a number, vllm, or a share of ‖ΔW‖² (0.95); by default"
            " exact"
        ),
    )
    converted.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the tensors; by default as they are",
    )
    converted.add_argument(
        "--base",
        type=Path,
        help="for gguf, where the adapter's file does not know its model: config.json",
    )
    converted.add_argument(
        "--experts",
        choices=["fused", "each"],
        help="for lora: fused experts as one, or each for itself",
    )
    command(
        merge, "Merge an adapter into a checkpoint, a file or a folder.", "model", "adapter", "out"
    )
    extracted = command(
        extract, "The best GraLoRA for TUNED - BASE, two checkpoints.", "base", "tuned", "out"
    )
    extracted.add_argument(
        "--targets", required=True, metavar="REGEX", help="for the whole name of a layer"
    )
    extracted.add_argument("-r", type=int, default=32)
    extracted.add_argument("-k", type=int, default=2)
    extracted.add_argument("--hybrid-r", type=int, default=0)
    extracted.add_argument("--alpha", type=float, help="by default r + hybrid_r: a scaling of 1")
    return main


def _rank(text: str) -> int | float | str:
    return text if text == "vllm" else float(text) if "." in text else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 1 for a failure, told in one line on standard error. Wrong usage
    exits with 2.
    """
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "always", UserWarning
        )  # told, whatever the surroundings make of warnings
        warnings.showwarning = lambda message, *rest, **more: print(
            f"gralora: warning: {message}", file=sys.stderr
        )
        try:
            args.run(args)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            return _fail("interrupted")
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
            return _fail(str(error) or type(error).__name__)
    return 0


def _fail(text: str) -> int:
    print(f"gralora: {' '.join(text.split())}", file=sys.stderr)
    return 1


def _progress(items: Sequence[str]) -> Iterable[str]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[str] = tqdm(items, unit="layer", disable=None)
    return bar


def _describe(file: AdapterFile, name: str) -> dict[str, Any]:
    config, tensors = file.configs[name], layer_tensors(file, name)
    n_out, n_in = out_in(file, name)
    down, up = functional.lora_factors(*tensors)
    return {
        "layer": name,
        "in": n_in,
        "out": n_out,
        "r": config.r,
        "k": config.gralora_k,
        "hybrid_r": config.hybrid_r,
        "alpha": config.alpha,
        "scaling": config.scaling,
        "parameters": sum(t.numel() for t in tensors if t is not None),
        "norm": config.scaling * functional.product_norm(down.float(), up.float()),
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return table(
        head, [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    )


if __name__ == "__main__":
    sys.exit(main())
