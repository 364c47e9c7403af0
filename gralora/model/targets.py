"""Which modules an adapter goes on: every form of `targets`, and the checks before anything is
changed.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn
from torch.nn.parameter import is_lazy

from gralora.config import GraloraConfig, as_config, divisors, legal_k, suggested
from gralora.engines.walk import all_named_modules, modules
from gralora.layers.class_change import join
from gralora.layers.kinds import ADAPTABLE, maps_of, why_refused
from gralora.layers.linear_map import PREFIX, LinearMap
from gralora.model.defaults import default_targets, settled
from gralora.model.saved import SavedModule

Predicate = Callable[[str, nn.Module], bool]
Pattern = str | Collection[str] | Predicate
Targets = Pattern | Mapping[Any, GraloraConfig | None] | None

ALL_LINEAR = "all-linear"
HIDDEN = re.compile(rf"(?:^|\.)(?:{PREFIX}|parametrizations(?:\.|$))")
"""In a qualified name: what is ours, or `torch.nn.utils.parametrize`'s."""


@dataclass(frozen=True)
class Target:
    """One linear map to adapt, and how."""

    name: str
    map: LinearMap
    config: GraloraConfig


class Names:
    """The modules of a model and the linear maps in them, with every name that leads there;
    adapters are left out, and what `torch.nn.utils.parametrize` keeps.

    A map that is a part of its module bears the module's names with its own behind a dot.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, list[str]] = {}
        self.modules: dict[int, nn.Module] = {}
        for name, module in all_named_modules(model):
            if HIDDEN.search(name):
                continue
            self.names.setdefault(id(module), []).append(name)
            self.modules[id(module)] = module
        self.maps: list[tuple[list[str], LinearMap]] = []
        for _, its_names, module in self:
            for map in maps_of(module):
                self.maps.append(
                    ([(join(name, map.part) if map.part else name) for name in its_names], map)
                )
        # a module may hold its map in a child, as nn.MultiheadAttention does in out_proj: the child
        # is no map of its own
        held = {id(map.place[0]) for _, map in self.maps if map.place[0] is not map.module}
        self.maps = [(its, map) for its, map in self.maps if id(map.module) not in held]
        self.held = held
        self.left_out: list[str] = []  # linear layers that "all-linear" can't take

    def __iter__(self) -> Iterator[tuple[int, list[str], nn.Module]]:
        return ((key, self.names[key], module) for key, module in self.modules.items())

    def find(self, pattern: str | Collection[str]) -> list[tuple[str, nn.Module]]:
        """(first name, module) of each that `pattern`, a regular expression or list of names,
        matches.
        """
        match = _matcher(pattern)
        return [
            (names[0], module)
            for _, names, module in self
            if any(match(name, module) for name in names)
        ]


class _Rule(NamedTuple):
    """What one pattern takes, and what is excluded from it."""

    match: Predicate
    excluded: Predicate
    listed: bool

    def takes(self, its_names: list[str], module: nn.Module) -> bool:
        return any(
            self.match(name, module) and not self.excluded(name, module) for name in its_names
        )

    def leaves(self, its_names: list[str], module: nn.Module) -> bool:
        return all(self.excluded(name, module) for name in its_names)

    def takes_part(
        self, map: LinearMap, its_names: list[str], module_names: list[str], by_module: bool
    ) -> bool:
        """Whether a map that is a part of its module is taken, by its own name or the module's."""
        owner = map.place[0]
        if self.leaves(module_names, map.module) or self.leaves(its_names, owner):
            return False
        by_name = self.takes(its_names, owner)
        if map.by_own_name:
            return by_name and (self.listed or not by_module)
        return by_name or by_module


