"""What a server will refuse, pass over in silence, or need, told before it is tried.

Every rule says where it stands in the server's own documentation or source, and of which version;
`RULES` is their table. A rule that a later version drops costs nobody more than a look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gralora.files.checkpoint import adapter_file
from gralora.files.diffusers import PARTS
from gralora.files.experts import FUSED
from gralora.files.formats import (
    VLLM_RANKS,
    exact_rank,
    located,
    model_fields,
    read_adapter,
    refusals,
)
from gralora.files.gguf import ARCHITECTURES
from gralora.files.lora import as_lora
from gralora.files.own import AdapterFile, kind_of, layer_tensors, out_in, read_json
from gralora.files.tokens import token_modules
from gralora.layers.class_change import join


class Finding(NamedTuple):
    """One thing about an adapter that a server minds.

    Attributes:
        kind: "refuses" it, "ignores" it without a word, or "needs" something to be set.
        text: what, where, and the way out.
        source: where the server says so.
    """

    kind: str
    text: str
    source: str


@dataclass
class Serving:
    """What `check_serving` found; printed, a report.

    Attributes:
        findings: none that refuses or ignores something means that the server computes the
            adapter's own numbers.
        steps: commands to run.
        rank: where exact export is impossible, the rank that loses least, and in `loss` the largest
            relative error of a layer.
    """

    server: str
    findings: list[Finding]
    steps: list[str]
    bytes: int
    rank: int | None = None
    loss: float | None = None

    @property
    def ok(self) -> bool:
        return not any(finding.kind in ("refuses", "ignores") for finding in self.findings)

    def __str__(self) -> str:
        lines = [
            f"{self.server}: {'serves it as it is' if self.ok else 'not as it is'};"
            f" {self.bytes / 2**20:.1f} MiB as LoRA"
        ]
        lines += [f"  {f.kind}: {f.text}\n    ({f.source})" for f in self.findings]
        if self.rank is not None:
            lines.append(
                f"  loses least with --rank {self.rank}: relative error of an update up to"
                f" {self.loss:.2g}"
            )
        return "\n".join([*lines, "then:", *(f"  {step}" for step in self.steps)])


@dataclass
class _Adapter:
    """What the rules look at."""

    file: AdapterFile
    base: dict[str, Any]
    format: str

    @property
    def rank(self) -> int:
        return exact_rank(self.file)

    @property
    def experts(self) -> list[str]:
        return self.kinds("experts")

    @property
    def tokens(self) -> list[str]:
        return list(token_modules(self.file))

    @property
    def whole(self) -> list[str]:
        return [name for name in self.file.modules_to_save if name not in self.tokens]

    def kinds(self, *kinds: str) -> list[str]:
        return [name for name in self.file.configs if kind_of(self.file, name) in kinds]

    @property
    def alphas(self) -> set[float]:
        """PEFT's lora_alpha of every layer, exactly exported."""
        return {c.scaling * (c.r * c.gralora_k + c.hybrid_r) for c in self.file.configs.values()}

    @property
    def scalings(self) -> set[float]:
        return {c.scaling for c in self.file.configs.values()}

    @property
    def ranks(self) -> set[int]:
        return {c.r * c.gralora_k + c.hybrid_r for c in self.file.configs.values()}


Told = Iterator[tuple[str, str]]


class Rule(NamedTuple):
    """One thing that a server minds: where it says so, of which version, and what to tell of an
    adapter.
    """

    server: str
    source: str
    told: Callable[[_Adapter], Told]


FOLD = 'save_adapter(format="lora", rank=N) gives all layers one rank and one alpha'
MERGE = "merge_and_unload, and serve the model"


def _rank_of_vllm(a: _Adapter) -> Told:
    if a.rank > VLLM_RANKS[-1]:
        yield "refuses", f"rank {a.rank}, above {VLLM_RANKS[-1]}: cut it with --rank"
    else:
        yield (
            "needs",
            f"--max-lora-rank {next(r for r in VLLM_RANKS if r >= a.rank)}, for a rank of {a.rank}",
        )


