"""DeepSpeed ZeRO-3: inject, then initialize. On every rank `save_adapter` puts the adapter
together, and nothing else.

torchrun --nproc-per-node 2 benchmarks/recipes/zero3.py
"""

import copy

import deepspeed
import torch
from torch import nn

import gralora

torch.manual_seed(0)
base, x = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 8)), torch.randn(4, 512)
model = gralora.inject(copy.deepcopy(base), "all-linear", gralora.GraloraConfig(r=256))
optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-2)
config = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "zero_force_ds_cpu_optimizer": False,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for _ in range(3):
    engine.backward(engine(x).square().mean())
    engine.step()
gralora.save_adapter(model, "adapter.safetensors")
torch.distributed.barrier()
assert torch.allclose(gralora.load_adapter(base, "adapter.safetensors")(x), engine(x), atol=1e-5)
