"""transformers' `Trainer`: checkpoints hold the adapter alone (in model.safetensors), and training
resumes from them.

python benchmarks/recipes/trainer.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gralora
from gralora.integrations.transformers import AdapterCheckpoints, prepare

model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100))
gralora.inject(model, ["c_attn", "c_proj", "c_fc"], gralora.GraloraConfig(r=8))
gralora.check_effect(model, torch.arange(16)[None])  # every adapter acts and is trained
rows = [
    {"input_ids": [i % 100 for i in range(n, n + 16)], "labels": list(range(16))} for n in range(32)
]
args = TrainingArguments("trained", max_steps=6, save_steps=3, report_to=[], use_cpu=True)
trainer = Trainer(prepare(model), args, train_dataset=rows, callbacks=[AdapterCheckpoints()])
trainer.train()  # resume_from_checkpoint=True goes on; "trained/adapter.safetensors" is the adapter
