"""One model serves several threads; what a thread does to the adapters in a `with` block is its
own.

python benchmarks/recipes/threads.py
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import gralora

model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)).eval()
for name in ("french", "law"):
    gralora.inject(
        model, "all-linear", gralora.GraloraConfig(r=8, init_weights=False), adapter_name=name
    )


@torch.no_grad()
def answer(names):
    with gralora.mixed_batch(model, names):
        return model(torch.ones(len(names), 64))


with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(answer, [["french"], ["law", None], [None, "french", "law"]] * 8))
