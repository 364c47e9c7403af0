"""GraLoRA adapters (arXiv 2505.20355) for any `torch.nn.Module`: inject, train, save, merge.

import gralora

gralora.inject(model, "all-linear", gralora.GraloraConfig(r=32, gralora_k=2))
...                                              # train as usual
gralora.save_adapter(model, "adapter.safetensors")
"""

from gralora.checkpoint import (
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
    to_lora,
)
from gralora.combine import combine
from gralora.config import GraloraConfig
from gralora.control import (
    adapter_names,
    adapter_parameters,
    count_parameters,
    delete_adapter,
    disable_adapter,
    mark_only_adapters_trainable,
    mixed_batch,
    print_trainable_parameters,
    set_adapter,
)
from gralora.convolution import GraloraConv
from gralora.extract import extract, reblock
from gralora.files import AdapterFileError
from gralora.inject import inject, unload
from gralora.kinds import adapted_class
from gralora.layers import GraloraLayer, delta_weight
from gralora.linear import GraloraConv1D, GraloraLinear
from gralora.merge import merge, merge_and_unload, unmerge
from gralora.shared import shared_copy
from gralora.state import UnknownAdapterError
from gralora.suggest import suggest_k
from gralora.summary import summary
from gralora.version import __version__

__all__ = [
    "AdapterFileError",
    "GraloraConfig",
    "GraloraConv",
    "GraloraConv1D",
    "GraloraLayer",
    "GraloraLinear",
    "UnknownAdapterError",
    "__version__",
    "adapted_class",
    "adapter_names",
    "adapter_parameters",
    "adapter_state_dict",
    "combine",
    "count_parameters",
    "delete_adapter",
    "delta_weight",
    "disable_adapter",
    "extract",
    "inject",
    "load_adapter",
    "load_adapter_state_dict",
    "mark_only_adapters_trainable",
    "merge",
    "merge_and_unload",
    "mixed_batch",
    "print_trainable_parameters",
    "reblock",
    "save_adapter",
    "set_adapter",
    "shared_copy",
    "suggest_k",
    "summary",
    "to_lora",
    "unload",
    "unmerge",
]
