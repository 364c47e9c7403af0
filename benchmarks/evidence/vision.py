"""A small vision transformer, trained on handwritten digits 0 to 7, adapted to 8 and 9 and to
digits turned by 90 degrees.

The data are the 1,797 scans of 8 x 8 pixels that come with scikit-learn; the model is ViT-shaped, 4
layers of width 64, and trained from nothing. A fifth of the scans is for validation, which chooses
the learning rate, and a fifth is held out. Told are the accuracy on the new task and on the old one
(the scans of 0 to 7, upright) with the adapter on, mean and spread over five seeds of all that is
random. Without the adapter the old model is there again to the last bit, whatever was learned.

    python -m benchmarks.evidence.vision             25 minutes on two cores; goes on where it was
    interrupted python -m benchmarks.evidence.vision --quick     one seed, one learning rate, three
    methods, two epochs
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from benchmarks.evidence import _methods as methods

RANK = 8
HEAD_ONLY = "head only"
NAMES = (
    methods.BEFORE,
    HEAD_ONLY,
    methods.LORA,
    "GraLoRA k=2",
    "GraLoRA k=4",
    "GraLoRA k=8",
    "hybrid k=2",
    methods.RECOMMENDED,
    methods.FULL,
)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS, ADAPT_EPOCHS, BATCH = 60, 20, 32
PRETRAIN_RATE = 1e-3
ADAPTER_RATES, FULL_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (3e-5, 1e-4, 3e-4, 1e-3)
Data = tuple[Tensor, Tensor]


class Run(NamedTuple):
    """One adaptation."""

    task: str
    name: str
    lr: float
    seed: int


def digits(seed: int) -> tuple[Data, Data, Data]:
    """(training, validation, held out): images (n, 1, 8, 8) from 0 to 1 and their digits."""
    found = load_digits()
    images, labels = torch.tensor(found.images).float()[:, None] / 16, torch.tensor(found.target)
    order = torch.randperm(
        len(labels), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    fifth = len(order) // 5
    training, validation, held_out = order[2 * fifth :], order[:fifth], order[fifth : 2 * fifth]
    return tuple((images[i], labels[i]) for i in (training, validation, held_out))  # type: ignore[return-value]


def low(data: Data) -> Data:
    """The digits 0 to 7."""
    return data[0][data[1] < 8], data[1][data[1] < 8]


def new_classes(data: Data) -> Data:
    return data[0][data[1] >= 8], data[1][data[1] >= 8]


def turned(data: Data) -> Data:
    images, labels = low(data)
    return images.rot90(1, (2, 3)), labels


TASKS: dict[str, Callable[[Data], Data]] = {"8 and 9": new_classes, "turned by 90°": turned}


class Classifier(nn.Module):
    """A vision transformer of 8 x 8 pixels in patches of 2 x 2, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        sizes = {
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 64,
            "intermediate_size": 256,
        }
        config = ViTConfig(**sizes, num_hidden_layers=4, num_attention_heads=4)
        self.encoder = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(pixel_values=images).last_hidden_state[:, 0])


