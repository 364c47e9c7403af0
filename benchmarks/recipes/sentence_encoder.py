"""sentence-transformers: a real encoder tuned by pairs of sentences, its adapter saved by itself
and loaded again.

python benchmarks/recipes/sentence_encoder.py
"""

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss

import gralora
from benchmarks.jobs.encoder import minilm
from gralora.integrations.transformers import AdapterCheckpoints, prepare

model = SentenceTransformer(str(minilm()), device="cpu")
gralora.inject(model, ["query", "key", "value"], gralora.GraloraConfig(r=8))
pairs = [
    ("a cat", "an animal"),
    ("an oak", "a tree"),
    ("a car", "a vehicle"),
    ("an apple", "a fruit"),
] * 4
data = Dataset.from_list([{"anchor": anchor, "positive": positive} for anchor, positive in pairs])
args = SentenceTransformerTrainingArguments(
    "trained", max_steps=3, save_steps=3, report_to=[], use_cpu=True
)
loss, callbacks = MultipleNegativesRankingLoss(model), [AdapterCheckpoints()]
SentenceTransformerTrainer(
    prepare(model), args, train_dataset=data, loss=loss, callbacks=callbacks
).train()
fresh = gralora.load_adapter(
    SentenceTransformer(str(minilm()), device="cpu"), "trained/adapter.safetensors"
)
print("loaded again, off by", abs(fresh.encode("a dog") - model.encode("a dog")).max())
