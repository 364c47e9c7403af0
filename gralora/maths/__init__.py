"""Pure functions on tensors; imports nothing of the library.

`functional` is the definition of GraLoRA, `autograd` the fast path that is held to it. Read them in this order.
"""
