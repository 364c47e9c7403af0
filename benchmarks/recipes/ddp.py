"""Each process computes its part of the batch, and `DistributedDataParallel` averages the
gradients.

torchrun --nproc-per-node 2 benchmarks/recipes/ddp.py
"""

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gralora

distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8))  # before it is wrapped
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-3)
x = torch.randn(8, 64).chunk(distributed.get_world_size())[distributed.get_rank()]
for _ in range(3):
    optimizer.zero_grad()
    wrapped(x).square().mean().backward()
    optimizer.step()
gralora.save_adapter(model, "ddp.safetensors")  # rank 0 writes
distributed.barrier()  # time for gloo's threads: at an exit they abort (pytorch issue 190489)
distributed.destroy_process_group()