def resolve(
    model: nn.Module, targets: Targets, config: GraloraConfig | None, names: Names
) -> list[Target]:
    """The layers that `targets` means, in module order, each with its config.

    Raises:
        ValueError: nothing matches (the text shows the nearest names), or some match cannot be
            adapted (the text names every one, and the legal values of k). TypeError: `targets` has
            no form that is known.
    """
    rules = _rules(model, targets, config or GraloraConfig())
    saved = _inside(names, [tuple(c.modules_to_save or ()) for _, c in rules])
    found: dict[int, Target] = {}
    strangers: dict[int, str] = {}
    for pattern, rule_config in rules:
        _take(model, pattern, rule_config, names, saved, found, strangers)
    ordered = [found[index] for index in range(len(names.maps)) if index in found]
    if not ordered and not strangers:
        raise ValueError(_nothing_matches(rules, names))
    problems = [
        *_problems(ordered),
        *(strangers[key] for key in names.modules if key in strangers),
    ]
    if problems:
        raise ValueError("\n".join(problems))
    _warn_of_layout(ordered)
    saved_names = {name for key in saved for name in names.names.get(key, ())}
    names.left_out = [name for name in names.left_out if name not in saved_names]
    if names.left_out:
        k = ordered[0].config.gralora_k
        warnings.warn(
            f'"{ALL_LINEAR}" leaves out {shorten(names.left_out)}: k={k} divides not both of their'
            " sizes. A head that is made for a task belongs in modules_to_save.",
            UserWarning,
            stacklevel=3,
        )
    return ordered


def _take(
    model: nn.Module,
    pattern: Pattern,
    config: GraloraConfig,
    names: Names,
    saved: set[int],
    found: dict[int, Target],
    strangers: dict[int, str],
) -> None:
    """Add to `found` the maps that one pattern takes, by index, and to `strangers` the modules that
    it takes and that cannot be adapted. The first pattern that takes a map wins.
    """
    listed = not isinstance(pattern, str) and isinstance(pattern, Collection)
    rule = _Rule(_matcher_for(model, pattern, names, config), _excluded(config), listed)
    whole = {
        key
        for key, its_names, module in names
        if key not in saved and rule.takes(its_names, module)
    }
    for index, (its_names, map) in enumerate(names.maps):
        key = id(map.module)
        if index in found or key in saved:
            continue
        taken = key in whole
        if map.part:
            taken = rule.takes_part(map, its_names, names.names[key], taken)
        if taken:
            found[index] = Target(its_names[0], map, config)
    hosts = {id(map.module) for _, map in names.maps if not map.by_own_name}
    for key in whole - hosts - names.held:
        if listed or any(p is not None for p in names.modules[key]._parameters.values()):
            strangers[key] = _stranger(key, names, listed)
    if listed:
        _warn_of_absent(cast(Collection[str], pattern), names)


def nearest(name: str, known: Collection[str], count: int = 3) -> str:
    """The known names that look most like `name`, as an error message lists them."""
    short = {n.rsplit(".", 1)[-1]: n for n in reversed(list(known)) if n}
    close = difflib.get_close_matches(name, list(known), count, 0.3)
    close += [
        short[s]
        for s in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(short), count, 0.3)
    ]
    return ", ".join(repr(n) for n in dict.fromkeys(close or list(known)[:count]))


def shorten(items: Iterable[str], count: int = 5) -> str:
    """The first of `items`, and how many more there are."""
    items = list(items)
    return ", ".join(items[:count]) + (
        f" and {len(items) - count} more" if len(items) > count else ""
    )


def _rules(
    model: nn.Module, targets: Targets, default: GraloraConfig
) -> list[tuple[Pattern, GraloraConfig]]:
    if isinstance(targets, GraloraConfig) or hasattr(targets, "peft_type"):
        raise TypeError(
            "targets is a GraloraConfig: call inject(model, targets, config), or inject(model,"
            " config=config)."
        )
    if targets is None:
        targets = (
            default.target_modules if default.target_modules is not None else default_targets(model)
        )
    if isinstance(targets, Mapping):
        if not targets:
            raise ValueError("targets is an empty mapping: nothing would be adapted.")
        configs = {
            pattern: as_config(value, f"targets[{pattern!r}]") or default
            for pattern, value in targets.items()
        }
        return [(pattern, settled(model, config)) for pattern, config in configs.items()]
    return [(cast(Pattern, targets), default)]


def _matcher_for(
    model: nn.Module, pattern: Pattern, names: Names, config: GraloraConfig
) -> Predicate:
    if pattern == ALL_LINEAR:
        heads = {id(head) for head in _output_heads(model)}
        linear = [
            (its[0], map)
            for its, map in names.maps
            if map.in_all_linear
            and (map.lazy or reason_unfit(map) is None)  # the error names lazy ones
            and id(map.module) not in heads
        ]
        fit = {
            id(map.place[0])
            for _, map in linear
            if map.lazy or not any(size % config.gralora_k for size in map.divided_sizes)
        }
        if not fit:
            return lambda name, module: (
                id(module) in {id(map.place[0]) for _, map in linear}
            )  # the error names them
        excluded = _excluded(config)
        names.left_out = [
            name
            for name, map in linear
            if id(map.place[0]) not in fit and not excluded(name, map.module)
        ]
        return lambda name, module: id(module) in fit
    return _matcher(pattern)


