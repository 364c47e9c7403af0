"""What other people's trainers need of a model with adapters. Stands on all the rest; imports a
trainer on demand only.

`transformers` is for its `Trainer` and what is built on it (TRL, sentence-transformers),
`lightning` for Lightning's.
"""
