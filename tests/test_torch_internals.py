"""The private names of PyTorch: each is there, and all are in one file."""

import importlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gralora"
NAMES = [
    "torch._C._is_any_autocast_enabled",
    "torch._C._are_functorch_transforms_active",
    "torch._C._get_tracing_state",
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._current_graph_task_id",
    "torch._C._storage_Use_Count",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch.Tensor._make_wrapper_subclass",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.functional_tensor.FunctionalTensor",
    "torch.autograd.forward_ad._current_level",
    "torch.nn.Module._call_impl",
    "torch.nn.Module._replicate_for_data_parallel",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.nn.modules.module._global_backward_hooks",
    "torch.nn.modules.module._global_backward_pre_hooks",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.conv._ConvNd._conv_forward",
    "torch.nn.modules.conv._ConvTransposeNd._output_padding",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    "torch.nn.utils.parametrizations._SpectralNorm",
]


@pytest.mark.parametrize("name", NAMES)
def test_pytorch_has(name):
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            assert hasattr(found, part), f"PyTorch has dropped {name}"
            found = getattr(found, part)
        return
    raise AssertionError(name)


PRIVATE = re.compile(
    r"\btorch\._|\bforward_ad\._|\bTensor\._make|nn\.Module\._[a-z]"
    r"|parametrizations\._|import _[A-Z]"
)


def test_no_other_file_uses_one():
    wrong = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "torch_internals.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert not wrong