def _excluded(config: GraloraConfig) -> Predicate:
    """Layers that a config leaves out: by name, or since they are in none of its
    `layers_to_transform`.
    """
    named = _matcher(config.exclude_modules or ())
    if config.layers_to_transform is None:
        return named
    return lambda name, module: named(name, module) or not _wanted(name, config)


def _wanted(name: str, config: GraloraConfig) -> bool:
    """Whether a layer is in a block that `layers_to_transform` has, by PEFT's rule."""
    if config.layers_to_transform is None:
        return True
    patterns = [rf".*\.{pattern}\.(\d+)\." for pattern in config.layers_pattern or ()] or [
        r".*\.[^.]*\.(\d+)\."
    ]
    found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
    return found is not None and int(found.group(1)) in config.layers_to_transform


def _matcher(pattern: object) -> Predicate:
    if isinstance(pattern, str):
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"targets={pattern!r} is no regular expression: {error}.") from None
        return lambda name, module: regex.fullmatch(name) is not None
    if callable(pattern):
        return lambda name, module: bool(cast(Predicate, pattern)(name, module))
    if isinstance(pattern, Collection) and all(isinstance(item, str) for item in pattern):
        wanted = tuple(cast(Collection[str], pattern))
        return lambda name, module: _listed(name, wanted) is not None
    raise TypeError(
        f"targets={pattern!r} is a {type(pattern).__name__}: it must be a regular expression, a"
        " list of names, "
        f'"{ALL_LINEAR}", a function (name, module) -> bool, a mapping from these to configs, or'
        " None."
    )


def _listed(name: str, wanted: Collection[str]) -> str | None:
    return next(
        (item for item in wanted if name == item or (item and name.endswith(f".{item}"))), None
    )


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """Output layers: what `get_output_embeddings()` returns, and every linear layer tied to an
    embedding.
    """
    heads = []
    for module in modules(model):
        try:
            head = (
                cast(Any, module).get_output_embeddings()
                if hasattr(module, "get_output_embeddings")
                else None
            )
        except (NotImplementedError, AttributeError):
            head = None
        if isinstance(head, nn.Module):
            heads.append(head)
    embedded = {id(m.weight) for m in modules(model) if isinstance(m, nn.Embedding)}
    return heads + [m for m in modules(model) if id(_own_weight(m)) in embedded]


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter of that name; asked in a way that TorchScript modules know as well."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def output_tied(model: nn.Module) -> bool:
    """Whether the config of a transformers model says that head and embedding are one, and they
    are.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return False
    try:
        parts = [getattr(model, f"get_{which}_embeddings")() for which in ("input", "output")]
    except (AttributeError, NotImplementedError):
        return False
    first, second = (
        part._parameters.get("weight") if isinstance(part, nn.Module) else None for part in parts
    )
    return first is not None and first is second


def reason_unfit(map: LinearMap) -> str | None:
    """Why a map of a model cannot be adapted, whatever the config; None if it can."""
    if isinstance(map.module, SavedModule):
        return "is in another adapter's modules_to_save; a layer is adapted or saved, not both"
    return map.reason_unfit()


def _stranger(key: int, names: Names, listed: bool) -> str:
    """The error for a module that is taken and can't be adapted."""
    name, module = names.names[key][0], names.modules[key]
    if any(map(is_lazy, module.parameters(recurse=False))):
        return f"{name!r} has no shape yet (a lazy module); run one forward pass first."
    experts = [its_names[0] for its_names, map in names.maps if map.module is module]
    if experts:
        return (
            f"{name!r} is a {type(module).__name__}, whose 3-D parameters are adapted, as fused"
            " experts, only where a target names them and not their module:"
            f" {', '.join(map(repr, experts))}. Name these, or leave the module out."
        )
    if _looks_like_conv1d(module):
        return (
            f"{name!r} is a {type(module).__module__}.{type(module).__qualname__}, which is not"
            " transformers' Conv1D. If it computes x @ W + b with a weight (in, out), as GPT-2's"
            " does: gralora.register(its class, transposed=True). If not, leave it out."
        )
    reason = why_refused(module)
    if reason is not None:
        return (
            f"{name!r} is a {type(module).__name__}, which can't be adapted: {reason}. Leave it out"
            " with "
            f'exclude_modules, or take "{ALL_LINEAR}".'
        )
    if listed or not name:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return (
            f"{name!r} is a {type(module).__name__} ({kind}); adaptable are {ADAPTABLE}. One that"
            " computes x @ Wᵀ + b with a weight of its own: gralora.register(its class)."
        )
    return (
        f"{name!r} is a {type(module).__name__}, whose weights can't be adapted; adaptable are"
        f" {ADAPTABLE}. Leave it out with "
        f'exclude_modules, or take "{ALL_LINEAR}", which is every linear layer but the output head.'
    )


