"""Lightning: checkpoints of the adapter alone, and a run that goes on from one.

python benchmarks/recipes/lightning_module.py
"""

import lightning
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

import gralora
from gralora.integrations.lightning import adapter_checkpoints

BoringModel.configure_optimizers = lambda self: torch.optim.AdamW(
    gralora.adapter_parameters(self), lr=1e-3
)
options = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "limit_val_batches": 0,
}
for epochs, checkpoint in (
    (1, None),
    (2, "trained/adapter.ckpt"),
):  # the second goes on where the first has stopped
    module = gralora.inject(BoringModel(), ["layer"], gralora.GraloraConfig(r=4, gralora_k=2))
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[adapter_checkpoints()], **options)
    trainer.fit(module, DataLoader(RandomDataset(32, 64), batch_size=8), ckpt_path=checkpoint)
    trainer.save_checkpoint("trained/adapter.ckpt")
