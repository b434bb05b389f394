"""Estimated logits of coded keys. `reference.score` is the definition; `codes.py` says how codes meet the query."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.checks import check_query, checked_sketch
from sparse_attention_decoder.kernels.protocol import Coded
from sparse_attention_decoder.kernels.triton.codes import load_codes, plane_weights, planes, token_of, weigh_query
from sparse_attention_decoder.kernels.triton.shapes import (
    LOG2E,
    NEAR_TILE,
    SCORING,
    Scratch,
    Shape,
    on_its_device,
    parts_on,
    power_of_two,
    row_major,
)


@triton.jit
def near_mass(
    query, keys, key_token, near, near_valid, count, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    MARKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Largest exact logit [GP] and sum of exponentials, base 2, of the `count` tokens listed in `near`."""
    head, channel, item = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, N)
    inside = (head < G)[None, :] & (channel < D)[:, None]
    q = tl.load(query + head[None, :] * D + channel[:, None], mask=inside, other=0.0)
    peak, mass = tl.full((GP,), float("-inf"), tl.float32), tl.zeros((GP,), tl.float32)
    for begin in range(0, count, N):
        listed = begin + item < count
        if MARKED:
            listed &= tl.load(near_valid + begin + item, mask=listed, other=0) != 0
        token = tl.load(near + begin + item, mask=listed, other=0).to(tl.int64)
        k = tl.load(
            keys + token[:, None] * key_token + channel[None, :],
            mask=listed[:, None] & (channel < D)[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
            logits = tl.dot(k, q.to(tl.float32), input_precision="ieee") * scale
        else:
            logits = tl.dot(k, q, input_precision="ieee") * scale
        logits = tl.where(listed[:, None], logits, float("-inf"))
        highest = tl.max(logits, 0)
        # where there is nothing: no infinity minus infinity
        below = logits - tl.where(highest == float("-inf"), 0.0, highest)[None, :]
        peak, mass = add_mass(peak, mass, highest, tl.sum(tl.exp2(below), 0))
    return peak, mass


@triton.jit
def add_mass(peak, mass, highest, more):
    """Largest logit and sum of exponentials, base 2, with another pair taken in."""
    new = tl.maximum(peak, highest)
    level = tl.where(new == float("-inf"), 0.0, new)
    return new, mass * tl.exp2(peak - level) + more * tl.exp2(highest - level)


@triton.jit
def score_kernel(
    query, codes, factors, mean, deviation, parts, keys, near, near_valid, middle, bounds, logits, base, peaks, masses,
    query_row, code_row, factor_row, key_row, key_head, key_token, near_count, middle_row, room, scale,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, KB: tl.constexpr, T: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, NEARS: tl.constexpr,
    MARKED: tl.constexpr, MASKED: tl.constexpr, PLAIN: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program scores one share of the middle of one row and KV head; the last NEARS programs weigh sinks and window.

    middle: [B, high - low] bool, where MASKED: which tokens of it count.
    bounds: [B, 4] int32: the middle is low .. high - 1; start < stop: the row is read whole, so nothing is scored.
    logits: [rows, room, GS], of tokens from the block of `low` on: float16 below the largest of their tile, base 2,
        which goes to base [rows, room / T, GP]; with PLAIN float32, as they are.
    peaks, masses: [rows, SPLITS + NEARS, GP], of each program's logits: the largest, and the sum of exponentials.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    b, head = row // HEADS, row % HEADS
    low, high = tl.load(bounds + 4 * b), tl.load(bounds + 4 * b + 1)
    whole_row = tl.load(bounds + 4 * b + 2) < tl.load(bounds + 4 * b + 3)
    g = tl.arange(0, GP)
    query += b.to(tl.int64) * query_row + head * (G * D)
    place = (row.to(tl.int64) * (SPLITS + NEARS) + split) * GP + g
    if split >= SPLITS:
        if not whole_row:
            share = tl.cdiv(near_count, NEARS)
            begin = (split - SPLITS) * share
            count = tl.minimum(share, near_count - begin)
            keys += b.to(tl.int64) * key_row + head.to(tl.int64) * key_head
            listed = b.to(tl.int64) * near_count + begin
            peak, mass = near_mass(
                query, keys, key_token, near + listed, near_valid + listed, count, scale,
                G, GP, D, DP, N, MARKED, UPCAST,
            )  # fmt: skip
            # columns of other tokens of a row, which there are none of here
            tl.store(peaks + place, tl.where(g < GS, peak, float("-inf")))
            tl.store(masses + place, tl.where(g < GS, mass, 0.0))
    elif not whole_row:
        peak, mass = score_share(
            query, codes + row.to(tl.int64) * code_row, factors + row.to(tl.int64) * factor_row,
            mean + row * D, deviation + row * D, parts, middle + b.to(tl.int64) * middle_row,
            logits + row.to(tl.int64) * room * GS, base + row.to(tl.int64) * (room // T) * GP, low, high, split, scale,
            G, GP, GS, D, DP, W, KB, T, SPLITS, MASKED, PLAIN, PACKED,
        )  # fmt: skip
        tl.store(peaks + place, peak)
        tl.store(masses + place, mass)


@triton.jit
def score_share(
    query, codes, factors, mean, deviation, parts, middle, logits, base, low, high, split, scale,
    G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, KB: tl.constexpr, T: tl.constexpr, SPLITS: tl.constexpr, MASKED: tl.constexpr, PLAIN: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Score every tile of one share of one head's middle; its largest logit [GP] and sum of exponentials."""
    # where there are fewer heads than a tensor core has columns, a row is more than one token
    FOLD: tl.constexpr = GP // GS
    whole, step, total, centre = weigh_query(query, mean, deviation, parts, G, GP, GS, D, DP)
    first_weights = plane_weights(whole, 0, GP, GS, D, W, KB, FOLD)
    second_weights = plane_weights(whole, 1, GP, GS, D, W, KB, FOLD)
    third_weights = plane_weights(whole, 2, GP, GS, D, W, KB, FOLD)
    fourth_weights = plane_weights(whole, 3, GP, GS, D, W, KB, FOLD)
    g, token = tl.arange(0, GP), token_of(T, GP, GS, FOLD)
    start = low // 16 * 16
    tiles = tl.cdiv(tl.maximum(high - start, 0), T)
    if high <= low:
        tiles = 0
    own = tl.cdiv(tiles, SPLITS)
    # the definition's scaling * (along * factor * step / 2 + centre), along being half of what is summed less 3 * total
    slope, level = scale * step * 0.25, scale * centre
    offset = slope * 6 * total
    peak, mass = tl.full((GP,), float("-inf"), tl.float32), tl.zeros((GP,), tl.float32)
    for tile in range(split * own, tl.minimum(tiles, split * own + own)):
        at = start + tile * T
        packed = load_codes(codes, at, high, T, W, KB, FOLD)
        first, second, third, fourth = planes(packed, PACKED)
        ones = tl.dot(first, first_weights, out_dtype=tl.int32)
        ones = tl.dot(third, third_weights, acc=ones, out_dtype=tl.int32)
        fours = tl.dot(second, second_weights, out_dtype=tl.int32)
        fours = tl.dot(fourth, fourth_weights, acc=fours, out_dtype=tl.int32)
        sums = (ones * 4 + fours).to(tl.float32)
        inside = (at + token >= low) & (at + token < high)
        if MASKED:
            inside &= tl.load(middle + at + token - low, mask=inside, other=0) != 0
        factor = tl.load(factors + at + token, mask=inside, other=0.0).to(tl.float32)
        x = (sums * slope[None, :] - offset[None, :]) * factor + level[None, :]
        place = (tile * T + token) * GS + (g % GS)[None, :]
        if PLAIN:
            tl.store(logits + place, x, mask=inside)
        else:
            x = tl.where(inside, x, float("-inf"))
            of_heads = tl.max(tl.reshape(tl.max(x, 0), (FOLD, GS)), 0)
            highest = tl.reshape(tl.broadcast_to(of_heads[None, :], (FOLD, GS)), (GP,))
            tl.store(base + tile * GP + g, highest)
            below = x - tl.where(highest == float("-inf"), 0.0, highest)[None, :]
            tl.store(logits + place, below.to(tl.float16))
            peak, mass = add_mass(peak, mass, highest, tl.sum(tl.exp2(below), 0))
    return peak, mass


# what inline assembly and 16-bit tensor cores need is not in the interpreter
INTERPRETED = not isinstance(score_kernel, triton.runtime.JITFunction)


@on_its_device
def launch_score(
    shape: Shape, query: Tensor, coded: Coded, keys: Tensor, near: Tensor, near_valid: Tensor | None,
    middle: Tensor | None, bounds: Tensor, scratch: Scratch, scaling: float,
) -> None:  # fmt: skip
    """Score the middle of every row and weigh what is near, into the scratch: see `score_kernel`."""
    codes, factors, statistics = row_major(coded)
    score_kernel[(shape.rows, scratch.score_splits + scratch.near_splits)](
        query, codes, factors, statistics.mean, statistics.deviation, parts_on(shape.dim, shape.device), keys,
        near, near if near_valid is None else near_valid, bounds if middle is None else middle, bounds,
        scratch.logits, scratch.base, scratch.peaks, scratch.masses,
        query.stride(0), codes.stride(1), factors.stride(1), *keys.stride()[:3], near.shape[-1],
        0 if middle is None else middle.stride(0), scratch.room, scaling * LOG2E,
        shape.heads, shape.group, shape.scored_group, shape.stored_group, shape.dim, power_of_two(shape.dim),
        shape.words, shape.code_bytes, shape.score_tile, NEAR_TILE, scratch.score_splits, scratch.near_splits,
        near_valid is not None, middle is not None, False, not INTERPRETED, INTERPRETED,
    )  # fmt: skip


@on_its_device
def score(query: Tensor, coded: Coded, low: int, high: int, scaling: float) -> Tensor:
    """Estimated logits [B, Hkv, G, high - low], float32, of queries [B, Hq, D] against coded keys.

    Raises:
        ShapeError: query and sketch do not fit together, or low .. high - 1 are not all coded.
    """
    heads = coded.codes.shape[1]
    check_query(query, heads)
    shape = Shape.of(query, heads, query.shape[2])
    coded = checked_sketch(coded, shape.batch, heads, shape.dim)
    if not 0 <= low <= high <= coded.factors.shape[2]:
        raise ShapeError(f"tokens {low} to {high} are not all within a sketch of {coded.factors.shape[2]} tokens")
    query = query.contiguous()
    codes, factors, statistics = row_major(coded)
    room = -(-(high - low + 16) // shape.score_tile) * shape.score_tile
    splits = shape.programs(SCORING, shape.score_tile, room)
    logits = torch.empty(shape.rows, room, shape.stored_group, device=query.device)
    bounds = torch.tensor([low, high, 0, 0], dtype=torch.int32, device=query.device).repeat(shape.batch, 1)
    unused = torch.empty(shape.rows, splits, shape.scored_group, device=query.device)
    score_kernel[(shape.rows, splits)](
        query, codes, factors, statistics.mean, statistics.deviation, parts_on(shape.dim, shape.device), query,
        bounds, bounds, bounds, bounds, logits, unused, unused, unused,
        query.stride(0), codes.stride(1), factors.stride(1), 0, 0, 0, 0, 0, room, scaling,
        heads, shape.group, shape.scored_group, shape.stored_group, shape.dim, power_of_two(shape.dim),
        shape.words, shape.code_bytes, shape.score_tile, NEAR_TILE, splits, 0,
        False, False, True, not INTERPRETED, INTERPRETED,
    )  # fmt: skip
    skipped = low % 16
    of = logits[:, skipped : skipped + high - low, : shape.group].transpose(1, 2)
    return of.reshape(shape.batch, heads, shape.group, high - low).contiguous()
