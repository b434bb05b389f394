"""A matrix times a few rows, as a decode step multiplies it: read once, at the speed of memory.

PyTorch's `functional.linear` is the definition. Of one row of float32 it runs on one thread and reaches a third of
the speed of memory; of several it adds up in another order than of each alone. Here no row depends on another.
"""

import torch
from torch import Tensor, nn

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.cpu.library import DTYPES, PRODUCT, run

# rows of the input; more are a chunk of a prompt, and bound by arithmetic
MOST_ROWS = 16
_MULTIPLE = 8


def takes(weight: Tensor) -> bool:
    """Whether `multiply` takes a matrix [N, K]: on the CPU, of 16- or 32-bit floats, K a positive multiple of 8."""
    if not (weight.is_cpu and weight.dtype in DTYPES and weight.layout is torch.strided and weight.ndim == 2):
        return False
    columns = weight.shape[1]
    return columns > 0 and columns % _MULTIPLE == 0 and weight.stride(1) == 1


def fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `multiply` takes a matrix and these rows [..., K], by shape, dtype and device."""
    if not takes(weight) or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        return False
    is_few = x.numel() <= MOST_ROWS * weight.shape[1]
    is_bias = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.is_cpu)
    return is_few and is_bias and x.dtype == weight.dtype and x.is_cpu


def is_in_memory(*tensors: Tensor | None) -> bool:
    """Whether their numbers lie where `data_ptr` says: subclasses, of quantised or imagined tensors, may have none."""
    return all(tensor is None or type(tensor) is Tensor or type(tensor) is nn.Parameter for tensor in tensors)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for up to MOST_ROWS rows, added up in float32; each row as it would be alone, bit for bit.

    Args:
        x: [..., K]; weight: [N, K]; bias: [N] or None; all of one dtype, float32, bfloat16 or float16.
    Returns:
        [..., N] in that dtype, without gradients.
    Raises:
        ShapeError: they do not fit each other.
    """
    if not (fits(x, weight, bias) and is_in_memory(x, weight, bias)):
        raise ShapeError(
            f"{_said(x)} times {_said(weight)} transposed, plus {'nothing' if bias is None else _said(bias)}; expected "
            f"up to {MOST_ROWS} rows [..., K], [N, K] with K a multiple of {_MULTIPLE} and the last axis in one piece, "
            "and [N], plain tensors on the CPU, of one dtype, float32, bfloat16 or float16"
        )
    return multiply_fitting(x, weight, bias)


def multiply_fitting(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`multiply`, for who has asked `fits` and `is_in_memory`: asking twice costs as much as a small product."""
    rows, columns = weight.shape
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    output = x.new_empty(*x.shape[:-1], rows)
    struct = PRODUCT.pack(
        x.numel() // columns, rows, columns, torch.get_num_threads(), DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(),
        weight.stride(0), 0 if bias is None else bias.data_ptr(), output.data_ptr(),
    )  # fmt: skip
    run("sad_multiply", struct)
    return output


def _said(tensor: Tensor) -> str:
    return f"{type(tensor).__name__} {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
