"""Compiled once for every adapter of one shape; exported with the adapter beside the weights, or
within, to ONNX too.

python benchmarks/recipes/compile_and_export.py
"""

import torch
from torch import nn

import gralora

model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
for name in ("french", "law"):
    gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8), adapter_name=name)
compiled, x = torch.compile(model, fullgraph=True), torch.randn(4, 64)
for name in ("french", "law"):
    gralora.set_adapter(model, name)
    with torch.no_grad():
        compiled(x)
batch = {0: torch.export.Dim("batch", min=2)}
torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(batch,)), "adapted.pt2")
gralora.merge_and_unload(model)
torch.onnx.export(model, (x,), "merged.onnx", dynamo=True, dynamic_shapes=(batch,))
