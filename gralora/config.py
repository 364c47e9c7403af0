"""`GraloraConfig`: what one adapter is, checked once, on construction."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

AUTO = "auto"
LARGEST_ALPHA, LARGEST_WEIGHT = 1e30, 1e6  # of an adapter: so that their product is a float32
STARTS = ("orthogonal", "loftq")
STARTS_FROM_DATA = ("eva", "gradient")
BIAS_CHOICES = ("none", "all", "gralora_only")


@dataclass(frozen=True)
class GraloraConfig:
    """The shape and the scope of an adapter. Field names and defaults are those of PEFT's
    `GraloraConfig`.

    Args:
        r: rank of every block row; parameters are `r * (in + out)` whatever `gralora_k`. A multiple
            of `gralora_k`.
        hybrid_r: rank of the plain LoRA pair beside the blocks (Hybrid GraLoRA); 0 leaves it out.
        alpha: the update is scaled by `alpha / (r + hybrid_r)`, or with `use_rslora` by `alpha /
            √(r + hybrid_r)`.
        gralora_dropout: probability of dropout on the adapter's input, in training.
        gralora_k: the weight is cut into `gralora_k x gralora_k` blocks. The paper advises 2 up to
            r = 32, 4 from r = 64.
        target_modules: which layers, where `inject` is not told; a regular expression, a list of
            names, or "all-linear".
        exclude_modules: layers that are never adapted; a regular expression or a list of names.
        fan_in_fan_out: accepted from users of PEFT; the layout is read off each layer.
        bias: biases trained with the adapter: "none", "all", or "gralora_only" (those of adapted
            layers).
        modules_to_save: names of modules trained whole and saved with the adapter, such as a new
            head. "auto": the head that a `...ForSequenceClassification` and the like has for its
            task.
        trainable_token_indices: tokens whose rows of the embedding are trained whole, and saved
            with the adapter: a list, for the model's input embedding, or a mapping from an
            embedding's name to a list. Held as tuples.
        layers_to_transform: the numbers of the blocks in which layers are adapted; one, or a list.
            A block's number is the last part of a layer's name that is one (behind two others), or
            that behind a name in `layers_pattern`: PEFT's rule.
        ensure_weight_tying: layers that share one weight, such as an embedding and its head, share
            one adapter.
        init_weights: True: A uniform, B zero, the model's output unchanged. "orthogonal": the same,
            with A of orthonormal rows. "loftq": over a quantised base, ΔW nearest to what
            quantising took away; `inject(..., reference=)` says from what. False: B random too, for
            tests. `initialize` gives A a start from data. Starts that move a part of the base into
            the adapter (PiSSA, OLoRA, MiLoRA) are left out on purpose: `unload` and
            `disable_adapter` would not give the base.
        use_rslora: rsLoRA's scale (arXiv 2312.03732), with which the size of an update does not
            shrink as r grows.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range; the text says which
            values are legal.
    """

    RECOMMENDED_RATE: ClassVar[float] = 2e-3
    """AdamW's learning rate for `recommended`: the best, or not told from it, in the experiment
    named there.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    fan_in_fan_out: bool | None = None
    bias: str = "none"
    modules_to_save: tuple[str, ...] | str | None = None
    init_weights: bool | str = True
    trainable_token_indices: Any = None
    ensure_weight_tying: bool = False
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for name, least in (("r", 1), ("hybrid_r", 0), ("gralora_k", 1)):
            self._set(name, _integer(name, getattr(self, name), least))
        self._set("alpha", _number("alpha", self.alpha))
        self._set("gralora_dropout", _number("gralora_dropout", self.gralora_dropout))
        if not 0 < self.alpha <= LARGEST_ALPHA:
            rule = f"it must be a finite number above 0, such as 64, and at most {LARGEST_ALPHA:g}"
            raise ValueError(f"alpha={self.alpha!r} is not legal: {rule}.")
        if not 0 <= self.gralora_dropout < 1:
            raise ValueError(
                f"gralora_dropout={self.gralora_dropout!r} is not legal: it must be at least 0 and"
                " below 1, such as 0.1."
            )
        if self.r % self.gralora_k:
            raise ValueError(
                f"gralora_k={self.gralora_k} does not divide r={self.r}. "
                f"Legal for this r: {', '.join(map(str, divisors(self.r)))}."
            )
        if self.bias not in BIAS_CHOICES:
            raise ValueError(
                f"bias={self.bias!r} is not legal: it must be one of"
                f" {', '.join(map(repr, BIAS_CHOICES))}."
            )
        if self.fan_in_fan_out not in (None, True, False):
            raise TypeError(
                f"fan_in_fan_out={self.fan_in_fan_out!r} is not legal: it must be None, True or"
                " False."
            )
        if not isinstance(self.init_weights, bool) and self.init_weights not in STARTS:
            legal = ", ".join(map(repr, (True, False, *STARTS)))
            data = (
                " Starts from data are for initialize()."
                if self.init_weights in STARTS_FROM_DATA
                else ""
            )
            kind = ValueError if isinstance(self.init_weights, str) else TypeError
            raise kind(
                f"init_weights={self.init_weights!r} is not legal: it must be one of {legal}.{data}"
            )
        for name in ("ensure_weight_tying", "use_rslora"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"{name}={getattr(self, name)!r} is not legal: it must be True or False."
                )
        self._set("trainable_token_indices", _tokens(self.trainable_token_indices))
        layers = self.layers_to_transform
        if layers is not None:
            given = layers if isinstance(layers, (list, tuple, range)) else [layers]
            self._set(
                "layers_to_transform",
                tuple(_integer("layers_to_transform", each, 0) for each in given),
            )
        pattern = self.layers_pattern
        self._set(
            "layers_pattern",
            _names(
                "layers_pattern",
                [pattern] if isinstance(pattern, str) else pattern,
                may_be_regex=False,
            ),
        )
        self._set(
            "target_modules", _names("target_modules", self.target_modules, may_be_regex=True)
        )
        self._set(
            "exclude_modules", _names("exclude_modules", self.exclude_modules, may_be_regex=True)
        )
        if self.modules_to_save != AUTO:
            self._set(
                "modules_to_save",
                _names("modules_to_save", self.modules_to_save, may_be_regex=False),
            )

    @classmethod
    def recommended(cls, r: int = 16, **fields: Any) -> GraloraConfig:
        """What did best of GraLoRA on a real language model, each setting at its own best learning
        rate.

        alpha = 32, k = 2 (or 1 where r is odd) and the usual start, for AdamW at
        `RECOMMENDED_RATE`, which was right at r = 16 and at 64; with rsLoRA's scale the best rate
        fell with r. It is LoRA's quality, and no more. Tune the rate all the same: on another model
        half of it was best, and with EVA's start it was half at r = 64 and an eighth at r = 16.
        Source: `benchmarks/evidence/chat_model.py`, results in `benchmarks/README.md`.

        Args:
            r: rank.
            fields: of the config, in place of what is recommended.
        """
        k = 2 - _integer("r", r, 1) % 2
        return cls(**{"r": r, "alpha": 32, "gralora_k": k, **fields})

    @property
    def scaling(self) -> float:
        """alpha / (r + hybrid_r), or alpha / √(r + hybrid_r) with `use_rslora`: the factor of the
        whole update.
        """
        rank = self.r + self.hybrid_r
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def plain_alpha(self) -> float:
        """The alpha that gives the same scaling without `use_rslora`."""
        return self.alpha * math.sqrt(self.r + self.hybrid_r) if self.use_rslora else self.alpha

    def scaled(self, scaling: float) -> GraloraConfig:
        """The same with the alpha that gives this scaling, without `use_rslora`."""
        return replace(self, alpha=scaling * (self.r + self.hybrid_r), use_rslora=False)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, ascending: the legal values of `gralora_k` for it."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def legal_k(in_features: int, out_features: int, r: int) -> str:
    """The values of `gralora_k` that fit a layer, as an error message lists them."""
    return ", ".join(map(str, divisors(math.gcd(in_features, out_features, r))))


