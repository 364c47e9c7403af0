"""TRL's DPO that goes on from an SFT adapter: the reference is a copy over the same base weights,
with that adapter.

python benchmarks/recipes/trl_dpo.py
"""

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

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
gralora.inject(
    model, "all-linear", gralora.GraloraConfig(r=8)
)  # or load_adapter(model, "sft", trainable=True)
reference = gralora.shared_copy(model)  # no weight is copied
gralora.set_adapter(
    reference, "default", trainable=False
)  # gralora.unload(reference) would make it the bare base
data = Dataset.from_list([{"prompt": "is it good?", "chosen": " yes", "rejected": " no"}] * 16)
args = DPOConfig("trained", max_steps=3, save_steps=3, report_to=[], use_cpu=True)
options = {"train_dataset": data, "callbacks": [AdapterCheckpoints()]}
options["processing_class"] = AutoTokenizer.from_pretrained(minilm(), eos_token="[SEP]")
DPOTrainer(prepare(model), reference, args, **options).train()
