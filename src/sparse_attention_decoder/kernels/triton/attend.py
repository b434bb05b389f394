"""Exact attention over listed tokens, or over a whole row. `reference.attend` is the definition.

Several programs share the list of a row and KV head; the last to finish puts their results together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.checks import check_cache, check_query, check_shape
from sparse_attention_decoder.kernels.triton.shapes import (
    ATTEND_TILE,
    ATTENDING,
    LOG2E,
    Shape,
    on_its_device,
    power_of_two,
)


@triton.jit
def listed_tokens(
    item, near, near_valid, tokens, near_count, count, start, whole, MARKED: tl.constexpr, NEAR: tl.constexpr
):
    """Positions of items of a row's list, and which of them count: near tokens, then chosen ones; or the whole row."""
    there = item < count
    if whole:
        token = start + item
    else:
        token = tl.zeros_like(item)
        if NEAR:
            is_near = there & (item < near_count)
            token = tl.load(near + item, mask=is_near, other=0).to(tl.int32)
            if MARKED:
                there &= ~is_near | (tl.load(near_valid + item, mask=is_near, other=0) != 0)
        token += tl.load(tokens + item - near_count, mask=there & (item >= near_count), other=0).to(tl.int32)
    return token, there


@triton.jit
def attend_share(
    query, keys, values, near, near_valid, tokens, key_token, value_token, near_count, count, start, whole, begin, end,
    scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    T: tl.constexpr, MARKED: tl.constexpr, NEAR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Unnormalised output [GP, DVP], largest logit [GP] and sum of exponentials, base 2, of items begin .. end - 1."""
    head, channel, value_channel = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, DVP)
    inside = (head < G)[:, None] & (channel < D)[None, :]
    q = tl.load(query + head[:, None] * D + channel[None, :], mask=inside, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    peak, mass = tl.full((GP,), float("-inf"), tl.float32), tl.zeros((GP,), tl.float32)
    output = tl.zeros((GP, DVP), tl.float32)
    for at in range(begin, end, T):
        token, there = listed_tokens(
            at + tl.arange(0, T), near, near_valid, tokens, near_count, count, start, whole, MARKED, NEAR
        )
        token = token.to(tl.int64)
        k = tl.load(
            keys + token[None, :] * key_token + channel[:, None],
            mask=there[None, :] & (channel < D)[:, None],
            other=0.0,
        )
        v = tl.load(
            values + token[:, None] * value_token + value_channel[None, :],
            mask=there[:, None] & (value_channel < DV)[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 1))
        level = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - level[:, None])
        decay = tl.exp2(peak - level)
        mass = mass * decay + tl.sum(weights, 1)
        # a weight in 16 bits, and what it lost in 16 more: as exact as float32 weights
        rounded = weights.to(v.dtype)
        output = tl.dot(rounded, v, acc=output * decay[:, None], input_precision="ieee")
        if v.dtype != tl.float32:
            output = tl.dot((weights - rounded.to(tl.float32)).to(v.dtype), v, acc=output)
        peak = highest
    return output, peak, mass


@triton.jit
def combine(outputs, peaks, masses, head, DVP: tl.constexpr, GS: tl.constexpr, SPLITS: tl.constexpr):
    """Output [DVP] and log-sum-exp, base 2, of one head over all shares of a row; 0 and -inf where nothing was read."""
    split, channel = tl.arange(0, SPLITS), tl.arange(0, DVP)
    # all shares at once: one after the other, each would wait for memory
    peak = tl.load(peaks + split * GS + head)
    highest = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    mass = tl.sum(weight * tl.load(masses + split * GS + head), 0)
    part = tl.load(outputs + (split * GS + head)[:, None] * DVP + channel[None, :])
    real = tl.where(mass == 0, 1.0, mass)
    output = tl.sum(weight[:, None] * part, 0) / real
    return output, tl.where(mass == 0, float("-inf"), highest + tl.log2(real))


@triton.jit
def add_to_tally(tally, whole, read, near_count, middle, missing):
    """Count a step of one row and KV head: steps, sparse ones, tokens read, cached, scored, estimated missing mass."""
    sparse = tl.where(whole, 0, 1)
    tl.store(tally, tl.load(tally) + 1)
    tl.store(tally + 1, tl.load(tally + 1) + sparse)
    tl.store(tally + 2, tl.load(tally + 2) + read)
    tl.store(tally + 3, tl.load(tally + 3) + tl.where(whole, read, near_count + middle))
    tl.store(tally + 4, tl.load(tally + 4) + sparse * middle)
    tl.store(tally + 5, tl.load(tally + 5) + sparse * missing)


@triton.jit
def attend_kernel(
    query, keys, values, near, near_valid, tokens, counts, missing, bounds, outputs, peaks, masses, turn, output, lse,
    tally, query_row, key_row, key_head, key_token, value_row, value_head, value_token, near_row, near_head, token_row,
    near_count, scale,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr, MARKED: tl.constexpr,
    NEAR: tl.constexpr, TALLIED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """SPLITS programs read the list of each row and KV head: `near`, then `counts` of `tokens`; or the whole row.

    bounds: [B, 4] int32; where start < stop, the last two, the row's tokens start .. stop - 1 are read and no list.
    outputs: [rows, SPLITS, GS, DVP], peaks, masses: [rows, SPLITS, GS], float32: each program's share.
        A row whose stop is negative had no room for its token: its output is NaN.
    turn: [rows] int32, 0 before and after.  output: [B, Hq, DV];  lse: [B, Hq] float32, natural.
    tally: [rows, 6] float64, where TALLIED: what `add_to_tally` adds to it.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    b, head = row // HEADS, row % HEADS
    start, stop = tl.load(bounds + 4 * b + 2), tl.load(bounds + 4 * b + 3)
    whole = start < stop
    count = tl.where(whole, stop - start, near_count + tl.load(counts + row))
    share = tl.cdiv(tl.cdiv(count, SPLITS), T) * T
    listed = b.to(tl.int64) * near_row + head.to(tl.int64) * near_head
    part, peak, mass = attend_share(
        query + b.to(tl.int64) * query_row + head * (G * D),
        keys + b.to(tl.int64) * key_row + head.to(tl.int64) * key_head,
        values + b.to(tl.int64) * value_row + head.to(tl.int64) * value_head,
        near + listed, near_valid + listed, tokens + row.to(tl.int64) * token_row,
        key_token, value_token, near_count, count, start, whole, split * share,
        tl.minimum(count, split * share + share), scale, G, GP, D, DP, DV, DVP, T, MARKED, NEAR, UPCAST,
    )  # fmt: skip
    g, channel = tl.arange(0, GP), tl.arange(0, DVP)
    place = row.to(tl.int64) * SPLITS
    own = outputs + (place + split) * (GS * DVP) + g[:, None] * DVP + channel[None, :]
    tl.store(own, part, mask=tl.broadcast_to((g < GS)[:, None], (GP, DVP)))
    tl.store(peaks + (place + split) * GS + g, peak, mask=g < GS)
    tl.store(masses + (place + split) * GS + g, mass, mask=g < GS)
    # what all threads of this program wrote has to be there before its turn is counted
    tl.debug_barrier()
    if tl.atomic_add(turn + row, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        for of_group in tl.static_range(G):
            final, final_lse = combine(
                outputs + place * (GS * DVP), peaks + place * GS, masses + place * GS, of_group, DVP, GS, SPLITS
            )
            if stop < 0:
                final += float("nan")
            to = row * G + of_group
            tl.store(output + to.to(tl.int64) * DV + channel, final.to(output.dtype.element_ty), mask=channel < DV)
            tl.store(lse + to, final_lse * 0.6931471805599453)
        tl.store(turn + row, 0)
        if TALLIED and stop >= 0:
            low, high = tl.load(bounds + 4 * b), tl.load(bounds + 4 * b + 1)
            add_to_tally(tally + row * 6, whole, count, near_count, high - low, tl.load(missing + row))


INTERPRETED = not isinstance(attend_kernel, triton.runtime.JITFunction)


@on_its_device
def launch_attend(
    shape: Shape, query: Tensor, keys: Tensor, values: Tensor, near: Tensor, near_valid: Tensor | None, tokens: Tensor,
    counts: Tensor, missing: Tensor, bounds: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor], scaling: float,
    tally: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to `near` [B, N] or [B, Hkv, N] and `counts` [rows] of `tokens` [rows, room]: see `attend_kernel`.

    parts: outputs, peaks, masses and turn of the scratch, the first [rows, splits, stored group, padded Dv].
    tally: [rows, 6] float64 to count the step in, with its `missing` [rows].
    Returns:
        output [B, Hq, Dv] in the query's dtype, log-sum-exp [B, Hq] float32.
    """
    batch, query_heads = query.shape[:2]
    # the interpreter cuts bfloat16 off where it should round
    written = torch.float32 if INTERPRETED else query.dtype
    output = torch.empty(batch, query_heads, shape.value_dim, dtype=written, device=query.device)
    lse = torch.empty(batch, query_heads, device=query.device)
    splits = parts[0].shape[1]
    attend_kernel[(shape.rows, splits)](
        query, keys, values, near, near if near_valid is None else near_valid, tokens, counts, missing, bounds, *parts,
        output, lse, lse if tally is None else tally, query.stride(0), *keys.stride()[:3], *values.stride()[:3],
        near.stride(0), near.stride(1) if near.ndim == 3 else 0, tokens.stride(0), near.shape[-1], scaling * LOG2E,
        shape.heads, shape.group, max(16, shape.stored_group), shape.stored_group, shape.dim, power_of_two(shape.dim),
        shape.value_dim, power_of_two(shape.value_dim), shape.attend_tile(keys.element_size()), splits,
        near_valid is not None, near.shape[-1] > 0, tally is not None, INTERPRETED,
    )  # fmt: skip
    return output.to(query.dtype), lse


def attend(
    query: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, valid: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, Hq, Dv] and its log-sum-exp [B, Hq] over the listed tokens [B, Hkv, N] alone.

    Raises:
        ShapeError: tensors that do not fit together, or tokens that are not cached.
    """
    check_cache(query, keys, values)
    check_query(query, keys.shape[1])
    check_shape("tokens", tokens, (*keys.shape[:2], tokens.shape[-1]), torch.int64)
    check_shape("valid", valid, tuple(tokens.shape), torch.bool)
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < keys.shape[2]:
        raise ShapeError(f"tokens {int(tokens.min())} to {int(tokens.max())} are not all of the {keys.shape[2]} cached")
    shape = Shape.of(query, keys.shape[1], values.shape[3])
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    splits, rows, device = shape.splits(ATTENDING, ATTEND_TILE, tokens.shape[2]), shape.rows, query.device
    parts = (
        torch.empty(rows, splits, shape.stored_group, power_of_two(shape.value_dim), device=device),
        torch.empty(rows, splits, shape.stored_group, device=device),
        torch.empty(rows, splits, shape.stored_group, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )
    none = torch.zeros(rows, 1, dtype=torch.int32, device=device)
    bounds = torch.zeros(shape.batch, 4, dtype=torch.int32, device=device)
    listed = None if valid is None else valid.contiguous()
    return launch_attend(
        shape, query.contiguous(), keys, values, tokens.contiguous(), listed, none, none, none, bounds, parts, scaling
    )
