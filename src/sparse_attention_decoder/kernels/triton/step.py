"""The sparse step of a layer: score, select, attend."""

from functools import lru_cache

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.checks import check_cache, check_query, check_regions, checked_sketch
from sparse_attention_decoder.kernels.protocol import Coded
from sparse_attention_decoder.kernels.triton.attend import launch_attend
from sparse_attention_decoder.kernels.triton.score import launch_score
from sparse_attention_decoder.kernels.triton.select import launch_select
from sparse_attention_decoder.kernels.triton.shapes import Scratch, Shape
from sparse_attention_decoder.selection import Regions


def step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    coded: Coded,
    regions: Regions,
    floor: int,
    threshold: float,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, Hq, Dv], log-sum-exp [B, Hq], tokens [B, Hkv, M], counts [B, Hkv] and missing mass [B, Hkv].

    Nothing waits for the device: tokens are as many as there may be, those from counts on are 0.

    Raises:
        ShapeError: tensors that do not fit together.
    """
    check_cache(query, keys, values)
    batch, heads, length, dim = keys.shape
    check_query(query, heads)
    check_regions(regions, batch, length)
    coded = checked_sketch(coded, batch, heads, dim)
    if regions.high > coded.factors.shape[2]:
        raise ShapeError(f"the middle ends at {regions.high}; the sketch holds {coded.factors.shape[2]} tokens")
    query = query.contiguous()
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    shape = Shape.of(query, heads, values.shape[3])
    near, near_valid, middle = (
        None if x is None else x.contiguous() for x in (regions.near, regions.near_valid, regions.middle)
    )
    assert near is not None
    scratch = Scratch(shape, max(0, regions.high - regions.low), near.shape[1])
    bounds = _bounds(batch, regions.low, regions.high, query.device)
    tokens = torch.zeros(shape.rows, scratch.room, dtype=torch.int64, device=query.device)
    counts = torch.empty(shape.rows, dtype=torch.int32, device=query.device)
    missing = torch.empty(shape.rows, device=query.device)
    launch_score(shape, query, coded, keys, near, near_valid, middle, bounds, scratch, scaling)
    launch_select(shape, bounds, middle, scratch, tokens, counts, missing, floor, threshold)
    output, lse = launch_attend(
        shape, query, keys, values, near, near_valid, tokens, counts, missing, bounds, scratch.attended, scaling
    )
    width = max(0, regions.high - regions.low)
    chosen = tokens.view(batch, heads, -1)[..., :width]
    return output, lse, chosen, counts.view(batch, heads).long(), missing.view(batch, heads)


# every layer of a step asks the same question
@lru_cache(maxsize=4)
def _bounds(batch: int, low: int, high: int, device: torch.device) -> Tensor:
    return torch.tensor([low, high, 0, 0], dtype=torch.int32, device=device).repeat(batch, 1)