def _biases(a: _Adapter) -> Told:
    if a.file.biases:
        yield "refuses", f"trained biases ({a.file.biases[0]!r}): {MERGE}"


def _whole_modules(a: _Adapter) -> Told:
    if a.whole:
        yield "refuses", f"modules_to_save ({a.whole[0]!r}): {MERGE}"


def _tokens(a: _Adapter) -> Told:
    if a.tokens:
        yield "refuses", f"tokens that were trained whole ({a.tokens[0]!r}): {MERGE}"


def _tokens_of_vllm(a: _Adapter) -> Told:
    if a.tokens:
        count = len(token_modules(a.file)[a.tokens[0]])
        yield (
            "needs",
            (
                f"a version that knows trainable_token_indices, and room for {count} tokens; else"
                f" {MERGE}"
            ),
        )


def _one_scale(a: _Adapter) -> Told:
    if len(a.scalings) > 1:
        yield (
            "ignores",
            (
                f"alpha_pattern: one alpha / r for all layers, and these have {len(a.scalings)};"
                f" {FOLD}"
            ),
        )


def _one_alpha(a: _Adapter) -> Told:
    if len(a.alphas) > 1:
        yield (
            "ignores",
            f"alpha_pattern: one alpha for all layers, and these have {len(a.alphas)}; {FOLD}",
        )


def _one_rank(a: _Adapter) -> Told:
    if len(a.ranks) > 1 or len(a.alphas) > 1:
        yield (
            "refuses",
            f"layers that differ in rank or alpha (rank_pattern, alpha_pattern); {FOLD}",
        )


def _rank_of_sglang(a: _Adapter) -> Told:
    yield "needs", f"--max-lora-rank {a.rank}, and --lora-target-modules with every adapted name"


def _not_linear(a: _Adapter) -> Told:
    other = a.kinds("convolution", "transposed convolution", "attention")
    if other:
        yield (
            "refuses",
            (
                f"{other[0]!r}, of kind {kind_of(a.file, other[0])!r}: it adapts linear layers of"
                " language models"
            ),
        )


def _fused_experts(a: _Adapter) -> Told:
    if a.experts:
        module = a.experts[0].rpartition(".")[0]
        if not {join(module, name) for name in FUSED} <= set(a.file.configs):
            yield (
                "refuses",
                (
                    f"adapters on {a.experts[0]!r} alone: it wants both {' and '.join(FUSED)} of a"
                    " module"
                ),
            )
        yield (
            "needs",
            (
                'experts="each" in save_adapter, unless it keeps the model\'s experts in one 3-D'
                ' weight (gpt-oss): then "fused"'
            ),
        )


def _experts_each(a: _Adapter) -> Told:
    if a.experts:
        yield "needs", 'experts="each" in save_adapter: a pair for every expert'


def _architecture(a: _Adapter) -> Told:
    model_type = a.base.get("model_type")
    if model_type is None:
        yield "needs", "the model's config, to name the layers: --base FOLDER"
    elif model_type not in ARCHITECTURES:
        yield (
            "refuses",
            (
                f'model_type {model_type!r}, which format="gguf" does not cover: llama.cpp\'s own'
                f" converter, or {MERGE}"
            ),
        )


def _tied(a: _Adapter) -> Told:
    heads = a.kinds("embedding") + [name for name in a.file.configs if name.endswith("lm_head")]
    if heads and a.base.get("tie_word_embeddings"):
        yield "refuses", f"{heads[0]!r}: head and embedding are one tensor there; {MERGE}"


