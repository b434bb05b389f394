"""Which tokens to read: a threshold with a floor and a cap, exact. `reference.select` is the definition.

Two kernels. The first turns logits into the group's shares of attention and keeps the best of every block of 16 tokens,
in memory and in a coarse histogram of its row. As many tokens as blocks lie above a bin at least, so blocks below the
bin of the `floor`-th best, and below the threshold, hold nothing to choose. The second takes up the tokens of the other
blocks: several programs share a row, each lists the candidates of its part, and the last to finish finds the exact cut
among all of them by halving, and lists the chosen in the order of the text.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attention_decoder.kernels.checks import check_shape
from sparse_attention_decoder.kernels.triton.shapes import (
    CANDIDATES,
    HISTOGRAM,
    LOG2E,
    SELECT_TILE,
    SELECTING,
    Scratch,
    Shape,
    on_its_device,
    threshold_bits,
)
from sparse_attention_decoder.kernels.triton.shares import BLOCK, COARSE, is_middle, part_of, share_bits, weigh_kernel

NO_CAP = 2**31 - 1


@triton.jit
def coarse_cut(histogram, wanted):
    """Bits such that at least `wanted` blocks of a row have a share of as much; 0 if there are fewer."""
    bins = tl.arange(0, COARSE)
    blocks = tl.load(histogram + bins)
    from_here = tl.sum(blocks, 0) - tl.cumsum(blocks, 0) + blocks
    bin = tl.sum((from_here >= wanted).to(tl.int32), 0) - 1
    return tl.where(bin > 0, (bin + 384) << 21, 0)


@triton.jit
def list_blocks(blocks, listed, first, last, cut, T: tl.constexpr):
    """List those of the blocks first .. last - 1 that may hold a candidate, and say how many."""
    kept = 0
    for at in range(first, last, T):
        place = at + tl.arange(0, T)
        keep = tl.load(blocks + place, mask=place < last, other=-1) >= cut
        tl.store(listed + first + kept + tl.cumsum(keep.to(tl.int32), 0) - 1, place, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    return kept


@triton.jit
def keep_candidates(
    logits, base, middle, listed, found, found_bits, skipped, width, lse, begin, blocks_kept, cut,
    G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, PLAIN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """List the candidates of a part's listed blocks, in order, and say how many."""
    item, g, kept = tl.arange(0, T), tl.arange(0, GS), 0
    for at in range(0, blocks_kept * BLOCK, T):
        block = tl.load(listed + begin // BLOCK + (at + item) // BLOCK, mask=at + item < blocks_kept * BLOCK, other=-1)
        token = tl.where(block >= 0, block * BLOCK + item % BLOCK, -1)
        there = is_middle(token, skipped, width, middle, MASKED)
        x = tl.load(logits + token.to(tl.int64)[:, None] * GS + g[None, :], mask=there[:, None], other=0.0)
        # in the order of the other kernel, or the two would not agree where logits are large
        below = tl.broadcast_to(lse[None, :], (T, GS))
        if not PLAIN:
            below -= tl.load(base + (token // TILE)[:, None] * GP + g[None, :], mask=there[:, None], other=0.0)
        bits = share_bits(x, below, there, G, GS)
        keep = bits >= cut
        place = begin + kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(found + place, token, mask=keep)
        tl.store(found_bits + place, bits, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    return kept


@triton.jit
def candidates(values, at, kept, part, other, SPLITS: tl.constexpr, C: tl.constexpr):
    """Values [SPLITS, C] of the candidates at .. at + C - 1 of every part; `other` where a part has no more."""
    split, item = tl.arange(0, SPLITS), at + tl.arange(0, C)
    place = (split * part)[:, None] + item[None, :]
    return tl.load(values + place, mask=item[None, :] < kept[:, None], other=other)


@triton.jit
def count_behind(found_bits, kept, most, part, value, SPLITS: tl.constexpr, C: tl.constexpr):
    """How many candidates have at least these bits, not counting the first C of each part."""
    count = 0
    for at in range(C, most, C):
        more = candidates(found_bits, at, kept, part, -1, SPLITS, C)
        count += tl.sum(tl.sum((more >= value).to(tl.int32), 1), 0)
    return count


@triton.jit
def exact_cut(bits, found_bits, kept, most, part, wanted, low, SPLITS: tl.constexpr, C: tl.constexpr):
    """Bits that `wanted` candidates exceed, and 0; or the largest that too many have, and how many of those to take.

    bits: the candidates [SPLITS, C] that come first in each part.  low: as many as are wanted have at least these bits.
    """
    # shares are below 2, so 2^30 is above all of them
    high = tl.full((), 1 << 30, tl.int32)
    at_low, at_high = wanted + 1, 0
    while (high - low > 1) & (at_low != wanted):
        half = low + (high - low) // 2
        count = tl.sum(tl.sum((bits >= half).to(tl.int32), 1), 0)
        count += count_behind(found_bits, kept, most, part, half, SPLITS, C)
        enough = count >= wanted
        low, at_low = tl.where(enough, half, low), tl.where(enough, count, at_low)
        high, at_high = tl.where(enough, high, half), tl.where(enough, at_high, count)
    exact = at_low == wanted
    return tl.where(exact, low - 1, low), tl.where(exact, 0, wanted - at_high)


@triton.jit
def before(counts):
    """How many there are in all parts before each."""
    return tl.cumsum(counts, 0) - counts


@triton.jit
def list_chosen(found, found_bits, kept, most, tokens, first, cut, ties, part, SPLITS: tl.constexpr, C: tl.constexpr):
    """Write the tokens above the cut and the first `ties` at it, in order; returns their mass."""
    over, tied = tl.zeros((SPLITS,), tl.int32), tl.zeros((SPLITS,), tl.int32)
    for at in range(0, most, C):
        bits = candidates(found_bits, at, kept, part, -1, SPLITS, C)
        over += tl.sum((bits > cut).to(tl.int32), 1)
        tied += tl.sum((bits == cut).to(tl.int32), 1)
    rank = before(tied)
    # of the ties of a part those that are still wanted
    place = before(over + tl.maximum(tl.minimum(tied, ties - rank), 0))
    mass = 0.0
    for at in range(0, most, C):
        bits = candidates(found_bits, at, kept, part, -1, SPLITS, C)
        equal = (bits == cut).to(tl.int32)
        take = (bits > cut) | ((equal > 0) & (rank[:, None] + tl.cumsum(equal, 1) <= ties))
        taken = take.to(tl.int32)
        token = first + candidates(found, at, kept, part, 0, SPLITS, C)
        tl.store(tokens + place[:, None] + tl.cumsum(taken, 1) - 1, token, mask=take)
        mass += tl.sum(tl.sum(tl.where(take & (bits > 0), bits.to(tl.float32, bitcast=True), 0.0), 1), 0)
        rank += tl.sum(equal, 1)
        place += tl.sum(taken, 1)
    return mass


@triton.jit
def choose(
    found, found_bits, kept, reals, part_masses, tokens, counts, missing, row, first, floor, cap, limit, lowest, part,
    SPLITS: tl.constexpr, WEIGHED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The exact choice of one row from the candidates of all its parts."""
    weighed = row * WEIGHED + tl.arange(0, WEIGHED)
    real, mass = tl.sum(tl.load(reals + weighed), 0), tl.sum(tl.load(part_masses + weighed), 0)
    most = tl.max(kept, 0)
    bits = candidates(found_bits, 0, kept, part, -1, SPLITS, C)
    above = tl.sum(tl.sum((bits > limit).to(tl.int32), 1), 0)
    above += count_behind(found_bits, kept, most, part, limit + 1, SPLITS, C)
    count = tl.minimum(tl.minimum(tl.maximum(tl.minimum(floor, real), above), cap), tl.sum(kept, 0))
    cut, ties = limit, 0
    if count != above:
        cut, ties = exact_cut(bits, found_bits, kept, most, part, count, lowest, SPLITS, C)
    taken = 0.0
    if count > 0:
        taken = list_chosen(found, found_bits, kept, most, tokens, first, cut, ties, part, SPLITS, C)
    tl.store(counts + row, count)
    tl.store(missing + row, tl.maximum(mass - taken, 0.0))


@triton.jit
def select_kernel(
    logits, base, middle, bounds, lse, blocks, reals, part_masses, histogram, listed, found, found_bits, kept, turn,
    tokens, counts, missing, room, middle_row, floor, cap, limit,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, WEIGHED: tl.constexpr, C: tl.constexpr, PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """SPLITS programs choose for each row and KV head, the last to finish among what all have kept.

    lse, blocks, reals, part_masses, histogram: as WEIGHED programs a row leave them; the histogram is 0 afterwards.
    listed: [rows, room / 16], found, found_bits: [rows, room], kept: [rows, SPLITS] int32.
    turn: [rows] int32, 0 before and after.
    tokens: [rows, room], positions in the text; counts [rows] int32; missing [rows] float32.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    b = row // HEADS
    skipped, width, part, end = part_of(bounds + 4 * b, split, SPLITS, TILE)
    begin = split * part
    at = row.to(tl.int64) * room
    histogram += row * COARSE
    kept += row * SPLITS
    # a little lower, for the other kernel may add up the heads in another order
    cut = tl.maximum(tl.minimum(coarse_cut(histogram, tl.minimum(floor, cap)), limit + 1) - 64, 0)
    blocks_kept = list_blocks(
        blocks + at // BLOCK, listed + at // BLOCK, begin // BLOCK, tl.cdiv(tl.maximum(end, begin), BLOCK), cut, T
    )
    # each thread reads what others of its program wrote
    tl.debug_barrier()
    own = keep_candidates(
        logits + at * GS, base + row.to(tl.int64) * (room // TILE) * GP, middle + b.to(tl.int64) * middle_row,
        listed + at // BLOCK, found + at, found_bits + at, skipped, width, tl.load(lse + row * GS + tl.arange(0, GS)),
        begin, blocks_kept, cut, G, GP, GS, T, TILE, PLAIN, MASKED,
    )  # fmt: skip
    tl.store(kept + split, own)
    # what all threads of this program wrote has to be there before its turn is counted
    tl.debug_barrier()
    if tl.atomic_add(turn + row, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        choose(
            found + at, found_bits + at, tl.load(kept + tl.arange(0, SPLITS)), reals, part_masses, tokens + at, counts,
            missing, row, tl.load(bounds + 4 * b) - skipped, floor, cap, limit, cut, part, SPLITS, WEIGHED, C,
        )  # fmt: skip
        tl.store(histogram + tl.arange(0, COARSE), tl.zeros((COARSE,), tl.int32))
        tl.store(turn + row, 0)


@on_its_device
def launch_select(
    shape: Shape, bounds: Tensor, middle: Tensor | None, scratch: Scratch, tokens: Tensor, counts: Tensor,
    missing: Tensor, floor: int, threshold: float,
) -> None:  # fmt: skip
    """Choose from what `launch_score` left in the scratch, into tokens [rows, room], counts [rows], missing [rows]."""
    mask, mask_row = (bounds, 0) if middle is None else (middle, middle.stride(0))
    limit, splits = threshold_bits(threshold), scratch.select_splits
    sizes = shape.heads, shape.group, shape.scored_group, shape.stored_group
    weighing = scratch.weigh_splits
    weigh_kernel[(shape.rows, weighing)](
        scratch.logits, scratch.base, scratch.peaks, scratch.masses, mask, bounds, scratch.lse, scratch.blocks,
        scratch.reals, scratch.part_masses, scratch.histogram, scratch.room, mask_row, scratch.peaks.shape[1],
        *sizes, shape.score_tile, weighing, False, middle is not None,
    )  # fmt: skip
    select_kernel[(shape.rows, splits)](
        scratch.logits, scratch.base, mask, bounds, scratch.lse, scratch.blocks, scratch.reals, scratch.part_masses,
        scratch.histogram, scratch.listed, scratch.found, scratch.found_bits, scratch.kept, scratch.turn,
        tokens, counts, missing, scratch.room, mask_row, floor, NO_CAP, limit, *sizes, SELECT_TILE, shape.score_tile,
        splits, weighing, CANDIDATES // splits, False, middle is not None, num_warps=8,
    )  # fmt: skip


@on_its_device
def select(
    logits: Tensor, near_lse: Tensor, low: int, middle: Tensor | None, floor: int, threshold: float, cap: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, Hkv, M] of which the first counts [B, Hkv] are chosen, and the missing mass [B, Hkv].

    Args:
        logits: [B, Hkv, G, M] float32.  near_lse: [B, Hkv, G] float32.  middle: [B, M] bool, or None for all.
    Raises:
        ShapeError: they do not fit together.
    """
    batch, heads, group, width = logits.shape
    check_shape("near_lse", near_lse, (batch, heads, group), torch.float32)
    check_shape("logits", logits, (batch, heads, group, width), torch.float32)
    check_shape("middle", middle, (batch, width), torch.bool)
    shape = Shape(batch, heads, group, 8, 8, logits.device)
    rows, stored, device = shape.rows, shape.stored_group, logits.device
    # token by token, heads padded, base 2
    room = -(-width // shape.score_tile) * shape.score_tile
    by_token = torch.zeros(rows, room, stored, device=device)
    by_token[:, :width, :group] = LOG2E * logits.flatten(0, 1).transpose(1, 2)
    seen = logits if middle is None else logits.masked_fill(~middle[:, None, None], -math.inf)
    peaks = torch.zeros(rows, 1, stored, device=device)
    peaks[:, 0, :group] = LOG2E * torch.logaddexp(seen.logsumexp(-1), near_lse).flatten(0, 1)
    splits = shape.splits(SELECTING, 2 * SELECT_TILE, width)
    ints = partial(torch.zeros, dtype=torch.int32, device=device)
    tokens, counts = torch.zeros(rows, room, dtype=torch.int64, device=device), ints(rows)
    missing, bounds = torch.empty(rows, device=device), ints(batch, 4)
    bounds[:, 1] = width
    blocks, reals, histogram = ints(rows, room // 16), ints(rows, splits), ints(rows, HISTOGRAM)
    lse, part_masses = torch.empty(rows, stored, device=device), torch.empty(rows, splits, device=device)
    mask, limit = bounds if middle is None else middle.contiguous(), threshold_bits(threshold)
    weigh_kernel[(rows, splits)](
        by_token, peaks, peaks, torch.ones_like(peaks), mask, bounds, lse, blocks, reals, part_masses, histogram,
        room, width, 1, heads, group, stored, stored, shape.score_tile, splits, True, middle is not None,
    )  # fmt: skip
    select_kernel[(rows, splits)](
        by_token, peaks, mask, bounds, lse, blocks, reals, part_masses, histogram, ints(rows, room // 16),
        ints(rows, room), ints(rows, room), ints(rows, splits), ints(rows), tokens, counts, missing,
        room, width, floor, NO_CAP if cap is None else cap, limit, heads, group, stored, stored,
        SELECT_TILE, shape.score_tile, splits, splits, CANDIDATES // splits, True, middle is not None, num_warps=8,
    )  # fmt: skip
    chosen = tokens.view(batch, heads, room)[..., :width] + low
    return chosen, counts.view(batch, heads).long(), missing.view(batch, heads)
