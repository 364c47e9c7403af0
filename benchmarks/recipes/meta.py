"""A model without memory is injected, and gets memory and values afterwards.

python benchmarks/recipes/meta.py
"""

import torch
from torch import nn

import gralora

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8))
model.to_empty(device="cpu")
for module in model.modules():
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()  # adapters, too
model.load_state_dict(
    base.state_dict()
)  # the base's names are the base's; adapters keep their values
x = torch.randn(4, 64)
assert torch.equal(model(x), base(x))  # B is zero at first
