"""GraLoRA adapters (arXiv 2505.20355) for any `torch.nn.Module`: inject, train, save, merge.

import gralora

gralora.inject(model, "all-linear", gralora.GraloraConfig(r=32, gralora_k=2))
...                                              # train as usual
gralora.save_adapter(model, "adapter.safetensors")
"""

from gralora.config import GraloraConfig
from gralora.files.checkpoint import load_adapter, save_adapter, to_lora
from gralora.files.own import AdapterFileError
from gralora.files.serving import check_serving
from gralora.layers.base import GraloraLayer, delta_weight
from gralora.layers.convolution import GraloraConv, GraloraConvTranspose
from gralora.layers.embedding import GraloraEmbedding
from gralora.layers.kinds import adapted_class, register
from gralora.layers.linear import GraloraConv1D, GraloraLinear
from gralora.model.combine import combine
from gralora.model.control import (
    AdapterStatus,
    active_adapters,
    adapter_names,
    adapter_parameters,
    adapter_status,
    count_parameters,
    delete_adapter,
    disable_adapter,
    mark_only_adapters_trainable,
    mixed_batch,
    print_trainable_parameters,
    set_adapter,
)
from gralora.model.effect import check_effect
from gralora.model.extract import extract, reblock
from gralora.model.groups import adapter_parameter_groups
from gralora.model.hotswap import prepare_hotswap
from gralora.model.initialize import initialize
from gralora.model.inject import inject, unload
from gralora.model.merge import merge, merge_and_unload, unmerge
from gralora.model.shared import shared_copy
from gralora.model.state import UnknownAdapterError
from gralora.model.state_dict import adapter_state_dict, load_adapter_state_dict
from gralora.model.suggest import suggest_k
from gralora.model.summary import summary
from gralora.version import __version__

__all__ = [
    "AdapterFileError",
    "AdapterStatus",
    "GraloraConfig",
    "GraloraConv",
    "GraloraConv1D",
    "GraloraConvTranspose",
    "GraloraEmbedding",
    "GraloraLayer",
    "GraloraLinear",
    "UnknownAdapterError",
    "__version__",
    "active_adapters",
    "adapted_class",
    "adapter_names",
    "adapter_parameter_groups",
    "adapter_parameters",
    "adapter_state_dict",
    "adapter_status",
    "check_effect",
    "check_serving",
    "combine",
    "count_parameters",
    "delete_adapter",
    "delta_weight",
    "disable_adapter",
    "extract",
    "initialize",
    "inject",
    "load_adapter",
    "load_adapter_state_dict",
    "mark_only_adapters_trainable",
    "merge",
    "merge_and_unload",
    "mixed_batch",
    "prepare_hotswap",
    "print_trainable_parameters",
    "reblock",
    "register",
    "save_adapter",
    "set_adapter",
    "shared_copy",
    "suggest_k",
    "summary",
    "to_lora",
    "unload",
    "unmerge",
]
