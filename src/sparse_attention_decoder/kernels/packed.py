"""Keys and values in 8 or 4 bits a channel: how they are stored, and how they are read back.

A vector is rotated as the sketch rotates keys, which spreads outlier channels over all of them; then its largest
channel sets one step for the whole vector, and each channel is kept as a whole number of steps. The step has the sign
that makes the largest channel the lowest number, -128 or -8, for there is one more number below zero than above.
Nothing is fitted, so a token is stored the same whatever came before it. docs/experiments.md has what else was tried.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.kernels.rotation import rotate, unrotate
from sparse_attention_decoder.tables import KV_BITS

# what is added to four bits, so that none is negative
_CENTRE = 8


@dataclass(frozen=True)
class Packed:
    """Keys or values [..., T, D] in 8 or 4 bits a channel. Kernels take it wherever they take such a tensor.

    codes: int8 [..., T, D], steps of each rotated channel; in 4 bits uint8 [..., T, D/2], steps + 8, channel 2j in the
        low bits of byte j and channel 2j + 1 in the high ones.
    scales: float16 [..., T], the size of a token's step.
    dtype: of the tensor it stands for.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def room(cls, like: Tensor, kv_dtype: str) -> "Packed":
        """Uninitialised, for a tensor [..., T, D] like this one."""
        width, dtype = cls.storage(like.shape[-1], kv_dtype)
        codes = torch.empty((*like.shape[:-1], width), dtype=dtype, device=like.device)
        return cls(codes, codes.new_empty(codes.shape[:-1], dtype=torch.float16), like.dtype)

    @staticmethod
    def storage(dim: int, kv_dtype: str) -> tuple[int, torch.dtype]:
        """Length and dtype of a token's codes."""
        return (dim, torch.int8) if KV_BITS[kv_dtype] == 8 else (dim // 2, torch.uint8)

    # looked up many times a step
    @cached_property
    def bits(self) -> int:
        """Bits of a channel: 8 or 4."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @cached_property
    def shape(self) -> torch.Size:
        """Of the tensor it stands for."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def ndim(self) -> int:
        """Axes of the tensor it stands for."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> "Packed":
        """A view, or a selection, along the axes before the channels."""
        return Packed(self.codes[index], self.scales[index], self.dtype)

    def index_select(self, axis: int, index: Tensor) -> "Packed":
        """The entries `index` of one of the axes before the channels, counted from the first."""
        return Packed(self.codes.index_select(axis, index), self.scales.index_select(axis, index), self.dtype)

    def rotated(self) -> Tensor:
        """What is stored, as numbers [..., T, D]: rotated, float32 (float64 where it stands for float64)."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.bits == 8:
            steps = self.codes.to(work)
        else:
            steps = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2).to(work) - _CENTRE
        return steps * self.scales.unsqueeze(-1).to(work)

    def unpack(self) -> Tensor:
        """The tensor it stands for [..., T, D], in its dtype."""
        return unrotate(self.rotated()).to(self.dtype)

    def write(self, x: Tensor) -> None:
        """Store x [..., T, D]; NaN and infinity come back as NaN, numbers beyond the range of the scale too."""
        most = 2 ** (self.bits - 1)
        turned = rotate(x)
        largest = turned.gather(-1, turned.abs().argmax(-1, keepdim=True))
        scales = (largest / -most).to(torch.float16)
        size = scales.to(turned.dtype)
        steps = torch.where((size != 0) & size.isfinite(), turned / size, 0).round().clamp(-most, most - 1)
        self.scales.copy_(scales.squeeze(-1))
        if self.bits == 8:
            self.codes.copy_(steps)
        else:
            halves = (steps + _CENTRE).to(torch.uint8)
            self.codes.copy_(halves[..., 0::2] | halves[..., 1::2] << 4)


def plain(x: Tensor | Packed) -> Tensor:
    """Keys or values as a tensor, whichever form they are in."""
    return x.unpack() if isinstance(x, Packed) else x


def rotated(x: Tensor | Packed) -> Tensor:
    """Keys or values rotated, in float32 (float64 for float64), whichever form they are in."""
    return x.rotated() if isinstance(x, Packed) else rotate(x)


def stored_bytes(dim: int, kv_dtype: str | None, dtype: torch.dtype) -> int:
    """Bytes that a key or value of `dim` channels takes in a cache of this kind, its scale included."""
    return dim * dtype.itemsize if kv_dtype is None else dim * KV_BITS[kv_dtype] // 8 + 2
