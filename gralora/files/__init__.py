"""Adapters in files and folders, and checkpoints on disk. Stands on `model` and what is below.

Read `own` (what a file holds, and the library's own format), then `checkpoint` (save, load, the table of formats). `peft`
and `lora` are further formats: a new one is a file here and a row there. `experts`, `tokens` and `patterns` are what is
peculiar to fused experts, to single tokens, and to PEFT's configs. `ondisk` merges into checkpoints larger than memory by
way of `shards`; `atomic` puts files in place whole; `former` is what earlier versions called things.
"""
