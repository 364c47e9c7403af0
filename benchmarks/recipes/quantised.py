"""A 4-bit base with float32 adapters, and plain merged layers out of it.

python benchmarks/recipes/quantised.py
"""

import bitsandbytes
import torch
from torch import nn

import gralora

model = nn.Sequential(
    bitsandbytes.nn.Linear4bit(64, 128, quant_type="nf4"), nn.GELU(), nn.Linear(128, 10)
)
model.to("cpu")  # moving it quantises it
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8))
optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-3)
for _ in range(10):
    optimizer.zero_grad()
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
gralora.save_adapter(model, "quantised.safetensors")  # the adapter alone
gralora.merge_and_unload(
    model, dequantize=torch.bfloat16
)  # merge refuses: nothing can be added to 4 bits
assert type(model[0]) is nn.Linear and model[0].weight.dtype == torch.bfloat16
