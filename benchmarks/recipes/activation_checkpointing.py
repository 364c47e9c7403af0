"""Activations recomputed in the backward pass. The embedding is frozen, so reentrant checkpointing
needs a hook.

python benchmarks/recipes/activation_checkpointing.py
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gralora

embed, blocks = nn.Embedding(100, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
gralora.inject(blocks, "all-linear", gralora.GraloraConfig(r=8, gralora_dropout=0.1))
embed.requires_grad_(False)
# torch's reentrant checkpoints pass no gradient on to parameters unless some input needs one. This
# is that hook; `model.enable_input_require_grads()` in transformers is the same.
# use_reentrant=False needs none.
embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
for reentrant in (True, False):
    x = embed(torch.arange(12))
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    x.square().mean().backward()
