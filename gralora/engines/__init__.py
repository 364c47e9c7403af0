"""What PyTorch's own engines need of an adapter: weights spread over processes, or kept elsewhere.
Stands on `maths`.

`walk` goes through a model whatever holds it, `distributed` is for DDP, FSDP2 and tensor
parallelism, `offload` for accelerate's hooks; each can be read alone.
"""
