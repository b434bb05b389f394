"""What the tests of Triton's kernels share: where they run, and what of a case lies there."""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sparse_attention_decoder.kernels.triton import TritonKernels, interpreted

TRITON = TritonKernels()
NO_GPU = "no CUDA device: Triton's interpreter plays it"

# PyTorch's own matrix products are deterministic on a GPU, which the fixture `poison` asks for, only with this
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# for what only a GPU can show
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]
# the interpreter where there is no GPU (see conftest), and the GPU where there is one
each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            torch.device("cpu"),
            id="interpreter",
            marks=pytest.mark.skipif(not interpreted(), reason="the kernels are compiled for the GPU that is here"),
        ),
        pytest.param(torch.device("cuda"), id="cuda", marks=on_a_gpu),
    ],
)

# the interpreter counts in NumPy, which warns of infinities that kernels take in their stride, and of its own ways
laws_of_kernels = [
    each_device,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def on(device: torch.device, case: Any) -> Any:
    """A copy of a case on a device: tensors, and what is made of them."""
    if isinstance(case, Tensor):
        return case.to(device, copy=True)
    if isinstance(case, (tuple, list)):
        return type(case)(on(device, part) for part in case)
    if is_dataclass(case) and not isinstance(case, type):
        return replace(case, **{field.name: on(device, getattr(case, field.name)) for field in fields(case)})
    return case


def home(case: Any) -> Any:
    """The same on the CPU, where the definitions are."""
    return on(torch.device("cpu"), case)


def rows_and_heads(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Every row and KV head of a [B, Hkv, ...] tensor."""
    return ((row, head) for row in range(tensor.shape[0]) for head in range(tensor.shape[1]))
