"""Adapters in files and folders, and checkpoints on disk. Uses `model` and what is below.

Read `own` (what a file holds, and the library's own format), `formats` (the table of all), then
`checkpoint` (save, load). `peft`, `lora`, `gguf`, `diffusers` (kohya's too) and `mlx` are further
formats: a new one is a file here and a row there. `pairs` reads and lays out LoRA pairs for all of
them. `experts`, `tokens`, `patterns` and `card` are what is peculiar to fused experts, to single
tokens, and to PEFT's folders. `serving` knows what servers refuse or ignore. `ondisk` merges into
checkpoints larger than memory by way of `shards`; `atomic` puts files in place whole.
"""
