"""What kernels take for granted, checked: they would read foreign memory without a word."""

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.packed import Packed
from sparse_attention_decoder.kernels.protocol import BLOCK, Coded, Statistics
from sparse_attention_decoder.selection import Regions

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_DIM, MOST_GROUP = 1024, 256
# a sketch and packed keys that passed say so, for they come back at every step
_CHECKED = "_checked"


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ShapeError unless the tensor, if there is one, has this shape and dtype."""
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
        raise ShapeError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} {shape}")


def check_keys(keys: Tensor | Packed, axes: int) -> None:
    """Raise ShapeError unless these can be keys: axes, dtype, channels; of packed ones a row in one piece, too."""
    if isinstance(keys, Packed):
        _check_stored(keys.stored)
        newest = keys.newest
        if newest is not None:
            fits = newest.shape[:-2] == keys.shape[:-2] and newest.shape[-1] == keys.shape[-1]
            if not fits or newest.dtype != keys.dtype or newest.stride(-1) != 1:
                raise ShapeError(
                    f"the newest of packed keys are {newest.dtype} {tuple(newest.shape)} of strides {newest.stride()}; "
                    f"expected {keys.dtype} {tuple(keys.shape)} but for the tokens, channels contiguous"
                )
    if keys.ndim != axes or keys.dtype not in FLOATS or not serves(keys.shape[-1]):
        raise ShapeError(
            f"keys are {keys.dtype} of shape {tuple(keys.shape)}; expected {axes} axes of float32, bfloat16 or "
            f"float16, the last a multiple of 8 up to {MOST_DIM}"
        )


def _check_stored(keys: Packed) -> None:
    if _CHECKED in vars(keys):
        return
    fits = keys.codes.dtype in (torch.int8, torch.uint8) and keys.scales.dtype == torch.float16
    if not fits or keys.scales.shape != keys.codes.shape[:-1] or keys.codes.stride(-1) != 1:
        raise ShapeError(
            f"packed keys have codes {keys.codes.dtype} {tuple(keys.codes.shape)} and scales {keys.scales.dtype} "
            f"{tuple(keys.scales.shape)}; see kernels.packed"
        )
    if keys.codes.shape[-2] > 1 and keys.scales.stride(-1) != 1:
        raise ShapeError("the scales of a head's tokens must be contiguous")
    vars(keys)[_CHECKED] = True


def serves(dim: int) -> bool:
    """Whether heads may have this many channels."""
    return dim % 8 == 0 and 0 < dim <= MOST_DIM


def check_cache(query: Tensor, keys: Tensor | Packed, values: Tensor | Packed) -> None:
    """Raise ShapeError unless queries [B, Hq, D], keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] fit."""
    check_keys(keys, 4)
    batch, _, _, dim = keys.shape
    fits = query.ndim == 3 and values.ndim == 4 and query.shape[0] == batch and query.shape[2] == dim
    if not fits or values.shape[:3] != keys.shape[:3] or not serves(values.shape[3]):
        raise ShapeError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit; "
            "expected [B, Hq, D], [B, Hkv, T, D] and [B, Hkv, T, Dv], D and Dv multiples of 8"
        )
    if isinstance(keys, Packed) and isinstance(values, Packed):
        check_keys(values, 4)
        if query.dtype not in FLOATS or keys.bits != values.bits:
            raise ShapeError(
                f"query is {query.dtype}, keys and values have {keys.bits} and {values.bits} bits; expected a float of "
                "up to 32 bits, and keys and values of as many bits"
            )
        if keys.whole != values.whole or (keys.whole and query.dtype != keys.dtype):
            raise ShapeError(
                f"{keys.whole} keys and {values.whole} values are whole, in {keys.dtype}, the query is {query.dtype}; "
                "expected as many of both, in the query's dtype"
            )
    elif isinstance(keys, Packed) or isinstance(values, Packed):
        raise ShapeError("of keys and values one is packed; expected both or none")
    elif not query.dtype == keys.dtype == values.dtype:
        raise ShapeError(
            f"query, keys and values are {query.dtype}, {keys.dtype} and {values.dtype}; expected one dtype"
        )


def check_query(query: Tensor, kv_heads: int) -> None:
    """Raise ShapeError unless queries [B, Hq, D] share this many KV heads evenly."""
    if query.ndim != 3 or query.dtype not in FLOATS:
        raise ShapeError(f"query is {query.dtype} of shape {tuple(query.shape)}; expected [B, Hq, D] of a cache dtype")
    if query.shape[1] % kv_heads:
        raise ShapeError(
            f"{query.shape[1]} query heads do not share {kv_heads} KV heads evenly; expected a multiple of {kv_heads}"
        )
    if query.shape[1] > MOST_GROUP * kv_heads:
        raise ShapeError(f"{query.shape[1] // kv_heads} query heads share a KV head; expected {MOST_GROUP} at most")


def checked_sketch(coded: Coded, batch: int, heads: int, dim: int) -> Coded:
    """The sketch, statistics contiguous; raises ShapeError unless it is of these rows, heads and channels."""
    codes, factors, mean, deviation = coded.codes, coded.factors, coded.statistics.mean, coded.statistics.deviation
    shape = (batch, heads, dim)
    if vars(coded).get(_CHECKED) == shape:
        return coded
    words = -(-dim // 16)
    if not serves(dim) or codes.ndim != 6 or factors.ndim != 3:
        raise ShapeError(f"the sketch has codes {tuple(codes.shape)} and factors {tuple(factors.shape)}; see Coded")
    blocks = codes.shape[2]
    check_shape("mean", mean, shape, torch.float32)
    check_shape("deviation", deviation, shape, torch.float32)
    check_shape("codes", codes, (batch, heads, blocks, words, BLOCK, 4), torch.uint8)
    check_shape("factors", factors, (batch, heads, factors.shape[2]), torch.float16)
    if factors.shape[2] > blocks * BLOCK:
        raise ShapeError(f"the sketch has {factors.shape[2]} factors and codes of {blocks * BLOCK} tokens")
    if codes.stride()[2:] != (64 * words, 64, 4, 1) or factors.stride(2) != 1:
        raise ShapeError("the codes of a head and its factors must be contiguous")
    if mean.is_contiguous() and deviation.is_contiguous():
        vars(coded)[_CHECKED] = shape
        return coded
    return Coded(codes, factors, Statistics(mean.contiguous(), deviation.contiguous()))


def check_regions(regions: Regions, batch: int, length: int) -> None:
    """Raise ShapeError unless the regions are of this many rows and at most this many tokens."""
    near = regions.near
    check_shape("near", near, (batch, near.shape[-1]), torch.int64)
    check_shape("near_valid", regions.near_valid, (batch, near.shape[-1]), torch.bool)
    check_shape("middle", regions.middle, (batch, max(0, regions.high - regions.low)), torch.bool)
    if not regions.low >= 0 or regions.high > length or near.shape[-1] > length:
        raise ShapeError(f"regions reach from {regions.low} to {regions.high}; the cache holds {length} tokens")
