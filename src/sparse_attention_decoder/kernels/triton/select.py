"""Which tokens to read: a threshold with a floor and a cap, exact. `reference.select` is the definition.

Several programs share a row. Each turns the logits of its part into the group's shares of attention, 16 tokens a block.
The best of a block stands for it in a coarse histogram of the row: at least as many tokens as blocks lie above a bin,
so blocks below the bin of the `floor`-th best, and below the threshold, hold nothing to choose. Tokens that remain are
candidates. The last program to finish finds the exact cut among them, five bits of the share at a time, and lists the
chosen in the order of the text. How many candidates there are depends on who finishes when; what is chosen does not.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attention_decoder.kernels.checks import check_shape
from sparse_attention_decoder.kernels.triton.shapes import (
    HISTOGRAM,
    LOG2E,
    SELECT_TILE,
    SELECTING,
    Scratch,
    Shape,
    threshold_bits,
)
from sparse_attention_decoder.kernels.triton.shares import (
    BLOCK,
    COARSE,
    keep_candidates,
    list_blocks,
    lowest_of_best,
    normaliser,
    weigh_blocks,
)

NO_CAP = 2**31 - 1
# values that five bits of a share have
FINE = tl.constexpr(32)


@triton.jit
def place_of(item, facts, part, SPLITS: tl.constexpr):
    """Where the candidates numbered `item` lie: those of a part stand at its beginning, `part` places apart."""
    place, passed = item, 0
    for split in range(SPLITS):
        kept = tl.load(facts + 4 * split)
        passed += kept
        place += tl.where(item >= passed, part - kept, 0)
    return place


@triton.jit
def digit_of(bits, digit, prefix):
    """Histogram of the five bits from `digit` on, of those whose higher bits are `prefix`."""
    inside = (bits >= 0) & ((bits >> (digit + 5)) == prefix)
    return tl.histogram((tl.maximum(bits, 0) >> digit) & (FINE - 1), FINE, mask=inside)


@triton.jit
def exact_cut(bits, found_bits, facts, candidates, count, part, SPLITS: tl.constexpr, T: tl.constexpr):
    """Bits of the `count`-th best candidate, and how many of those equal to it are wanted; `bits` are the first T."""
    cut, wanted = 0, count
    for step in tl.static_range(6):
        digit = 25 - 5 * step
        histogram = digit_of(bits, digit, cut)
        for at in range(T, candidates, T):
            item = at + tl.arange(0, T)
            place = place_of(item, facts, part, SPLITS)
            histogram += digit_of(tl.load(found_bits + place, mask=item < candidates, other=-1), digit, cut)
        own, above = lowest_of_best(histogram, wanted, FINE)
        wanted -= above
        cut = (cut << 5) | own
    return cut, wanted


@triton.jit
def list_chosen(
    found, found_bits, facts, candidates, tokens, first, cut, ties, part, SPLITS: tl.constexpr, T: tl.constexpr
):
    """Write the tokens above the cut and the first `ties` at it, in order; returns their mass."""
    chosen, equal, mass = 0, 0, 0.0
    for at in range(0, candidates, T):
        item = at + tl.arange(0, T)
        there = item < candidates
        place = place_of(item, facts, part, SPLITS)
        bits = tl.load(found_bits + place, mask=there, other=-1)
        tied = bits == cut
        take = (bits > cut) | (tied & (equal + tl.cumsum(tied.to(tl.int32), 0) <= ties))
        to = chosen + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(tokens + to, first + tl.load(found + place, mask=there, other=0), mask=take)
        mass += tl.sum(tl.where(take & (bits > 0), bits.to(tl.float32, bitcast=True), 0.0), 0)
        equal += tl.sum(tied.to(tl.int32), 0)
        chosen += tl.sum(take.to(tl.int32), 0)
    return mass


@triton.jit
def choose(
    found, found_bits, facts, part_masses, tokens, counts, missing, row, first, floor, cap, limit, part,
    SPLITS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The exact choice of one row from the candidates of all its parts."""
    split = tl.arange(0, SPLITS)
    candidates, above = tl.sum(tl.load(facts + 4 * split), 0), tl.sum(tl.load(facts + 4 * split + 1), 0)
    real, mass = tl.sum(tl.load(facts + 4 * split + 2), 0), tl.sum(tl.load(part_masses + split), 0)
    count = tl.minimum(tl.maximum(tl.minimum(floor, real), above), cap)
    cut, ties = limit, 0
    if count != above:
        item = tl.arange(0, T)
        bits = tl.load(found_bits + place_of(item, facts, part, SPLITS), mask=item < candidates, other=-1)
        cut, ties = exact_cut(bits, found_bits, facts, candidates, count, part, SPLITS, T)
    taken = 0.0
    if count > 0:
        taken = list_chosen(found, found_bits, facts, candidates, tokens, first, cut, ties, part, SPLITS, T)
    tl.store(counts + row, count)
    tl.store(missing + row, tl.maximum(mass - taken, 0.0))


