"""Every private name of PyTorch that this library uses, in one place.

Each says what it is for, which public name could replace it, and what happens if PyTorch drops it.
`tests/test_torch_internals.py` fails by name for each that is missing. Methods that PyTorch leaves
to subclasses (`_load_from_state_dict`, `_save_to_state_dict`, `_apply`) are not listed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm, conv, linear
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations

any_autocast_enabled = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any device. Public: `torch.is_autocast_enabled(device_type)`, five
times as slow, and asked for on every forward. Without it: use that.
"""

functorch_active = torch._C._are_functorch_transforms_active
"""Whether a `torch.func` transform is active, where a fused Function without a vmap rule cannot
run. Public: none. Without it: `torch.func` over an adapted layer fails.
"""

get_tracing_state = torch._C._get_tracing_state
"""Not None under `torch.jit.trace`. Public: `torch.jit.is_tracing()`, which is several times as
slow. Without it: use that.
"""

disable_torch_function = torch._C.DisableTorchFunctionSubclass
"""Within it a tensor subclass is treated as a plain tensor. Public: none. Without it: reading the
shape of a lazy weight would call its own handlers for ever.
"""

DENSE_SUBCLASSES: tuple[type[Tensor], ...] = (FakeTensor, FunctionalTensor)
"""What stands for plain tensors under export and make_fx. Public: none. Without them: the adapter
of a weight that is read is missing from an exported program.
"""

MODULE_CALL = nn.Module._call_impl.__code__
"""The code that runs a module's forward and its hooks, as it appears on the call stack. Public:
none. Without it: weights that are read in forward hooks are not effective weights.
"""

SpectralNorm: type[nn.Module] = parametrizations._SpectralNorm
"""What `torch.nn.utils.parametrizations.spectral_norm` registers. Public: none. Without it: the
vectors of spectral norm move in training.
"""

NormBase: type[nn.Module] = batchnorm._NormBase
"""The base of all norms with running statistics. Public: `BatchNorm1d` to `3d`, `InstanceNorm1d` to
`3d`, `SyncBatchNorm`. Without it: list these.
"""

ConvNd = conv._ConvNd
"""The base of all convolutions. Public: `Conv1d` to `3d` and `ConvTranspose1d` to `3d`. Without it:
list these. Of its methods `_conv_forward` and `_output_padding` are used, and the attribute
`_reversed_padding_repeated_twice`.
"""

AttentionOutput = linear.NonDynamicallyQuantizableLinear
"""The class of `nn.MultiheadAttention.out_proj`, by which it is recognised. Public: none. Without
it: an `out_proj` that is targeted alone is adapted without an effect.
"""


def in_forward_ad() -> bool:
    """Whether forward-mode AD is on. Public: none. Without it: forward-mode AD over an adapted
    layer fails.
    """
    return bool(forward_ad._current_level >= 0)


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread. Public: none. Without it: a checkpointed
    forward that runs again reads parameters instead of effective weights.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def storage_use_count(tensor: Tensor) -> int:
    """How many tensors share the memory of this one. Public: none. Without it: an output is copied
    before an adapter is added to it.
    """
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def saved_tensor_hooks() -> Any:
    """The innermost pair of hooks on saved tensors, which identifies a checkpointed region; None
    outside of one. Public: none. Without it: experts that are checkpointed save their effective
    weight once more.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def wrapper_subclass(cls: type[Tensor], shape: Any, **options: Any) -> Any:
    """A tensor of a subclass without memory of its own. Public: none. Without it: code that reads a
    weight materialises W + ΔW.
    """
    return Tensor._make_wrapper_subclass(cls, shape, **options)


global_hooks = [
    getattr(module_hooks, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
"""The hooks that hold for every module. Public: only functions that add to them. Without it: global
hooks do not see adapters whose layer runs as one fused function.
"""


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook waits for `module` to be called: then it must be called. Public: none. Without
    it: hooks on an adapter do not fire where its layer runs as one fused function.
    """
    own = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return bool(own) or any(global_hooks)
