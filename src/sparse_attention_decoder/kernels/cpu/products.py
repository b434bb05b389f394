"""A matrix times a few rows, as a decode step multiplies it: read once, at the speed of memory.

PyTorch's `functional.linear` is the definition. Of one row of float32 it runs on one thread and reaches a third of
the speed of memory; of several it adds up in another order than of each alone. Here no row depends on another.
"""

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.cpu.library import DTYPES, PRODUCT, run

# rows of the input; more are a chunk of a prompt, and bound by arithmetic
MOST_ROWS = 16
_MULTIPLE = 8


def takes(weight: Tensor) -> bool:
    """Whether `multiply` takes a matrix [N, K]: on the CPU, of 16- or 32-bit floats, K a multiple of 8."""
    is_plain = weight.is_cpu and weight.dtype in DTYPES and weight.layout is torch.strided
    return is_plain and weight.ndim == 2 and weight.stride(1) == 1 and weight.shape[1] % _MULTIPLE == 0


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for up to MOST_ROWS rows, added up in float32; each row as it would be alone, bit for bit.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; all of one dtype, float32, bfloat16 or float16.
    Returns:
        [..., N] in that dtype.
    Raises:
        ShapeError: they do not fit each other.
    """
    columns, count = weight.shape[-1], x.numel() // max(1, x.shape[-1])
    if not takes(weight) or x.shape[-1] != columns or count > MOST_ROWS or not x.is_cpu:
        raise ShapeError(
            f"{tuple(x.shape)} times {tuple(weight.shape)} transposed; expected up to {MOST_ROWS} rows of K "
            f"channels and [N, K] on the CPU, K a multiple of {_MULTIPLE} and the last axis in one piece"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"a bias of {tuple(bias.shape)} for a matrix of {tuple(weight.shape)}; expected one number a row"
        )
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise ShapeError(f"{x.dtype} times {weight.dtype}; expected one dtype for input, matrix and bias")
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    output = x.new_empty(*x.shape[:-1], len(weight))
    struct = PRODUCT.pack(
        count, len(weight), columns, torch.get_num_threads(), DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(),
        weight.stride(0), 0 if bias is None else bias.data_ptr(), output.data_ptr(),
    )  # fmt: skip
    run("sad_multiply", struct)
    return output