def _known_names(a: _Adapter) -> Told:
    known = {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down", "gate_up")}
    known |= {"w1", "w2", "w3", "gate"}
    strangers = [
        name
        for name in a.file.configs
        if name.rpartition(".")[2] not in known and kind_of(a.file, name) != "experts"
    ]
    if strangers:
        yield "refuses", f"{strangers[0]!r}: a name that is not in its table of modules"


def _rank_of_tensorrt(a: _Adapter) -> Told:
    if a.rank > 64:
        yield "needs", f"max_lora_rank={a.rank} in its LoraConfig; 64 by default"


def _part_named(a: _Adapter) -> Told:
    if not all(name.partition(".")[0] in PARTS for name in a.file.configs) and "class" not in (
        a.file.model or {}
    ):
        yield (
            "needs",
            (
                "to know which part of a pipeline it is of: save from the module, or a mapping from"
                " part to module"
            ),
        )


def _not_held(a: _Adapter) -> Told:
    for text in refusals(a.file, a.format):
        yield "refuses", text


VLLM_HELPER = "vllm/lora/peft_helper.py, PEFTHelper, vLLM 0.15"
SGLANG = "python/sglang/srt/lora/lora_config.py, SGLang 0.5"
LLAMA = "llama.cpp src/llama-adapter.cpp, b7000 and later"
MLX = "mlx_lm/tuner/utils.py, linear_to_lora_layers, mlx-lm 0.32.2"
TENSORRT = "tensorrt_llm/lora_manager.py, LoraManager.load_from_hf, TensorRT-LLM 1.0"
DIFFUSERS = "diffusers src/diffusers/loaders/peft.py, 0.42.1"
COMFY = "ComfyUI comfy/lora.py, load_lora"

RULES = [
    Rule("vllm", "vllm/config/lora.py, MaxLoRARanks, vLLM 0.15", _rank_of_vllm),
    Rule("vllm", f"{VLLM_HELPER}: Adapter bias is not supported", _biases),
    Rule("vllm", f"{VLLM_HELPER}: only supports modules_to_save being None", _whole_modules),
    Rule("vllm", f"{VLLM_HELPER}: trainable_token_indices in the newest", _tokens_of_vllm),
    Rule("vllm", f"{VLLM_HELPER}: vllm_lora_scaling_factor", _one_scale),
    Rule("vllm", "docs.vllm.ai, features/lora: supported layers", _not_linear),
    Rule("vllm", "vllm/lora/model_manager.py, _stack_moe_lora_weights, vLLM 0.15", _fused_experts),
    Rule("sglang", "docs.sglang.ai, advanced_features/lora: --max-lora-rank", _rank_of_sglang),
    Rule("sglang", f"{SGLANG}: rank_overrides, alpha_overrides", _one_rank),
    Rule("sglang", f"{SGLANG}: only pairs of LoRA are read", _biases),
    Rule("sglang", f"{SGLANG}: only pairs of LoRA are read", _whole_modules),
    Rule("sglang", f"{SGLANG}: only pairs of LoRA are read", _tokens),
    Rule("sglang", f"{SGLANG}: target_modules", _not_linear),
    Rule("sglang", "python/sglang/srt/lora/lora_manager.py: experts by name", _experts_each),
    Rule("llama.cpp", f"{LLAMA}: general.architecture", _architecture),
    Rule("llama.cpp", f"{LLAMA}: does not exist in base model", _tied),
    Rule("llama.cpp", f"{LLAMA}: LoRA tensor has unexpected suffix", _not_held),
    Rule("mlx", MLX, _not_held),
    Rule("tensorrt-llm", f"{TENSORRT}: lora_alpha / effective rank", _one_alpha),
    Rule("tensorrt-llm", f"{TENSORRT}: max_lora_rank", _rank_of_tensorrt),
    Rule("tensorrt-llm", f"{TENSORRT}: hf_module is not in supported list", _known_names),
    Rule("tensorrt-llm", f"{TENSORRT}: unsupported key", _biases),
    Rule("tensorrt-llm", f"{TENSORRT}: unsupported key", _tokens),
    Rule("tensorrt-llm", f"{TENSORRT}: experts by index", _experts_each),
    *(
        rule
        for server, source in (("diffusers", DIFFUSERS), ("comfyui", COMFY))
        for rule in (
            Rule(server, f"{source}: prefixes", _part_named),
            Rule(server, f"{source}: pairs of matrices and kernels", _not_held),
        )
    ),
]
"""What is known of servers, one row a rule."""

FORMAT = {
    **{"vllm": "lora", "sglang": "lora", "tensorrt-llm": "lora", "llama.cpp": "gguf", "mlx": "mlx"},
    **{"diffusers": "diffusers", "comfyui": "kohya"},
}
"""The format that each server reads."""


def check_serving(
    path_or_model: Any, server: str, *, base: Any = None, adapter_name: str = "default"
) -> Serving:
    """What `server` will refuse, ignore, or need of an adapter.

    Args:
        path_or_model: a file or folder, or a model with the adapter `adapter_name`.
        server: "vllm", "sglang", "llama.cpp", "mlx", "tensorrt-llm", "diffusers" or "comfyui".
        base: the base model's config, as an object, a dict, a path to config.json or to its folder;
            by default what the adapter's file knows of it.

    Raises:
        ValueError: no such server. AdapterFileError: no adapter.
    """
    if server not in FORMAT:
        raise ValueError(
            f"server={server!r} is not known; there are: {', '.join(map(repr, FORMAT))}."
        )
    model = isinstance(path_or_model, nn.Module)
    file = (
        adapter_file(path_or_model, adapter_name) if model else read_adapter(located(path_or_model))
    )
    fields = dict(file.model or {})
    if isinstance(base, (str, Path)):
        folder = Path(base)
        base = read_json(folder / "config.json" if folder.is_dir() else folder)
    if base is not None:
        fields.update(model_fields(base) or {})
    adapter = _Adapter(file, fields, FORMAT[server])
    findings = [
        Finding(kind, text, rule.source)
        for rule in RULES
        if rule.server == server
        for kind, text in rule.told(adapter)
    ]
    rank, loss = _best_rank(adapter, server)
    size = sum(
        (c.r * c.gralora_k + c.hybrid_r) * sum(out_in(file, name)) * _copies(file, name) * 4
        for name, c in file.configs.items()
    )
    source = "ADAPTER" if model else str(path_or_model)
    return Serving(server, findings, _steps(adapter, server, source, rank), size, rank, loss)


def _best_rank(a: _Adapter, server: str) -> tuple[int | None, float | None]:
    """Where the exact rank is too high: the highest that is legal, and the largest relative error
    of a layer.
    """
    if server != "vllm" or a.rank <= VLLM_RANKS[-1]:
        return None, None
    errors: dict[str, float] = {}
    as_lora(a.file, VLLM_RANKS[-1], errors)
    return VLLM_RANKS[-1], max(errors.values(), default=0.0)


def _steps(a: _Adapter, server: str, source: str, rank: int | None) -> list[str]:
    """The commands that lead from the adapter to the running server."""
    base = a.file.base_name or "BASE"
    one = len(a.scalings) > 1 or (server in ("sglang", "tensorrt-llm") and len(a.ranks) > 1)
    rank = rank or (a.rank if one and server in ("vllm", "sglang", "tensorrt-llm") else None)
    suffix = {"gguf": ".gguf", "kohya": ".safetensors"}.get(FORMAT[server], "")
    options = f" --rank {rank}" if rank else ""
    options += " --experts each" if a.experts and FORMAT[server] == "lora" else ""
    convert = f"gralora convert {source} served{suffix} --to {FORMAT[server]}{options}"
    limit = next((r for r in VLLM_RANKS if r >= (rank or a.rank)), VLLM_RANKS[-1])
    run = {
        "vllm": (
            f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules mine=served"
        ),
        "sglang": (
            f"python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank"
            f" {rank or a.rank} --lora-paths mine=served"
        ),
        "llama.cpp": "llama-server -m BASE.gguf --lora served.gguf",
        "mlx": f"mlx_lm.server --model {base} --adapter-path served",
        "tensorrt-llm": (
            f"trtllm-serve {base}  # lora_config: lora_dir [served], max_lora_rank"
            f" {max(64, rank or a.rank)}"
        ),
        "diffusers": 'pipeline.load_lora_weights("served")  # in Python',
        "comfyui": "cp served.safetensors ComfyUI/models/loras/",
    }
    return [convert, run[server]]


def _copies(file: AdapterFile, name: str) -> int:
    A = layer_tensors(file, name)[0]
    return math.prod(A.shape[:-3])
