"""Layers with weights of 8 or 4 bits over ATen's packed matmuls: fast for bfloat16 activations, on the CPU alone."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_attention_decoder.errors import UnsupportedError

GROUP = 32
# from so many rows on, one matrix unpacked to bfloat16 and multiplied is faster than the packed product
MANY_ROWS = 64
# of a matrix that is read at once: bounds the float32 there is meanwhile, and fills whole blocks of the int4 layout
ROWS_AT_ONCE = 1024
# rows that ATen interleaves in its int4 layout, which depends on the instruction set
_BLOCKS = {"AVX512": 64, "AVX2": 32}


class Packed(nn.Module):
    """What Int8Linear and Int4Linear share: inputs [..., K] in bfloat16, outputs [..., N].

    Args:
        rows, columns: N and K.
        bias: [N], or None.
    Raises:
        UnsupportedError: at the forward, other activations than bfloat16, or gradients asked for.
    """

    multiple: ClassVar[tuple[int, int]]
    # which axis of the scales is that of the rows
    scales_axis: ClassVar[int]
    codes: Tensor
    scales: Tensor

    def __init__(self, rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)

    @property
    def is_whole_blocks(self) -> bool:
        """Whether codes of another matrix behind its own make up one matrix."""
        return True

    @classmethod
    def takes(cls, rows: int, columns: int) -> bool:
        """Whether ATen's kernel can read a matrix of this shape; on another int8's reads beyond the end."""
        return rows > 0 and columns > 0 and rows % cls.multiple[0] == 0 and columns % cls.multiple[1] == 0

    def forward(self, x: Tensor) -> Tensor:
        """The product: one packed matmul for few rows, as in decoding; an unpacked matrix for many."""
        if x.dtype != torch.bfloat16:
            raise UnsupportedError(
                f"weights in {self.extra_repr()} take bfloat16 activations, got {x.dtype}; leave the model in bfloat16"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"weights in {self.extra_repr()} have no gradients; train with float32 or bf16")
        flat = x.reshape(-1, self.in_features)
        if flat.shape[0] < MANY_ROWS:
            product = self.product(flat)
        else:
            product = functional.linear(flat, self._dequantised(torch.bfloat16))
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def dequantised(self) -> Tensor:
        """The matrix [N, K] that the codes stand for, in float32: what `forward` is defined by."""
        return self._dequantised(torch.float32)

    # quantises rows [n, K] of a float matrix to the places from `start` on, a multiple of ROWS_AT_ONCE
    fill: Callable[[int, Tensor], None]
    # x W^T of a few rows [n, K] in bfloat16, without the bias
    product: Callable[[Tensor], Tensor]
    _dequantised: Callable[[torch.dtype], Tensor]


class Int8Linear(Packed):
    """Codes int8 [N, K] and a scale for each row, bfloat16 [N]: weight = code * scale."""

    multiple, scales_axis = (1, 16), 0

    def __init__(self, rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__(rows, columns, bias)
        self.register_buffer("codes", torch.empty(rows, columns, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(rows, dtype=torch.bfloat16))

    def extra_repr(self) -> str:
        """How messages and printed models name it."""
        return "int8"

    def fill(self, start: int, rows: Tensor) -> None:
        """Quantise rows [n, K] with the scale as it is kept, so that rounding it costs nothing."""
        rows = rows.float()
        scale = (rows.abs().amax(1) / 127).to(torch.bfloat16)
        scale = torch.where(scale == 0, 1, scale)
        self.scales[start : start + len(rows)] = scale
        self.codes[start : start + len(rows)] = (
            (rows / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        )

    def product(self, flat: Tensor) -> Tensor:
        """Rows [n, K] in bfloat16 times the matrix: [n, N], without the bias."""
        product: Tensor = torch.ops.aten._weight_int8pack_mm(flat, self.codes, self.scales)
        return product

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype) * self.scales.to(dtype)[:, None]


class Int4Linear(Packed):
    """Codes of 4 bits in ATen's layout, uint8 [N, K/2], and scales bfloat16 [K/32, N, 2].

    Of 32 weights of a row: weight = (code - 8) * scales[..., 0] + scales[..., 1].
    """

    multiple, scales_axis = (16, GROUP), 1

    def __init__(self, rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__(rows, columns, bias)
        _require_known_layout()
        self.register_buffer("codes", torch.empty(rows, columns // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(columns // GROUP, rows, 2, dtype=torch.bfloat16))

    def extra_repr(self) -> str:
        """How messages and printed models name it."""
        return "int4"

    @property
    def is_whole_blocks(self) -> bool:
        """Whether rows that ATen interleaves are all its own."""
        return self.out_features % _block() == 0

    def fill(self, start: int, rows: Tensor) -> None:
        """Quantise rows [n, K] between the least and the greatest of each 32."""
        groups = rows.float().view(len(rows), -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).to(torch.bfloat16).float()
        scale = torch.where(scale == 0, 1, scale)
        zero = (low + 8 * scale).to(torch.bfloat16).float()
        codes = ((groups - zero[..., None]) / scale[..., None] + 8).round_().clamp_(0, 15).to(torch.int32)
        self.fill_codes(start, codes, scale, zero)

    def fill_codes(self, start: int, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Take over rows that are in this form already.

        Args:
            codes: int32 [n, K/32, 32] from 0 to 15.
            scale, zero: [n, K/32].
        """
        stop = start + len(codes)
        self.codes[start:stop] = _pack(codes.flatten(1))
        self.scales[:, start:stop] = torch.stack([scale.T, zero.T], -1).to(torch.bfloat16)

    def product(self, flat: Tensor) -> Tensor:
        """Rows [n, K] in bfloat16 times the matrix: [n, N], without the bias."""
        # a part of a larger matrix has scales that are not in one piece, see `siblings`
        scales = self.scales.contiguous()
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, GROUP, scales)
        return product

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        codes = _unpack(self.codes).view(-1, GROUP, self.out_features)
        scale, zero = self.scales.to(dtype)[:, None].unbind(-1)
        # fused: a product rounded to bfloat16 before the sum would double the error
        return torch.addcmul(zero, codes.to(dtype).sub_(8), scale).flatten(0, 1).T


