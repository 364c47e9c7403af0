"""The gradient of every sample of a batch by `torch.func`, as differential privacy and influence
functions need it.

python benchmarks/recipes/per_sample_gradients.py
"""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import gralora

model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8))
trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss(parameters, x, target):
    return nn.functional.cross_entropy(functional_call(model, parameters, (x[None],)), target[None])


grads = vmap(grad(loss), in_dims=(None, 0, 0))(trained, torch.randn(8, 64), torch.arange(8))
assert all(g.shape == (8, *trained[name].shape) for name, g in grads.items())
