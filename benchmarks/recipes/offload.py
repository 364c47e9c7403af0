"""Base weights on the disk, brought by `accelerate` for each forward; adapters stay, and are
trained.

python benchmarks/recipes/offload.py
"""

import accelerate
import torch
from torch import nn

import gralora

model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
accelerate.disk_offload(model, "offloaded", execution_device="cpu")  # before or after inject
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8))
accelerator = accelerate.Accelerator(cpu=True)
optimizer = accelerator.prepare(torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-3))
accelerator.backward(model(torch.randn(4, 64)).square().mean())
optimizer.step()
gralora.save_adapter(model, "offload.safetensors")
