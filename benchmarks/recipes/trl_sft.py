"""TRL's SFTTrainer: train, stop, resume from the adapter's checkpoint, save for llama.cpp's and
vLLM's readers.

python benchmarks/recipes/trl_sft.py
"""

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

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
rows = Dataset.from_list([{"text": f"number {n} follows {n - 1}"} for n in range(32)])
tokenizer = AutoTokenizer.from_pretrained(minilm(), eos_token="[SEP]")
for steps in (3, 6):  # the second run goes on where the first has stopped
    args = SFTConfig("trained", max_steps=steps, save_steps=3, report_to=[], use_cpu=True)
    trainer = SFTTrainer(
        prepare(model),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[AdapterCheckpoints()],
    )
    trainer.train(resume_from_checkpoint=steps > 3)
gralora.save_adapter(model, "served", format="lora")
