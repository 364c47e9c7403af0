"""Parents that read a layer's weight and never call the layer: an adapter on it would be dead, and nobody would know.

Seen in the source of the parent's `forward` and of the methods that it calls. What cannot be seen there (a layer taken
out of a list, a source that is not at hand) is not judged.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

from torch import nn

OF_NO_EFFECT = {
    *("dtype", "device", "shape", "ndim", "size", "dim", "numel", "layout", "stride", "type", "is_cuda", "is_meta"),
    *("is_cpu", "is_quantized", "requires_grad", "element_size", "itemsize", "is_floating_point", "is_contiguous"),
    "data_ptr",
}
"""What may be asked of a weight without computing with it."""


def reader_of(parent: nn.Module, child: str) -> str | None:
    """The class in whose forward `self.<child>.weight` is computed with, though `self.<child>` is never called there."""
    cls: Any = type(parent)
    original = getattr(cls, "_base_class", cls)
    read, called = _uses(original)
    return original.__name__ if child in read and child not in called else None


@lru_cache(maxsize=1024)
def _uses(cls: Any) -> tuple[frozenset[str], frozenset[str]]:
    """(attributes whose weight is computed with, attributes that are called) in all that `forward` reaches."""
    read: set[str] = set()
    called: set[str] = set()
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = waiting.pop()
        tree = None if method in seen else _tree(cls, method)
        seen.add(method)
        if tree is None:
            continue
        above = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            name = _own_attribute(node)
            if name is None:
                continue
            parent, grandparent = above.get(id(node)), above.get(id(above.get(id(node))))
            if isinstance(parent, ast.Call) and parent.func is node:
                called.add(name)
                waiting.append(name)
            elif isinstance(parent, ast.Attribute) and parent.attr == "weight":
                if not (isinstance(grandparent, ast.Attribute) and grandparent.attr in OF_NO_EFFECT):
                    read.add(name)
            elif isinstance(grandparent, ast.Call) and grandparent.func is parent:  # self.child.forward(x)
                called.add(name)
    return frozenset(read), frozenset(called)


def _own_attribute(node: ast.AST) -> str | None:
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else None


def _tree(cls: Any, method: str) -> ast.AST | None:
    function: Any = inspect.unwrap(getattr(cls, method, None))  # type: ignore[arg-type]
    if not inspect.isfunction(function) or (function.__module__ or "").startswith("torch.nn."):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
