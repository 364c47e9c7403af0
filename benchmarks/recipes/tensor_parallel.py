"""Weights cut over the processes by `parallelize_module`; an adapter follows the placement of its
weight.

torchrun --nproc-per-node 2 benchmarks/recipes/tensor_parallel.py
"""

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gralora

mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
# first parallelise, then inject. The number of processes should divide gralora_k: each then holds
# whole blocks
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8, gralora_k=2))
optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-3)
model(torch.randn(4, 64)).square().mean().backward()
optimizer.step()
gralora.save_adapter(model, "tensor_parallel.safetensors")  # called on every rank; whole tensors
distributed.barrier()  # time for gloo's threads: at an exit they abort (pytorch issue 190489)
distributed.destroy_process_group()
