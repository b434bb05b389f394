"""Memory for keys and values: on Linux advised for huge pages, which scattered reads are glad of."""

import math
import mmap

import torch
from torch import Tensor

from sparse_attention_decoder.kernels import Packed

HUGE_PAGE = 2 << 20
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