class Int8Embedding(nn.Module):
    """Rows of an Int8Linear, its codes and scales shared: ids [...] to bfloat16 [..., K]."""

    codes: Tensor
    scales: Tensor

    def __init__(self, matrix: Int8Linear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.out_features, matrix.in_features
        self.register_buffer("codes", matrix.codes)
        self.register_buffer("scales", matrix.scales)

    def extra_repr(self) -> str:
        """How printed models name it."""
        return "int8"

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of these ids."""
        codes: Tensor = functional.embedding(ids, self.codes)
        return codes.to(torch.bfloat16) * functional.embedding(ids, self.scales[:, None])


def _pack(codes: Tensor) -> Tensor:
    """Codes int32 [n, K] in ATen's layout, uint8 [n, K/2]."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    return packed.view(len(codes), -1)


def _unpack(packed: Tensor) -> Tensor:
    """The inverse of _pack, transposed: uint8 [K, N]. ATen has none."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    capability, block = torch.backends.cpu.get_cpu_capability(), _block()
    whole = rows // block * block
    # x86 kernels keep the first half of a block in the low bits; elsewhere, and in a last part, neighbours share a byte
    halves = packed[:whole].view(-1, columns, block // 2)
    parts = [halves & 15, halves >> 4]
    together = torch.cat(parts, -1) if capability in _BLOCKS else torch.stack(parts, -1).flatten(2)
    found = together.transpose(0, 1).reshape(columns, whole)
    if whole == rows:
        return found
    pairs = packed[whole:].view(columns, -1)
    return torch.cat([found, torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)], 1)


def _block() -> int:
    return _BLOCKS.get(torch.backends.cpu.get_cpu_capability(), 32)


@cache
def _require_known_layout() -> None:
    with torch.device("cpu"):
        codes = (
            torch.arange(16).repeat(176 * 2).view(176, 32).roll(3, 0).int() ^ (torch.arange(176).int() % 16)[:, None]
        )
        if not torch.equal(_unpack(_pack(codes)), codes.T):
            raise UnsupportedError("this PyTorch packs int4 weights in an unknown layout; use weights='int8'")


def named_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and scales of every packed layer."""
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            yield f"{name}.scales", module.scales