def suggested(r: int, legal: Collection[int]) -> int:
    """The k of the paper's rule, 2 up to r = 32 and 4 from r = 64, or the largest legal one below
    it.
    """
    return max(k for k in legal if k <= (2 if r < 64 else 4))


def _integer(name: str, value: Any, least: int) -> int:
    rule = f"it must be an integer of at least {least}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}: {rule}, such as {name}={max(least, 2)}."
        )
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}={value!r} is not legal: {rule}.")
    if number > 2**31:
        raise ValueError(f"{name}={value!r} is not legal: it must be at most 2**31.")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not (hasattr(value, "__index__") or isinstance(value, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: it must be a number.")
    try:
        float(value)
    except OverflowError:
        raise ValueError(
            f"{name} is not legal: an integer that large has no finite float."
        ) from None
    return operator.index(value) if hasattr(value, "__index__") else float(value)


def _names(name: str, value: Any, *, may_be_regex: bool) -> str | tuple[str, ...] | None:
    if value is None or (may_be_regex and isinstance(value, str)):
        return value
    forms = (
        "a regular expression, a list of names or None"
        if may_be_regex
        else "a list of names or None"
    )
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(
        isinstance(item, str) for item in value
    ):
        raise TypeError(f"{name}={value!r} is not legal: it must be {forms}.")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _tokens(value: Any) -> Any:
    """Indices as tuples: of one embedding, or as pairs (name, indices)."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = tuple(value.items())
    rule = "it must be a list of token indices, or a mapping from names of embeddings to such lists"
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"trainable_token_indices={value!r} is not legal: {rule}, and not empty.")
    if all(
        isinstance(each, (list, tuple)) and len(each) == 2 and isinstance(each[0], str)
        for each in value
    ):
        return tuple((name, _tokens(list(indices))) for name, indices in value)
    if any(
        isinstance(index, bool) or not hasattr(index, "__index__") or index < 0 for index in value
    ):
        raise TypeError(f"trainable_token_indices={value!r} is not legal: {rule}, from 0 on.")
    indices = tuple(operator.index(index) for index in value)
    if len(set(indices)) != len(indices):
        raise ValueError("trainable_token_indices names a token twice.")
    return indices


def as_config(value: Any, what: str = "config") -> GraloraConfig | None:
    """A config of ours out of what people have: one of ours, PEFT's `GraloraConfig` by its fields,
    a dict of fields, or None.

    Raises:
        TypeError: it is none of these; of PEFT's other configs the text says what to write.
    """
    if value is None or isinstance(value, GraloraConfig):
        return value
    known = {each.name for each in fields(GraloraConfig)}
    if isinstance(value, dict):
        strange = sorted(set(value) - known)
        if strange:
            raise TypeError(
                f"{what} holds {', '.join(map(repr, strange))}; fields are:"
                f" {', '.join(sorted(known))}."
            )
        return GraloraConfig(**value)
    kind = str(getattr(value, "peft_type", "")).rpartition(".")[2].upper()
    if kind == "GRALORA":
        return GraloraConfig(
            **{name: getattr(value, name) for name in known if hasattr(value, name)}
        )
    if kind == "LORA":
        raise TypeError(
            f"{what} is PEFT's LoraConfig. LoRA is GraLoRA with k = 1: GraloraConfig(r={value.r},"
            f" alpha={value.lora_alpha}, gralora_dropout={value.lora_dropout}, gralora_k=1,"
            f" use_rslora={bool(getattr(value, 'use_rslora', False))}, target_modules=...)."
        )
    raise TypeError(
        f"{what} is a {type(value).__name__}: it must be a GraloraConfig, a dict of its fields, or"
        " None."
    )
