"""Base and adapters sharded over the processes by `fully_shard` (FSDP2); files hold whole tensors.

torchrun --nproc-per-node 2 benchmarks/recipes/fsdp.py
"""

import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gralora

distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.TransformerEncoder(
    nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False
)
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8))  # first inject, then shard
for block in [*model.layers, model]:
    fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-3)
model(torch.randn(2, 5, 64)).square().mean().backward()
optimizer.step()
gralora.save_adapter(model, "fsdp.safetensors")  # called on every rank; the base is not gathered
gralora.load_adapter(model, "fsdp.safetensors", trainable=True)  # into the shards
distributed.barrier()  # time for gloo's threads: at an exit they abort (pytorch issue 190489)
distributed.destroy_process_group()
