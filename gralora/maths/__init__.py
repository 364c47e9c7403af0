"""Pure functions on tensors; imports nothing of the library.

`functional` is the definition of GraLoRA, `autograd` the fast path that is held to it, `grouped`
the same for rows that lie grouped by adapter. Read them in this order. `merging` makes one update
out of several, value by value; `starts` are values for A to start from.
"""
