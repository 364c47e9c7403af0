"""Lightning, with the library's callback."""

import pytest
import torch

import gralora
from gralora.integrations.lightning import adapter_checkpoints

from ..models import random_config, same_bits
from ..needs import needs

lightning = needs("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def trained(epochs, checkpoint=None):
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    class Module(BoringModel):
        def configure_optimizers(self):
            return torch.optim.AdamW(gralora.adapter_parameters(self), lr=1e-2)

    torch.manual_seed(0)
    module = gralora.inject(Module(), ["layer"], random_config(modules_to_save=None))
    torch.manual_seed(1)
    data = torch.utils.data.DataLoader(RandomDataset(32, 32), batch_size=8)
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "limit_val_batches": 0,
    }
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[adapter_checkpoints()], **options
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module, trainer


def test_a_checkpoint_holds_the_adapter_alone_and_a_run_goes_on_from_it(tmp_path):
    whole, _ = trained(2)
    half, trainer = trained(1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]
    assert held and all("gralora_" in key for key in held)
    resumed, _ = trained(2, tmp_path / "a.ckpt")
    for mine, other, start in zip(
        *(gralora.adapter_parameters(m) for m in (resumed, whole, half)), strict=True
    ):
        assert same_bits(mine, other) and not same_bits(mine, start)


def test_a_missing_package_is_named(monkeypatch):
    import sys

    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install lightning"):
        adapter_checkpoints()