def _looks_like_conv1d(module: nn.Module) -> bool:
    weight = _own_weight(module)
    named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    return named and type(weight) is nn.Parameter and weight.dim() == 2


def _problems(targets: list[Target]) -> list[str]:
    problems = []
    for target in targets:
        reason = reason_unfit(target.map)
        if reason is not None:
            problems.append(f"{target.name!r} {reason}.")
            continue
        sizes = target.map.divided_sizes
        k, r = target.config.gralora_k, target.config.r
        bad = [
            f"{side}={size}"
            for side, size in zip(("in_features", "out_features"), sizes, strict=True)
            if size % k
        ]
        if bad:
            best = suggested(r, divisors(math.gcd(*sizes, r)))
            problems.append(
                f"gralora_k={k} does not divide {' and '.join(bad)} of {target.name!r} (r={r}). "
                f"Legal here: {legal_k(*sizes, r)}. suggest_k gives {best}."
            )
    return problems


def _inside(names: Names, patterns: list[tuple[str, ...] | None]) -> set[int]:
    wanted = [item for pattern in patterns for item in pattern or ()]
    return {id(m) for _, module in (names.find(wanted) if wanted else ()) for m in modules(module)}


def _warn_of_absent(pattern: Collection[str], names: Names) -> None:
    known = [
        name for its in (*names.names.values(), *(its for its, _ in names.maps)) for name in its
    ]
    present = {_listed(name, [item]) for item in pattern for name in known}
    absent = [item for item in pattern if item not in present]
    if absent and len(absent) < len(pattern):
        warnings.warn(
            f"targets not found in this model, passed over: {', '.join(absent)}",
            UserWarning,
            stacklevel=5,
        )


def _warn_of_layout(targets: list[Target]) -> None:
    wrong = [
        t.name
        for t in targets
        if t.config.fan_in_fan_out is not None and t.config.fan_in_fan_out is not t.map.transposed
    ]
    if wrong:
        message = (
            f"fan_in_fan_out contradicts the layout of {shorten(wrong, 3)}; the layout is read off"
            " the layer."
        )
        warnings.warn(message, UserWarning, stacklevel=4)


def _nothing_matches(rules: list[tuple[Pattern, GraloraConfig]], names: Names) -> str:
    linear = [its[0] for its, _ in names.maps]
    if not linear:
        return f"nothing to adapt: this model has none of {ADAPTABLE}."
    given = [p for p, _ in rules]
    texts = [
        text
        for p in given
        for text in ([p] if isinstance(p, str) else p if isinstance(p, Collection) else [])
    ]
    close = "; ".join(nearest(text, linear) for text in texts) or nearest("", linear)
    shown = given[0] if len(given) == 1 else given
    matched = any(
        _matcher(pattern)(name, module)
        for pattern in given
        for _, its, module in names
        for name in its
    )
    what = "nothing that can be adapted" if matched else "no module of this model"
    advice = ""
    for text in texts:
        ends = [name for name in linear if name.endswith(f".{text}")]
        if isinstance(given[0], str) and ends and re.fullmatch(r"[\w.]+", text):
            advice = (
                f" A string is a regular expression for the whole name: [{text!r}] takes"
                f" {len(ends)} layers, and so does "
            )
            advice += f"r'.*\\.{text}'."
    return f"targets={shown!r} match {what}.{advice} Nearest names: {close}."
