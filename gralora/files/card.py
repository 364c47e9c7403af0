"""The model card of a folder that PEFT's users share: what it is of, and how to load it here and
elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from gralora.files.own import AdapterFile


def write_card(file: AdapterFile, folder: Path, peft_type: str) -> None:
    """`README.md` into `folder`, as the Hugging Face hub shows it."""
    base = file.base_name or "BASE"
    configs = list(file.configs.values())

    def values(field: str) -> str:
        shown = dict.fromkeys(f"{getattr(config, field):g}" for config in configs)
        return ", ".join(shown) or "none"

    r, k, alpha = values("r"), values("gralora_k"), values("alpha")
    known = f"base_model: {file.base_name}\n" if file.base_name else ""
    what, kind, served = "GraLoRA", "PEFT's GraLoRA", ""
    if peft_type == "LORA":
        what, kind = "plain LoRA, the exact rewriting of GraLoRA", "its plain LoRA form"
        serve = f"vllm serve {base} --enable-lora --lora-modules mine=THIS_FOLDER"
        served = f"\n```sh\n{serve}\n```\n"
    (folder / "README.md").write_text(f"""---
{known}library_name: peft
tags:
- gralora
- lora
---

# An adapter of `{base}`

{what} ([arXiv 2505.20355](https://arxiv.org/abs/2505.20355)) on {len(configs)} layers:
r {r}, k {k}, alpha {alpha}. Made with gralora; this folder holds {kind}.

```python
from gralora import load_adapter

load_adapter(model, "THIS_FOLDER")  # or peft.PeftModel.from_pretrained(model, "THIS_FOLDER")
```
{served}""")
