"""Lightning: checkpoints of the adapter alone."""

from __future__ import annotations

import importlib
from typing import Any


def adapter_checkpoints() -> Any:
    """A callback for Lightning's `Trainer(callbacks=[...])`: checkpoints hold what is trained and
    nothing of the base.

    `trainer.fit(module, ckpt_path=...)` goes on from one: what it does not hold is the module's
    own.
    """
    found = next(
        (name for name in ("lightning.pytorch", "pytorch_lightning") if _there(name)), None
    )
    if found is None:
        raise ImportError("this needs Lightning: pip install lightning.")
    callback: Any = importlib.import_module(found).Callback

    class AdapterCheckpoints(callback):  # type: ignore[misc]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.strict_loading = False

        def on_save_checkpoint(
            self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]
        ) -> None:
            trained = {
                name for name, parameter in pl_module.named_parameters() if parameter.requires_grad
            }
            checkpoint["state_dict"] = {
                k: t for k, t in checkpoint["state_dict"].items() if k in trained
            }

    return AdapterCheckpoints()


def _there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
