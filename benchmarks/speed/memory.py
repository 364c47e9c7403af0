"""Bytes that autograd keeps for backward, and the peak of a step, for a block whose q, k and v
share one input.

1024 x 1024, 1024 tokens, r = 64, k = 4; each storage once, parameters left out.

    python -m benchmarks.speed.memory
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import common
from benchmarks.speed._counting import kept_for_backward, peak
from benchmarks.speed._variants import FROZEN, OURS, PEFT_GRALORA, PEFT_LORA, build

NAMES = (FROZEN, OURS, PEFT_GRALORA, PEFT_LORA)
MIB = 2**20


class Attention(nn.Module):
    """The three projections, and their sum as the output."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, size, dtype=dtype) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def main(argv: list[str] | None = None) -> None:
    args = common.parser(__doc__, quick="256 instead of 1024").parse_args(argv)
    size = 256 if args.quick else 1024
    result: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for dropout in (0.0, 0.1):
            models = build(Attention(size, dtype), ["q", "k", "v"], 64, 4, dropout, NAMES)
            x = torch.randn(1, size, size, dtype=dtype, requires_grad=True)
            kept, peaks = {}, {}
            for name, model in models.items():

                def step(model: nn.Module = model, x: torch.Tensor = x) -> None:
                    x.grad = None
                    model.zero_grad()
                    torch.autograd.backward(model(x), [torch.ones_like(x)] * 3)

                kept[name] = (
                    kept_for_backward(lambda m=model, x=x: m(x), list(model.parameters())) / MIB
                )
                peaks[name] = peak(step) / MIB
            case = f"{str(dtype).removeprefix('torch.')}{', dropout 0.1' if dropout else ''}"
            result[case] = {"kept": kept, "peak": peaks}
    head = ("", *(f"{name}, {what}" for what in ("kept", "peak") for name in NAMES))
    rows = [
        (case, *(f"{v[w][n]:.1f}" for w in ("kept", "peak") for n in NAMES))
        for case, v in result.items()
    ]
    print(common.table(head, rows) + "\n(MiB)")
    series = {name: [values["kept"][name] for values in result.values()] for name in NAMES}
    figure = common.bars(
        "Kept for backward: q, k and v over one input", "MiB", list(result), series
    )
    common.write(args.out, "memory", {"mib": result}, figure)


if __name__ == "__main__":
    main()
