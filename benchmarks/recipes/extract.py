"""The adapter of a model that was tuned whole: extract it, cut it into other blocks, write it as
plain LoRA.

python benchmarks/recipes/extract.py
"""

import copy

import torch
from torch import nn

import gralora

base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
tuned, errors = copy.deepcopy(base), {}
with torch.no_grad():
    tuned[0].weight.add_(0.01 * torch.randn(128, 64))
gralora.extract(base, tuned, ["0"], gralora.GraloraConfig(r=32, gralora_k=4), errors=errors)
print(errors)  # how far base is from tuned now, by layer
gralora.reblock(base, gralora_k=2)  # the same adapter, cut otherwise
pairs = gralora.to_lora(base)
update = pairs["0.lora_B.weight"] @ pairs["0.lora_A.weight"]  # ΔW, exactly
assert torch.allclose(update, gralora.delta_weight(base[0]), atol=1e-6)
