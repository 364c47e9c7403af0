"""Files that the tests of files are tried on, written without the library's writers."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

GOOD = {"r": 4, "hybrid_r": 0, "alpha": 8, "gralora_k": 2, "gralora_dropout": 0.0}


def write(path, modules=None, tensors=None, **metadata):
    if tensors is None:
        tensors = {"q.gralora_A": torch.randn(2, 8, 4), "q.gralora_B": torch.randn(2, 4, 8)}
    modules = (
        modules
        if isinstance(modules, str)
        else json.dumps({"q": GOOD} if modules is None else modules)
    )
    save_file(
        tensors, path, {"format": "gralora", "format_version": "1", "modules": modules, **metadata}
    )
    return path


def big_checkpoint(folder, mebibytes, width=1024):
    """Square float32 layers in shards of 32 MiB, written one at a time."""
    folder.mkdir()
    weight_map, per_shard = {}, 8
    for shard in range(mebibytes // 32):
        tensors = {
            f"l.{shard * per_shard + i}.weight": torch.randn(width, width) for i in range(per_shard)
        }
        save_file(tensors, folder / f"model-{shard}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    layers = nn.ModuleDict(
        {"l": nn.ModuleList(nn.Linear(width, width, bias=False, device="meta") for _ in weight_map)}
    )
    return layers
