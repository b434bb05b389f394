"""Keys and values in 8 or 4 bits a channel: how they are stored, and how they are read back.

The newest tokens may still be whole, as they came: rounded at once, they are what four bits would lose most of.

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
    newest: [..., W, D] in that dtype, the tokens behind those T that are whole; it then stands for T + W of them.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    newest: Tensor | None = None

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
        *before, tokens, width = self.codes.shape
        return torch.Size((*before, tokens + self.whole, width * 8 // self.bits))

    @cached_property
    def stored(self) -> "Packed":
        """What is packed of it, alone: of a cache the same for many steps, so that kernels may note things on it."""
        return self if self.newest is None else Packed(self.codes, self.scales, self.dtype)

    @property
    def whole(self) -> int:
        """How many of the newest tokens are whole."""
        return 0 if self.newest is None else self.newest.shape[-2]

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
        """Bytes of codes, scales and what is whole."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.newest is None else self.newest.nbytes)

    def __getitem__(self, index: Any) -> "Packed":
        """A view, or a selection, along the axes before the channels; of the tokens a slice, where some are whole."""
        if self.newest is None:
            return Packed(self.codes[index], self.scales[index], self.dtype)
        index = index if isinstance(index, tuple) else (index,)
        packed, whole = list(index), list(index)
        axes = [at for at, entry in enumerate(index) if entry is not None]
        if len(axes) == self.ndim - 1:
            at, before = axes[-1], self.codes.shape[-2]
            low, high, _ = index[at].indices(self.shape[-2])
            packed[at] = slice(min(low, before), min(high, before))
            whole[at] = slice(max(low - before, 0), max(high - before, 0))
        return Packed(self.codes[tuple(packed)], self.scales[tuple(packed)], self.dtype, self.newest[tuple(whole)])

    def index_select(self, axis: int, index: Tensor) -> "Packed":
        """The entries `index` of one of the axes before the channels, counted from the first.

        Where some are whole, those of the tokens' axis come packed ones first: ascending they stay in order.
        """
        if self.newest is None:
            return Packed(self.codes.index_select(axis, index), self.scales.index_select(axis, index), self.dtype)
        whole = index
        if axis == self.ndim - 2:
            before = self.codes.shape[-2]
            index, whole = index[index < before], index[index >= before] - before
        codes, scales = self.codes.index_select(axis, index), self.scales.index_select(axis, index)
        return Packed(codes, scales, self.dtype, self.newest.index_select(axis, whole))

    def before(self, newest: Tensor) -> "Packed":
        """This, which has none, with newest tokens [..., W, D] behind it."""
        made = Packed(self.codes, self.scales, self.dtype, newest)
        vars(made)["stored"] = self
        return made

    def settled(self) -> "Packed":
        """All of it as it will be stored once nothing is whole."""
        if self.newest is None:
            return self
        codes, scales = self.codes, self.scales
        if self.whole:
            rest = Packed.room(self.newest, f"int{self.bits}")
            rest.write(self.newest)
            codes, scales = torch.cat([codes, rest.codes], -2), torch.cat([scales, rest.scales], -1)
        return Packed(codes, scales, self.dtype)

    def rotated(self) -> Tensor:
        """The numbers it stands for [..., T, D], rotated: float32 (float64 where it stands for float64)."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.bits == 8:
            steps = self.codes.to(work)
        else:
            steps = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(-2).to(work) - _CENTRE
        numbers = steps * self.scales.unsqueeze(-1).to(work)
        return numbers if self.newest is None else torch.cat([numbers, rotate(self.newest)], -2)

    def unpack(self) -> Tensor:
        """The tensor it stands for [..., T, D], in its dtype."""
        if self.newest is None:
            return unrotate(self.rotated()).to(self.dtype)
        return torch.cat([self.stored.unpack(), self.newest], -2)

    def write(self, x: Tensor) -> None:
        """Store x [..., T, D], none of it whole.

        NaN and infinity come back as NaN, numbers beyond the range of the scale too.
        """
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


def numbers_or_nan(x: Tensor | Packed) -> Tensor:
    """Keys or values as they are, NaN in their place where they are packed: a single number in memory."""
    return x if isinstance(x, Tensor) else torch.full((), torch.nan, dtype=x.dtype, device=x.device).expand(x.shape)


def settled(x: Tensor | Packed) -> Tensor | Packed:
    """Keys or values as they are stored or will be: what a summary of them has to be made of."""
    return x.settled() if isinstance(x, Packed) else x


def rotated(x: Tensor | Packed) -> Tensor:
    """Keys or values rotated, in float32 (float64 for float64), whichever form they are in."""
    return x.rotated() if isinstance(x, Packed) else rotate(x)


def rows_at(x: Tensor | Packed, tokens: Tensor) -> Tensor:
    """The rows [B, Hkv, N, D] of x [B, Hkv, T, D] at tokens [B, Hkv, N] int64; those of a packed cache rotated."""
    if isinstance(x, Packed):
        before, newest = x.codes.shape[2], x.newest
        if newest is None or not x.whole:
            scales = rows_at(x.scales.unsqueeze(-1), tokens).squeeze(-1)
            return Packed(rows_at(x.codes, tokens), scales, x.dtype).rotated()
        found = rotate(rows_at(newest, (tokens - before).clamp_min(0)))
        if before:
            packed = rows_at(x.stored, tokens.clamp_max(before - 1))
            found = torch.where((tokens < before).unsqueeze(-1), packed, found)
        return found
    # index_select per head moves whole rows: five times faster than gather on a CPU
    batch, heads, _, dim = x.shape
    out = x.new_empty(batch, heads, tokens.shape[-1], dim)
    for row in range(batch):
        for head in range(heads):
            torch.index_select(x[row, head], 0, tokens[row, head], out=out[row, head])
    return out


def stored_bytes(dim: int, kv_dtype: str | None, dtype: torch.dtype) -> int:
    """Bytes that a key or value of `dim` channels takes in a cache of this kind, its scale included."""
    return dim * dtype.itemsize if kv_dtype is None else dim * KV_BITS[kv_dtype] // 8 + 2
