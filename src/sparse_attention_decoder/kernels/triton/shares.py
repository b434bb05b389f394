"""Shares of attention from logits, and the tokens that may be among those chosen. `select.py` says why they may."""

import triton
import triton.language as tl

from sparse_attention_decoder.kernels.triton.shapes import HISTOGRAM

# shares are positive floats, so their bits order as integers; half octaves from 2^-31 on make 64 coarse bins
COARSE = tl.constexpr(HISTOGRAM)
# tokens of a block of codes: logits begin with the block that `low` is in
BLOCK = tl.constexpr(16)


@triton.jit
def normaliser(peaks, masses, partials, GP: tl.constexpr, GS: tl.constexpr, P: tl.constexpr):
    """Log-sum-exp, base 2, of each head [GS], from `partials` pairs of a largest logit and a sum of exponentials."""
    g, part = tl.arange(0, GS), tl.arange(0, P)
    peak, mass = tl.full((GS,), float("-inf"), tl.float32), tl.zeros((GS,), tl.float32)
    for begin in range(0, partials, P):
        there = (begin + part < partials)[:, None] & (g < GP)[None, :]
        place = (begin + part)[:, None] * GP + g[None, :]
        x = tl.load(peaks + place, mask=there, other=float("-inf"))
        of = tl.load(masses + place, mask=there, other=0.0)
        highest = tl.maximum(peak, tl.max(x, 0))
        level = tl.where(highest == float("-inf"), 0.0, highest)
        mass = mass * tl.exp2(peak - level) + tl.sum(of * tl.exp2(x - level[None, :]), 0)
        peak = highest
    # nothing at all: shares come out as zero, not as NaN
    return tl.where(mass > 0, peak + tl.log2(tl.where(mass > 0, mass, 1.0)), 0.0)


@triton.jit
def share_bits(
    logits, base, middle, token, skipped, width, lse,
    G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, TILE: tl.constexpr, BASE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Bits of the group's shares of tokens [T], counted from the first logit; -1 where none may be chosen.

    BASE: 0, logits are whole; 1, they are below the `base` [GS] of their tile; 2, `base` points to that of every tile.
    """
    g = tl.arange(0, GS)
    there = (token >= skipped) & (token < width)
    if MASKED:
        there &= tl.load(middle + token - skipped, mask=there, other=0) != 0
    real = there[:, None] & (g < G)[None, :]
    x = tl.load(logits + token.to(tl.int64)[:, None] * GS + g[None, :], mask=real, other=float("-inf")).to(tl.float32)
    if BASE == 2:
        x += tl.load(base + (token // TILE)[:, None] * GP + g[None, :], mask=real, other=0.0)
    if BASE == 1:
        x += base[None, :]
    share = tl.sum(tl.where(real, tl.exp2(x - lse[None, :]), 0.0), 1) / G
    # NaN and infinity would have bits beyond any histogram
    share = tl.where(share == share, tl.minimum(share, 1.5), 0.0)
    return tl.where(there, share.to(tl.int32, bitcast=True), -1)


@triton.jit
def lowest_of_best(histogram, wanted, BINS: tl.constexpr):
    """The largest bin with at least `wanted` in it and above, or bin 0, and how many lie above it."""
    from_here = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
    bin = tl.maximum(tl.sum((from_here >= wanted).to(tl.int32), 0) - 1, 0)
    return bin, tl.sum(tl.where(tl.arange(0, BINS) > bin, histogram, 0), 0)


@triton.jit
def weigh_blocks(
    logits, base, middle, blocks, facts, part_mass, skipped, width, lse, begin, end, limit,
    G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, TILE: tl.constexpr, PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the best share of each block of a part, how many exceed the limit, how many there are, their mass."""
    item, g = tl.arange(0, TILE), tl.arange(0, GS)
    above, real = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.float32)
    for at in range(begin, end, TILE):
        level = tl.load(base + at // TILE * GP + g, mask=g < GP, other=0.0)
        bits = share_bits(
            logits, level, middle, at + item, skipped, width, lse, G, GP, GS, TILE, 0 if PLAIN else 1, MASKED
        )
        best = tl.max(tl.reshape(bits, (TILE // BLOCK, BLOCK)), 1)
        tl.store(blocks + at // BLOCK + tl.arange(0, TILE // BLOCK), best)
        above += (bits > limit).to(tl.int32)
        real += (bits >= 0).to(tl.int32)
        mass += tl.where(bits > 0, bits.to(tl.float32, bitcast=True), 0.0)
    tl.store(facts + 1, tl.sum(above, 0))
    tl.store(facts + 2, tl.sum(real, 0))
    tl.store(part_mass, tl.sum(mass, 0))


@triton.jit
def list_blocks(blocks, listed, histogram, first, last, floor, limit, T: tl.constexpr):
    """Count a part's blocks in the row's histogram, list those that may hold a candidate; the cut, and how many."""
    own = tl.zeros((COARSE,), tl.int32)
    for at in range(first, last, T):
        place = at + tl.arange(0, T)
        best = tl.load(blocks + place, mask=place < last, other=-1)
        own += tl.histogram(coarse(best), COARSE, mask=best >= 0)
    # blocks yet to come can only raise the cut
    bin, _ = lowest_of_best(tl.atomic_add(histogram + tl.arange(0, COARSE), own, sem="relaxed") + own, floor, COARSE)
    cut = tl.minimum(tl.where(bin > 0, (bin + 192) << 22, 0), limit + 1)
    kept = 0
    for at in range(first, last, T):
        place = at + tl.arange(0, T)
        keep = tl.load(blocks + place, mask=place < last, other=-1) >= cut
        tl.store(listed + first + kept + tl.cumsum(keep.to(tl.int32), 0) - 1, place, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    return cut, kept


@triton.jit
def coarse(bits):
    """The bin of a share: half octaves from 2^-31 up; what is less is in bin 0."""
    return tl.minimum(tl.maximum((bits >> 22) - 192, 0), COARSE - 1)


@triton.jit
def keep_candidates(
    logits, base, middle, listed, found, found_bits, facts, skipped, width, lse, begin, blocks_kept, cut,
    G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr, PLAIN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """List the candidates of a part's listed blocks, in order, and how many there are."""
    item, kept = tl.arange(0, T), 0
    for at in range(0, blocks_kept * BLOCK, T):
        block = tl.load(listed + begin // BLOCK + (at + item) // BLOCK, mask=at + item < blocks_kept * BLOCK, other=-1)
        token = tl.where(block >= 0, block * BLOCK + item % BLOCK, -1)
        bits = share_bits(logits, base, middle, token, skipped, width, lse, G, GP, GS, TILE, 0 if PLAIN else 2, MASKED)
        keep = bits >= cut
        place = begin + kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(found + place, token, mask=keep)
        tl.store(found_bits + place, bits, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    tl.store(facts, kept)
