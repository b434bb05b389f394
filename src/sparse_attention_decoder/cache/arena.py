"""Memory for keys and values: on Linux advised for huge pages, which scattered reads are glad of."""

import math
import mmap

import torch
from torch import Tensor

from sparse_attention_decoder.kernels import Kernels, Packed, plain

HUGE_PAGE = 2 << 20
# tokens packed anew at a time
_PIECE = 4096
# what is stored, and where its scales are if it is packed
SCALES = {"keys": "key_scales", "values": "value_scales"}


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; a large one on a Linux CPU in a mapping of its own, whole huge pages where they fit.

    The mapping is freed with the last tensor that views it. Measured: docs/experiments.md.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    # born under inference mode, a tensor could never be written to outside it
    with torch.inference_mode(False):
        if device.type != "cpu" or size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype, device=device)
        mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        return whole[start : start + size].view(dtype).view(shape)


def allocate(name: str, like: Tensor | Packed, tokens: int, kv_dtype: str | None) -> dict[str, Tensor]:
    """Room for `tokens` keys or values [B, Hkv, .., D] like these, by name: one tensor, or codes and scales."""
    batch, heads, _, dim = like.shape
    if kv_dtype is None:
        return {name: room((batch, heads, tokens, dim), like.dtype, like.device)}
    width, dtype = Packed.storage(dim, kv_dtype)
    return {
        name: room((batch, heads, tokens, width), dtype, like.device),
        SCALES[name]: room((batch, heads, tokens), torch.float16, like.device),
    }


def packed_view(stored: dict[str, Tensor], name: str, low: int, high: int, dtype: torch.dtype) -> Packed:
    """Tokens low .. high - 1 of what `allocate` made room for, standing for tensors of `dtype`."""
    return Packed(stored[name][:, :, low:high], stored[SCALES[name]][:, :, low:high], dtype)


def pack_pieces(kernels: Kernels, old: Tensor | Packed, into: Packed) -> None:
    """Pack keys or values [B, Hkv, T, D], packed before or not, a few at a time."""
    for start in range(0, old.shape[2], _PIECE):
        piece = slice(start, min(start + _PIECE, old.shape[2]))
        kernels.pack(plain(old[:, :, piece]), into[:, :, piece])


def grow(stored: dict[str, Tensor], capacity: int, length: int) -> None:
    """Give what is stored room for `capacity` tokens, the third axis; `length` of them are held."""
    # one tensor after the other, so that no more than one is there twice
    for name, held in stored.items():
        stored[name] = _moved(held, (*held.shape[:2], capacity, *held.shape[3:]))
        stored[name][:, :, :length] = held[:, :, :length]


def keep_rows(stored: dict[str, Tensor], rows: Tensor, length: int) -> None:
    """Let row i hold what row `rows[i]` [B'] int64 held, `length` tokens."""
    for name, held in stored.items():
        taken = held[:, :, :length].index_select(0, rows.to(held.device))
        if len(rows) != held.shape[0]:
            stored[name] = _moved(held, (len(rows), *held.shape[1:]))
        stored[name][:, :, :length] = taken


def keep_tokens(stored: dict[str, Tensor], keep: Tensor, capacity: int) -> None:
    """Hold only the tokens at `keep` [B, Hkv, N] int64, ascending; in place where the capacity stays."""
    for name, held in stored.items():
        if capacity != held.shape[2]:
            stored[name] = _moved(held, (*held.shape[:2], capacity, *held.shape[3:]))
        # head by head: what is picked is a copy, and need not be one of the whole layer
        for row, own in enumerate(keep):
            for head, tokens in enumerate(own):
                stored[name][row, head, : len(tokens)] = held[row, head].index_select(0, tokens)


def _moved(held: Tensor, shape: tuple[int, ...]) -> Tensor:
    return room(shape, held.dtype, held.device)