@triton.jit
def select_kernel(
    logits, base, peaks, masses, middle, bounds, blocks, listed, found, found_bits, facts, part_masses, histogram, turn,
    tokens, counts, missing, room, middle_row, partials, floor, cap, limit,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """SPLITS programs choose for each row and KV head, the last to finish among what all have kept.

    logits, base, peaks, masses, bounds: as score_kernel leaves them.
    limit: bits of the threshold; those of infinity are off.
    blocks, listed: [rows, room / 16], found, found_bits: [rows, room], facts: [rows, SPLITS, 4], int32, and
        part_masses: [rows, SPLITS] float32: what each program leaves.
    histogram: [rows, COARSE] int32 and turn: [rows] int32, 0 before and after.
    tokens: [rows, room], positions in the text; counts [rows] int32; missing [rows] float32.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    b = row // HEADS
    low, high = tl.load(bounds + 4 * b), tl.load(bounds + 4 * b + 1)
    start = low // BLOCK * BLOCK
    # a row that is read whole has an empty middle
    width = tl.where(high > low, high - start, 0)
    part = tl.cdiv(tl.cdiv(width, SPLITS), TILE) * TILE
    begin, end = split * part, tl.minimum(width, split * part + part)
    at = row.to(tl.int64) * room
    logits += at * GS
    base += row.to(tl.int64) * (room // TILE) * GP
    middle += b.to(tl.int64) * middle_row
    blocks, listed = blocks + at // BLOCK, listed + at // BLOCK
    facts, part_masses, histogram = facts + row * (SPLITS * 4), part_masses + row * SPLITS, histogram + row * COARSE
    floor, skipped = tl.minimum(floor, cap), low - start
    # where the middle is empty nothing was scored: what lies there is not of this step
    scored = tl.where(width > 0, partials, 0)
    lse = normaliser(peaks + row * partials * GP, masses + row * partials * GP, scored, GP, GS, 64)
    weigh_blocks(
        logits, base, middle, blocks, facts + 4 * split, part_masses + split, skipped, width, lse, begin, end, limit,
        G, GP, GS, TILE, PLAIN, MASKED,
    )  # fmt: skip
    # each thread reads what others of its program wrote
    tl.debug_barrier()
    last = tl.cdiv(tl.maximum(end, begin), BLOCK)
    cut, kept = list_blocks(blocks, listed, histogram, begin // BLOCK, last, floor, limit, T)
    tl.debug_barrier()
    keep_candidates(
        logits, base, middle, listed, found + at, found_bits + at, facts + 4 * split, skipped, width, lse,
        begin, kept, cut, G, GP, GS, T, TILE, PLAIN, MASKED,
    )  # fmt: skip
    # what all threads of this program wrote has to be there before its turn is counted
    tl.debug_barrier()
    if tl.atomic_add(turn + row, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        choose(
            found + at, found_bits + at, facts, part_masses, tokens + at, counts, missing,
            row, start, floor, cap, limit, part, SPLITS, T,
        )  # fmt: skip
        tl.store(histogram + tl.arange(0, COARSE), tl.zeros((COARSE,), tl.int32))
        tl.store(turn + row, 0)


def launch_select(
    shape: Shape, bounds: Tensor, middle: Tensor | None, scratch: Scratch, tokens: Tensor, counts: Tensor,
    missing: Tensor, floor: int, threshold: float,
) -> None:  # fmt: skip
    """Choose from what `launch_score` left in the scratch, into tokens [rows, room], counts [rows], missing [rows]."""
    select_kernel[(shape.rows, scratch.select_splits)](
        scratch.logits, scratch.base, scratch.peaks, scratch.masses, bounds if middle is None else middle, bounds,
        scratch.blocks, scratch.listed, scratch.found, scratch.found_bits, scratch.facts, scratch.part_masses,
        scratch.histogram, scratch.turn, tokens, counts, missing, scratch.room,
        0 if middle is None else middle.stride(0), scratch.peaks.shape[1],
        floor, NO_CAP, threshold_bits(threshold),
        shape.heads, shape.group, shape.scored_group, shape.stored_group, SELECT_TILE, shape.score_tile,
        scratch.select_splits, False, middle is not None, num_warps=8,
    )  # fmt: skip


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
    select_kernel[(rows, splits)](
        by_token, peaks, peaks, torch.ones_like(peaks), bounds if middle is None else middle.contiguous(), bounds,
        ints(rows, room // 16), ints(rows, room // 16), ints(rows, room), ints(rows, room), ints(rows, splits, 4),
        torch.empty(rows, splits, device=device), ints(rows, HISTOGRAM), ints(rows), tokens, counts, missing,
        room, width, 1, floor, NO_CAP if cap is None else cap, threshold_bits(threshold),
        heads, group, stored, stored, SELECT_TILE, shape.score_tile, splits, True, middle is not None, num_warps=8,
    )  # fmt: skip
    chosen = tokens.view(batch, heads, room)[..., :width] + low
    return chosen, counts.view(batch, heads).long(), missing.view(batch, heads)
