"""Codes of keys, and the append of a token with its code. `reference.encode` is the definition."""

import triton
import triton.language as tl
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.checks import check_keys, checked_sketch
from sparse_attention_decoder.kernels.protocol import Coded
from sparse_attention_decoder.kernels.triton.rotation import rotate
from sparse_attention_decoder.kernels.triton.shapes import (
    ENCODE_TILE,
    Shape,
    on_its_device,
    parts_on,
    power_of_two,
    row_major,
)


@triton.jit
def code(x, mean, deviation, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, KB: tl.constexpr):
    """Packed codes [T, KB] and factors [T] of rotated keys x [T, DP]."""
    channel, byte = tl.arange(0, DP), tl.arange(0, KB)
    inside = (channel < D)[None, :]
    z = tl.div_rn(x - mean[None, :], deviation[None, :])
    z = tl.where(inside, z, 0.0)
    level = (z >= -0.9957).to(tl.int32) + (z >= 0).to(tl.int32) + (z >= 0.9957).to(tl.int32)
    along = tl.sum(tl.where(inside, z * (level.to(tl.float32) - 1.5), 0.0), 1)
    factor = tl.sum(z * z, 1) / tl.where(along < 1e-20, 1e-20, along)
    # a maximum would hide NaN
    factor = tl.where(factor > 65504.0, 65504.0, factor)
    packed = tl.zeros((T, KB), tl.int32)
    for plane in tl.static_range(4):
        own = plane * 4 * W + byte
        there = (byte < 4 * W) & (own < D)
        picked = tl.gather(level, tl.broadcast_to(tl.minimum(own, D - 1)[None, :], (T, KB)), 1)
        packed |= tl.where(there[None, :], picked, 0) << (2 * plane)
    return packed.to(tl.uint8), factor.to(tl.float16)


@triton.jit
def store_code(codes, factors, at, packed, factor, there, T: tl.constexpr, W: tl.constexpr, KB: tl.constexpr):
    """Write codes [T, KB] and factors [T] of the tokens `at` [T] where `there` [T]."""
    byte = tl.arange(0, KB)
    place = (at // 16).to(tl.int64)[:, None] * (64 * W) + (at % 16 * 4)[:, None] + (byte // 4 * 64 + byte % 4)[None, :]
    tl.store(codes + place, packed, mask=there[:, None] & (byte < 4 * W)[None, :])
    tl.store(factors + at, factor, mask=there)


@triton.jit
def rotated_keys(keys, key_token, at, there, parts, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The keys of tokens `at` [T], rotated [T, DP]; zero where not `there`."""
    channel = tl.arange(0, DP)
    inside = there[:, None] & (channel < D)[None, :]
    x = tl.load(keys + at.to(tl.int64)[:, None] * key_token + channel[None, :], mask=inside, other=0.0)
    return rotate(x.to(tl.float32), parts, T, D, DP)


@triton.jit
def encode_kernel(
    keys, codes, factors, mean, deviation, parts, key_row, key_head, key_token, code_row, factor_row, start, count,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, KB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One program codes T of the `count` keys of one row and KV head, into tokens start ... ."""
    tile, row = tl.program_id(0), tl.program_id(1)
    channel, item = tl.arange(0, DP), tile * T + tl.arange(0, T)
    there = item < count
    keys += (row // HEADS).to(tl.int64) * key_row + (row % HEADS).to(tl.int64) * key_head
    x = rotated_keys(keys, key_token, item, there, parts, T, D, DP)
    centre = tl.load(mean + row * D + channel, mask=channel < D, other=0.0)
    spread = tl.load(deviation + row * D + channel, mask=channel < D, other=1.0)
    packed, factor = code(x, centre, spread, T, D, DP, W, KB)
    codes += row.to(tl.int64) * code_row
    store_code(codes, factors + row.to(tl.int64) * factor_row, start + item, packed, factor, there, T, W, KB)


@on_its_device
def encode(keys: Tensor, coded: Coded, start: int) -> None:
    """Code keys [B, Hkv, N, D] into tokens start .. start + N - 1.

    Raises:
        ShapeError: keys and sketch do not fit together, or the sketch has no room for them.
    """
    check_keys(keys, 4)
    batch, heads, count, dim = keys.shape
    coded = checked_sketch(coded, batch, heads, dim)
    if start < 0 or start + count > coded.factors.shape[2]:
        raise ShapeError(f"tokens {start} to {start + count} do not fit a sketch of {coded.factors.shape[2]} tokens")
    if not keys.numel():
        return
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    codes, factors, statistics = row_major(coded)
    shape = Shape(batch, heads, 1, dim, dim, keys.device)
    encode_kernel[(-(-count // ENCODE_TILE), shape.rows)](
        keys, codes, factors, statistics.mean, statistics.deviation, parts_on(dim, keys.device),
        *keys.stride()[:3], codes.stride(1), factors.stride(1), start, count,
        heads, dim, power_of_two(dim), shape.words, shape.code_bytes, ENCODE_TILE,
        # a fused product and sum would round once where the definition rounds twice
        enable_fp_fusion=False,
    )  # fmt: skip
