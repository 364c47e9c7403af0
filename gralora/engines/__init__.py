"""What PyTorch's own engines need of an adapter: weights spread over processes, or kept elsewhere. Stands on `maths`.

`distributed` (DDP, FSDP2, tensor parallelism), `offload` (accelerate's hooks); each can be read alone.
"""
