"""Memory for keys and values: on Linux advised for huge pages, which scattered reads are glad of."""

import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


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
