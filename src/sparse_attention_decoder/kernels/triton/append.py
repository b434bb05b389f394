"""Append of one token with its code, where the length is known to the device alone.

What the host does in eager steps (cache/buffer.py and cache/sketch.py: write key and value, code the key, fit the
statistics anew when the context has grown by a quarter, split the row into sinks, middle and window) in one kernel of
fixed size, so that a captured graph can repeat it. Those two are its definition.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparse_attention_decoder.kernels.protocol import Coded
from sparse_attention_decoder.kernels.triton.encode import code, rotated_keys, store_code
from sparse_attention_decoder.kernels.triton.shapes import (
    Shape,
    on_its_device,
    parts_on,
    power_of_two,
    row_major,
)


@triton.jit
def is_fit_length(tokens):
    """Whether statistics are fitted anew at this many tokens: see `cache.sketch.fit_length`."""
    step = tl.full((), 8, tl.int32)
    while step < tokens:
        step += step // 4
    return step == tokens


@triton.jit
def fit(keys, key_token, first, stop, parts, T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Mean and deviation [DP] of the rotated keys of tokens first .. stop - 1: Chan's update of moments, by tiles."""
    channel = tl.arange(0, DP)
    mean, squares = tl.zeros((DP,), tl.float32), tl.zeros((DP,), tl.float32)
    for begin in range(first, stop, T):
        at = begin + tl.arange(0, T)
        there = at < stop
        x = rotated_keys(keys, key_token, at, there, parts, T, D, DP)
        count, before = tl.minimum(stop - begin, T).to(tl.float32), (begin - first).to(tl.float32)
        own = tl.sum(x, 0) / count
        away = tl.where(there[:, None], x - own[None, :], 0.0)
        apart = own - mean
        mean += apart * (count / (before + count))
        squares += tl.sum(away * away, 0) + apart * apart * (before * count / (before + count))
    tokens = tl.maximum(stop - first, 1).to(tl.float32)
    deviation = tl.sqrt(squares / tokens)
    typical = tl.sqrt(tl.sum(tl.where(channel < D, deviation * deviation, 0.0), 0) / D)
    return mean, tl.where(typical > 0, tl.maximum(deviation, 0.01 * typical), 1.0)


@triton.jit
def code_span(
    keys, key_token, codes, factors, mean, deviation, parts, first, stop,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Code the keys of tokens first .. stop - 1."""
    for begin in range(first, stop, T):
        at = begin + tl.arange(0, T)
        x = rotated_keys(keys, key_token, at, at < stop, parts, T, D, DP)
        packed, factor = code(x, mean, deviation, T, D, DP, W, KB)
        store_code(codes, factors, at, packed, factor, at < stop, T, W, KB)


@triton.jit
def divide_row(bounds, near, start, stop, capacity, sinks, window, dense_tokens, N: tl.constexpr):
    """Write what attention reads of a row of tokens start .. stop - 1: sinks and window, middle, or everything."""
    item = tl.arange(0, N)
    token = tl.where(item < sinks, start + item, stop - window + item - sinks)
    tl.store(near + item, token, mask=(item < sinks + window) & (token >= 0) & (token < capacity))
    whole = stop - start <= dense_tokens
    tl.store(bounds, start + sinks)
    tl.store(bounds + 1, tl.where(whole, start + sinks, stop - window))
    tl.store(bounds + 2, start)
    # behind the capacity there is no place for a token: -1 tells the attention to answer NaN
    tl.store(bounds + 3, tl.where(stop > capacity, -1, tl.where(whole, stop, start)))


@triton.jit
def append_kernel(
    key, value, keys, values, codes, factors, mean, deviation, parts, length, starts, bounds, near, turn,
    new_row, new_head, new_value_row, new_value_head, key_row, key_head, key_token, value_row, value_head, value_token,
    code_row, factor_row, capacity, sinks, window, dense_tokens,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, W: tl.constexpr,
    KB: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One program a row and KV head appends one token; the last of them counts it.

    key: [B, Hkv, D], value [B, Hkv, Dv].  keys, values, codes, factors: room for `capacity` tokens.
    length: one integer, the tokens held; one more afterwards.  starts: [B] int32, each row's first real token.
    bounds: [B, 4] int32 and near [B, sinks + window] int32, for the kernels that follow.
    turn: [1] int32, 0 before and after.
    """
    row, rows = tl.program_id(0), tl.num_programs(0)
    b, head = row // HEADS, row % HEADS
    at = tl.load(length).to(tl.int32)
    start = tl.load(starts + b)
    if at < capacity:
        channel, value_channel = tl.arange(0, DP), tl.arange(0, DVP)
        keys += b.to(tl.int64) * key_row + head.to(tl.int64) * key_head
        values += b.to(tl.int64) * value_row + head.to(tl.int64) * value_head
        codes += row.to(tl.int64) * code_row
        factors += row.to(tl.int64) * factor_row
        new = tl.load(key + b.to(tl.int64) * new_row + head * new_head + channel, mask=channel < D, other=0.0)
        tl.store(keys + at.to(tl.int64) * key_token + channel, new, mask=channel < D)
        new = tl.load(
            value + b.to(tl.int64) * new_value_row + head * new_value_head + value_channel,
            mask=value_channel < DV, other=0.0,
        )  # fmt: skip
        tl.store(values + at.to(tl.int64) * value_token + value_channel, new, mask=value_channel < DV)
        # the program reads its own key back
        tl.debug_barrier()
        stop = at + 1
        if is_fit_length(stop - start):
            centre, spread = fit(keys, key_token, start + sinks, stop, parts, T, D, DP)
            tl.store(mean + row * D + channel, centre, mask=channel < D)
            tl.store(deviation + row * D + channel, spread, mask=channel < D)
            code_span(keys, key_token, codes, factors, centre, spread, parts, start, stop, T, D, DP, W, KB)
        else:
            centre = tl.load(mean + row * D + channel, mask=channel < D, other=0.0)
            spread = tl.load(deviation + row * D + channel, mask=channel < D, other=1.0)
            code_span(keys, key_token, codes, factors, centre, spread, parts, at, stop, 1, D, DP, W, KB)
    if head == 0:
        divide_row(bounds + 4 * b, near + b * (sinks + window), start, at + 1, capacity, sinks, window, dense_tokens, N)
    tl.debug_barrier()
    if tl.atomic_add(turn, 1, sem="acq_rel") == rows - 1:
        tl.store(length, tl.minimum(at + 1, capacity).to(length.dtype.element_ty))
        tl.store(turn, 0)


@on_its_device
def append(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, coded: Coded, length: Tensor, starts: Tensor,
    bounds: Tensor, near: Tensor, turn: Tensor, sinks: int, window: int, dense_tokens: int,
) -> None:  # fmt: skip
    """Append key [B, Hkv, D] and value [B, Hkv, Dv], code the key, say what attention reads: `append_kernel`."""
    batch, heads, dim = key.shape
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    codes, factors, statistics = row_major(coded)
    shape = Shape(batch, heads, 1, dim, value.shape[2], key.device)
    append_kernel[(shape.rows,)](
        key, value, keys, values, codes, factors, statistics.mean, statistics.deviation, parts_on(dim, key.device),
        length, starts, bounds, near, turn,
        *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        codes.stride(1), factors.stride(1), keys.shape[2], sinks, window, dense_tokens,
        heads, dim, power_of_two(dim), shape.value_dim, power_of_two(shape.value_dim), shape.words, shape.code_bytes,
        power_of_two(sinks + window), shape.fit_tile,
        # a fused product and sum would round once where the definition rounds twice
        enable_fp_fusion=False,
    )  # fmt: skip
