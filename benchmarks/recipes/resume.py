"""A training run that can be killed at any moment: all of one step is in one folder, there whole or
not at all.

python benchmarks/recipes/resume.py
"""

import tempfile
from pathlib import Path

import torch

import gralora

torch.manual_seed(0)
model, last = (
    torch.nn.Linear(64, 64),
    max((int(each.name) for each in Path().glob("[0-9]*")), default=0),
)
gralora.load_adapter(model, f"{last}/adapter", trainable=True) if last else gralora.inject(
    model, ""
)
optimizer = torch.optim.AdamW(gralora.adapter_parameters(model))
if last:
    optimizer.load_state_dict(torch.load(f"{last}/optimizer"))
for step in range(last + 1, 4):
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    half = tempfile.mkdtemp(dir=".", prefix=".")
    gralora.save_adapter(model, f"{half}/adapter")
    torch.save(optimizer.state_dict(), f"{half}/optimizer")
    Path(half).rename(str(step))
