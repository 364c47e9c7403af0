"""transformers' `Trainer`, with the library's callback, and `generate`."""

import pytest
import torch
from safetensors import safe_open

import gralora
from gralora.integrations.transformers import AdapterCheckpoints, prepare

from ..models import gpt2, random_config, relative, same_bits
from ..needs import needs

needs("accelerate")  # which the Trainer needs
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def adapted():
    torch.manual_seed(0)
    model = gpt2(resid_pdrop=0.1, attn_pdrop=0.1)
    return gralora.inject(model, ["c_attn", "c_proj", "c_fc"], random_config(gralora_dropout=0.1))


def trainer(folder, model, steps, **options):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": list(range(n, n + 8)), "labels": [n % 2] * 8} for n in range(32)]
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=4,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, args, train_dataset=rows, callbacks=[AdapterCheckpoints()])


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
    for (name, p), q in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert same_bits(p, q), name
    assert [row["loss"] for row in resumed.state.log_history if "loss" in row] == losses

    fresh = gpt2()
    fresh.load_state_dict({n: t for n, t in model.state_dict().items() if "gralora_" not in n})
    gralora.load_adapter(fresh, tmp_path / "whole" / "checkpoint-6" / "adapter.safetensors")
    tokens = torch.arange(12)[None]
    near = 0.02 if "bf16" in options else 1e-5  # the Trainer leaves its autocast in the model
    torch.testing.assert_close(
        fresh(tokens).logits, whole.model.eval()(tokens).logits.float(), rtol=near, atol=near
    )


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_cache(cache, beams):
    torch.manual_seed(0)
    model = gralora.inject(gpt2(), ["c_attn", "c_proj", "c_fc"], random_config(alpha=16))
    tokens = torch.arange(6).reshape(2, 3)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "num_beams": beams,
        "use_cache": cache,
    }
    found = model.generate(tokens, **options)
    with gralora.disable_adapter(model):
        assert not torch.equal(model.generate(tokens, **options), found)
    logits = model(tokens).logits
    gralora.merge_and_unload(model)
    assert relative(model(tokens).logits, logits) < 1e-4
    assert torch.equal(model.generate(tokens, **options), found)


def test_checkpoints_of_experts_resume_and_the_best_is_loaded(tmp_path):
    from transformers import Trainer, TrainingArguments

    from ..layers.test_experts import mixtral

    torch.manual_seed(0)
    model = gralora.inject(mixtral(), ["gate_up_proj", "down_proj", "q_proj"], random_config())
    rows = [{"input_ids": list(range(n % 8, n % 8 + 8)), "labels": [n % 2] * 8} for n in range(16)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    trained = Trainer(
        prepare(model),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[AdapterCheckpoints()],
    )
    trained.train()
    best = trained.state.best_model_checkpoint
    with safe_open(f"{best}/model.safetensors", "pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert values.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(same_bits(p, values[name]) for name, p in model.named_parameters() if name in values)
    again = gralora.load_adapter(mixtral_like(model), tmp_path / "adapter.safetensors")
    assert relative(again(torch.arange(8)[None]).logits, model(torch.arange(8)[None]).logits) < 1e-5


def mixtral_like(model):
    import copy

    return gralora.unload(copy.deepcopy(model))


def test_a_quantised_base_is_accepted_and_trained(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    needs("bitsandbytes")
    from ..models import llama

    llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map="cpu"
    )
    gralora.inject(model, "all-linear", random_config())
    rows = [{"input_ids": list(range(n, n + 8)), "labels": [n % 2] * 8} for n in range(16)]
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, args, train_dataset=rows)
    before = [p.detach().clone() for p in gralora.adapter_parameters(model)]
    Trainer(prepare(model), args, train_dataset=rows, callbacks=[AdapterCheckpoints()]).train()
    assert not any(
        same_bits(p, old) for p, old in zip(gralora.adapter_parameters(model), before, strict=True)
    )
    assert (tmp_path / "out" / "adapter.safetensors").exists()


def test_what_there_is_nothing_to_train_of_is_refused():
    model = adapted()
    gralora.set_adapter(model, "default", trainable=False)
    with pytest.raises(ValueError, match="nothing of this model is trained"):
        prepare(model)
    with pytest.raises(KeyError, match="no adapter 'default'"):
        prepare(gpt2())
    with pytest.raises(AttributeError):
        AdapterCheckpoints().something_else  # noqa: B018