def train(model: nn.Module, data: Data, lr: float, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = epochs * -(-len(data[1]) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data[1])).split(BATCH):
            F.cross_entropy(model(data[0][index]), data[1][index]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    scores = model.eval()(data[0])
    return {
        "accuracy": (scores.argmax(-1) == data[1]).float().mean().item(),
        "loss": F.cross_entropy(scores, data[1]).item(),
    }


@functools.lru_cache(maxsize=1)
def pretrained(seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Classifier()
    train(model, low(digits(seed)[0]), PRETRAIN_RATE, epochs, seed)
    return model


def prepared(run: Run, epochs: int) -> nn.Module:
    model = copy.deepcopy(pretrained(run.seed, epochs))
    torch.manual_seed(run.seed)
    if run.name == HEAD_ONLY:
        model.encoder.requires_grad_(False)
        return model
    linear = [
        name
        for name, module in model.encoder.named_modules(prefix="encoder")
        if isinstance(module, nn.Linear)
    ]
    return methods.prepared(model, run.name, RANK, linear, "head")


def measure(run: Run, epochs: int = EPOCHS, adapt_epochs: int = ADAPT_EPOCHS) -> dict[str, Any]:
    training, validation, held_out = digits(run.seed)
    model, task = prepared(run, epochs), TASKS[run.task]
    if run.name != methods.BEFORE:
        train(model, task(training), run.lr, adapt_epochs, run.seed)
    return {
        "validation": evaluate(model, task(validation)),
        "new": evaluate(model, task(held_out)),
        "old": evaluate(model, low(held_out)),
        "trainable": methods.trained(model),
    }


def summary(done: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and spreads of every task, method and learning rate; `chosen` is the rate that
    validation chooses.
    """
    runs = (((run.task, run.name), run.lr, result) for run, result in done.items())
    cases = []
    for (task, name), by_rate, best in methods.by_case(
        runs, lambda result: result["validation"]["loss"]
    ):
        for lr, results in by_rate.items():
            new, old = (
                methods.spread([100 * each[where]["accuracy"] for each in results])
                for where in ("new", "old")
            )
            case = {
                "task": task,
                "name": name,
                "lr": lr,
                "chosen": lr == best,
                "new": new,
                "old": old,
            }
            cases.append({**case, "trainable": results[0]["trainable"]})
    return cases


def picture(cases: list[dict[str, Any]]) -> common.Figure:
    """What is learned against what is kept: a line for a method, a point for a learning rate, a
    star for the chosen one.
    """
    figure = common.Figure(figsize=(11, 4.5))
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for name in NAMES[2:]:
            own = [case for case in cases if (case["task"], case["name"]) == (task, name)]
            if own:
                kept, learned = [case["old"][0] for case in own], [case["new"][0] for case in own]
                sizes = [120 if case["chosen"] else 20 for case in own]
                line = axes.plot(kept, learned, linewidth=1, label=name)
                axes.scatter(kept, learned, sizes, color=line[0].get_color(), marker="*")
        axes.set(
            title=f"adapted to {task}, r = {RANK}",
            xlabel="kept: 0 to 7 upright, %",
            ylabel="learned, %",
        )
        axes.set(xlim=(-2, 100), ylim=(70, 100))
        if axes.lines:
            axes.legend(fontsize=8, loc="lower left")
    return figure


def there(out: Path, epochs: tuple[int, int]) -> dict[Run, dict[str, Any]]:
    """What an earlier call has run, if for as many epochs."""
    found = common.written(out, "vision")
    if tuple(found.get("epochs", (EPOCHS, ADAPT_EPOCHS))) != epochs:
        return {}
    kept = (({key: each.pop(key) for key in Run._fields}, each) for each in found.get("runs", ()))
    return {Run(**run): result for run, result in kept}


def write(
    out: Path, done: dict[Run, dict[str, Any]], epochs: tuple[int, int], *, quiet: bool = False
) -> list[dict[str, Any]]:
    cases = summary(done)
    listed = [{**run._asdict(), **result} for run, result in done.items()]
    common.write(
        out,
        "vision",
        {"summary": cases, "runs": listed, "epochs": epochs},
        picture(cases),
        quiet=quiet,
    )
    return cases


def main(argv: list[str] | None = None) -> None:
    args = common.parser(
        __doc__, quick="one seed, one learning rate, three methods, two epochs"
    ).parse_args(argv)
    names, seeds = (NAMES[:6:2], SEEDS[:1]) if args.quick else (NAMES, SEEDS)
    epochs = (2, 2) if args.quick else (EPOCHS, ADAPT_EPOCHS)
    measured = functools.partial(measure, epochs=epochs[0], adapt_epochs=epochs[1])
    rates = {
        name: methods.rates(name, ADAPTER_RATES, FULL_RATES)[: 1 if args.quick else None]
        for name in names
    }
    runs = [
        Run(task, name, lr, seed)
        for seed in seeds
        for task in TASKS
        for name in names
        for lr in rates[name]
    ]
    done = there(args.out, epochs)
    for run, result in common.each(
        measured, [run for run in runs if run not in done], "vision", here=args.quick
    ):
        done[run] = result
        write(args.out, {run: done[run] for run in runs if run in done}, epochs, quiet=True)
    cases = write(args.out, {run: done[run] for run in runs}, epochs)
    head = ("adapted to", "", "lr", "chosen", "new task, %", "0 to 7 upright, %", "trainable")
    rows = []
    for case in cases:
        new, old = ("{:.1f} ± {:.1f}".format(*case[where]) for where in ("new", "old"))
        told = f"{case['lr']:g}", "*" if case["chosen"] else "", new, old, f"{case['trainable']:,}"
        rows.append((case["task"], case["name"], *told))
    print("\n" + common.table(head, rows))


if __name__ == "__main__":
    main()
