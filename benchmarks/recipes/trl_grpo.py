"""TRL's GRPO: answers are sampled with the adapter, and a reward trains it.

python benchmarks/recipes/trl_grpo.py
"""

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import gralora
from benchmarks.jobs.encoder import minilm  # a tokenizer that a package ships
from gralora.integrations.transformers import AdapterCheckpoints, prepare

sizes = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
model = LlamaForCausalLM(LlamaConfig(vocab_size=30522, **sizes))
gralora.inject(model, "all-linear", gralora.GraloraConfig(r=8))
few = {
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "beta": 0.0,
}
args = GRPOConfig("trained", max_steps=2, save_steps=2, report_to=[], use_cpu=True, **few)
reward = lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions]  # noqa: E731
data = Dataset.from_list([{"prompt": "say many words"}] * 8)
tokenizer = AutoTokenizer.from_pretrained(minilm(), eos_token="[SEP]", padding_side="left")
options = {
    "processing_class": tokenizer,
    "train_dataset": data,
    "callbacks": [AdapterCheckpoints()],
}
GRPOTrainer(prepare(model), reward, args, **options).train()
