"""transformers' `Trainer`, and those that are built on it: checkpoints of the adapter alone,
quantised bases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gralora.files.checkpoint import save_adapter
from gralora.files.own import unshared, write_tensors
from gralora.model.control import count_parameters
from gralora.model.state import check_known

WEIGHTS = "model.safetensors"


class AdapterCheckpoints:
    """A callback for `Trainer(callbacks=[...])`: checkpoints hold what is trained and nothing of
    the base, and resume.

    In each checkpoint `model.safetensors` holds what is trained, under the model's own names, which
    `resume_from_checkpoint` and `load_best_model_at_end` read; `adapter.safetensors` is the
    adapter's own file. The last of these also lies in `output_dir`, so that `push_to_hub` takes it.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name

    def on_save(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Called by the trainer, on every process."""
        assert model is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for place in (folder, Path(args.output_dir)):
            save_adapter(model, place / "adapter.safetensors", self.adapter_name)
        if getattr(state, "is_world_process_zero", True):
            trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            write_tensors(unshared(trained), folder / WEIGHTS, {"format": "pt"})
            for shard in [
                *folder.glob("model-*-of-*.safetensors"),
                folder / f"{WEIGHTS}.index.json",
            ]:
                shard.unlink(missing_ok=True)  # of the base

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):  # the trainer calls a method for every event
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def prepare(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Make a model ready for `Trainer`, in place, and return it.

    A trainer refuses a quantised model unless it is PEFT's, since it could not train anything of
    it; this one has adapters that it can. Gradient checkpointing needs inputs that require
    gradients where the embedding is frozen.

    Raises:
        KeyError: no such adapter. ValueError: nothing of the model is trained.
    """
    check_known(model, adapter_name)
    if not count_parameters(model)[0]:
        raise ValueError(
            "nothing of this model is trained: set_adapter, or load_adapter(..., trainable=True)."
        )
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]  # the trainer's question, and asked by it alone
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()
    return model
