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
    shown = {
        what: (
            ", ".join(dict.fromkeys(f"{getattr(config, field):g}" for config in configs)) or "none"
        )
        for what, field in (("r", "r"), ("k", "gralora_k"), ("alpha", "alpha"))
    }
    known = f"base_model: {file.base_name}\n" if file.base_name else ""
    lora = peft_type == "LORA"
    what = "plain LoRA, the exact rewriting of GraLoRA" if lora else "GraLoRA"
    served = (
        ""
        if not lora
        else f"\n```sh\nvllm serve {base} --enable-lora --lora-modules mine=THIS_FOLDER\n```\n"
    )
    kind = "its plain LoRA form" if lora else "PEFT's GraLoRA"
    (folder / "README.md").write_text(f"""---
{known}library_name: peft
tags:
- gralora
- lora
---

# An adapter of `{base}`

{what} ([arXiv 2505.20355](https://arxiv.org/abs/2505.20355)) on {len(configs)} layers:
r {shown["r"]}, k {shown["k"]}, alpha {shown["alpha"]}. Made with gralora; this folder holds {kind}.

```python
from gralora import load_adapter

load_adapter(model, "THIS_FOLDER")  # or peft.PeftModel.from_pretrained(model, "THIS_FOLDER")
```
{served}""")
