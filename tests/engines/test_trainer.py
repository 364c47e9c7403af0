"""transformers' `Trainer`, with the recipe's callback, and `generate`."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gralora

from ..models import gpt2, random_config, relative, same_bits
from ..needs import needs

needs("accelerate")  # which the Trainer needs
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def adapted():
    torch.manual_seed(0)
    model = gpt2(resid_pdrop=0.1, attn_pdrop=0.1)
    return gralora.inject(model, ["c_attn", "c_proj", "c_fc"], random_config(gralora_dropout=0.1))


def trainer(folder, model, steps, **options):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class AdapterOnly(TrainerCallback):  # as in benchmarks/recipes/trainer.py
        def on_save(self, args, state, control, model, **kwargs):
            checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
            save_file({n: p for n, p in model.named_parameters() if p.requires_grad}, f"{checkpoint}/model.safetensors")
            gralora.save_adapter(model, f"{checkpoint}/adapter.safetensors")

    rows = [{"input_ids": list(range(n, n + 8)), "labels": [n % 2] * 8} for n in range(32)]
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, args, train_dataset=rows, callbacks=[AdapterOnly()])


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_checkpoints_hold_the_adapter_alone_and_resume_to_the_bit(tmp_path, options):
    model = adapted()
    whole = trainer(tmp_path / "whole", adapted(), 6, **options)  # which seeds the process
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert (checkpoint / "optimizer.pt").exists()
    adapter_bytes = sum(p.numel() for p in gralora.adapter_parameters(model)) * 4
    assert (checkpoint / "model.safetensors").stat().st_size < adapter_bytes + 8000

    torch.manual_seed(99)  # nothing of the process's own state may matter
    resumed = trainer(tmp_path / "resumed", model, 6, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert same_bits(p, q), name
    assert [row["loss"] for row in resumed.state.log_history if "loss" in row] == losses

    fresh = gpt2()
    fresh.load_state_dict({n: t for n, t in model.state_dict().items() if "gralora_" not in n})
    gralora.load_adapter(fresh, tmp_path / "whole" / "checkpoint-6" / "adapter.safetensors")
    tokens = torch.arange(12)[None]
    near = 0.02 if "bf16" in options else 1e-5  # the Trainer leaves its autocast in the model
    torch.testing.assert_close(fresh(tokens).logits, whole.model.eval()(tokens).logits.float(), rtol=near, atol=near)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_cache(cache, beams):
    torch.manual_seed(0)
    model = gralora.inject(gpt2(), ["c_attn", "c_proj", "c_fc"], random_config(alpha=16))
    tokens = torch.arange(6).reshape(2, 3)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": beams, "use_cache": cache}
    found = model.generate(tokens, **options)
    with gralora.disable_adapter(model):
        assert not torch.equal(model.generate(tokens, **options), found)
    logits = model(tokens).logits
    gralora.merge_and_unload(model)
    assert relative(model(tokens).logits, logits) < 1e-4
    assert torch.equal(model.generate(tokens, **options), found)
