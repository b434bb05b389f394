"""The group's shares of attention from logits, and the best of every block. `select.py` says what for."""

import triton
import triton.language as tl

from sparse_attention_decoder.kernels.triton.shapes import HISTOGRAM

# shares are positive floats, so their bits order as integers; quarter octaves from 2^-31 on make the coarse bins
COARSE = tl.constexpr(HISTOGRAM)
# tokens of a block of codes: logits begin with the block that `low` is in
BLOCK = tl.constexpr(16)


@triton.jit
def normaliser(peaks, masses, partials, GS: tl.constexpr, P: tl.constexpr):
    """Log-sum-exp, base 2, of each head [GS], from `partials` pairs of a largest logit and a sum of exponentials."""
    g, part = tl.arange(0, GS), tl.arange(0, P)
    peak, mass = tl.full((GS,), float("-inf"), tl.float32), tl.zeros((GS,), tl.float32)
    for begin in range(0, partials, P):
        there = (begin + part < partials)[:, None]
        place = (begin + part)[:, None] * GS + g[None, :]
        x = tl.load(peaks + place, mask=there, other=float("-inf"))
        of = tl.load(masses + place, mask=there, other=0.0)
        highest = tl.maximum(peak, tl.max(x, 0))
        level = tl.where(highest == float("-inf"), 0.0, highest)
        mass = mass * tl.exp2(peak - level) + tl.sum(of * tl.exp2(x - level[None, :]), 0)
        peak = highest
    # nothing at all: shares come out as zero, not as NaN
    return tl.where(mass > 0, peak + tl.log2(tl.where(mass > 0, mass, 1.0)), 0.0)


@triton.jit
def share_bits(x, lse, there, G: tl.constexpr, GS: tl.constexpr):
    """Bits of the group's shares [T] from logits x [T, GS] and normalisers lse of that shape; -1 where not `there`."""
    real = there[:, None] & (tl.arange(0, GS) < G)[None, :]
    share = tl.sum(tl.where(real, tl.exp2(x.to(tl.float32) - lse), 0.0), 1) / G
    # NaN and infinity would have bits beyond any histogram
    share = tl.where(share == share, tl.minimum(share, 1.5), 0.0)
    return tl.where(there, share.to(tl.int32, bitcast=True), -1)


@triton.jit
def is_middle(token, skipped, width, middle, MASKED: tl.constexpr):
    """Which tokens [T], counted from the first logit, are of the middle and not masked."""
    there = (token >= skipped) & (token < width)
    if MASKED:
        there &= tl.load(middle + token - skipped, mask=there, other=0) != 0
    return there


@triton.jit
def coarse(bits):
    """The bin of a share: quarter octaves from 2^-31 up; what is less is in bin 0."""
    return tl.minimum(tl.maximum((bits >> 21) - 384, 0), COARSE - 1)


@triton.jit
def part_of(bounds, split, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Of a row's logits, which begin with the block of `low`: how many to skip, all, those of a part, and its end."""
    low, high = tl.load(bounds), tl.load(bounds + 1)
    skipped = low % BLOCK
    # a row that is read whole has an empty middle
    width = tl.where(high > low, high - low + skipped, 0)
    part = tl.cdiv(tl.cdiv(width, SPLITS), TILE) * TILE
    return skipped, width, part, tl.minimum(width, split * part + part)


@triton.jit
def weigh_kernel(
    logits, base, peaks, masses, middle, bounds, lse, blocks, reals, part_masses, histogram, room, middle_row, partials,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, PLAIN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """SPLITS programs of each row and KV head find the best share of every block and count them in the row's histogram.

    logits, base, peaks, masses, bounds: as score_kernel leaves them.
    lse: [rows, GS].  blocks: [rows, room / 16] int32.  histogram: [rows, COARSE] int32, 0 before.
    reals: [rows, SPLITS] int32, how many tokens of each part may be chosen;  part_masses: [rows, SPLITS] float32.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    b = row // HEADS
    skipped, width, part, end = part_of(bounds + 4 * b, split, SPLITS, TILE)
    # where the middle is empty nothing was scored: what lies there is not of this step
    scored = tl.where(width > 0, partials, 0)
    item, g, bins = tl.arange(0, TILE), tl.arange(0, GS), tl.arange(0, COARSE)
    # a column for each head and token of a row, GS of heads to a token
    of_heads = normaliser(peaks + row * partials * GP, masses + row * partials * GP, scored * (GP // GS), GS, 128)
    if split == 0:
        tl.store(lse + row * GS + g, of_heads)
    logits += row.to(tl.int64) * room * GS
    base += row.to(tl.int64) * (room // TILE) * GP
    blocks += row.to(tl.int64) * (room // BLOCK)
    middle += b.to(tl.int64) * middle_row
    real = tl.zeros((TILE,), tl.int32)
    mass, counted = tl.zeros((TILE,), tl.float32), tl.zeros((COARSE,), tl.int32)
    for at in range(split * part, end, TILE):
        # a whole tile as it lies: loads token by token would wait for each other
        x = tl.reshape(tl.load(logits + at * GS + tl.arange(0, TILE * GS)), (TILE, GS))
        below = of_heads
        if not PLAIN:
            below -= tl.load(base + at // TILE * GP + g)
        bits = share_bits(x, below[None, :], is_middle(at + item, skipped, width, middle, MASKED), G, GS)
        best = tl.max(tl.reshape(bits, (TILE // BLOCK, BLOCK)), 1)
        tl.store(blocks + at // BLOCK + tl.arange(0, TILE // BLOCK), best)
        real += (bits >= 0).to(tl.int32)
        mass += tl.where(bits > 0, bits.to(tl.float32, bitcast=True), 0.0)
    # each thread reads what others of its program wrote
    tl.debug_barrier()
    for at in range(split * part // BLOCK, tl.cdiv(tl.maximum(end, 0), BLOCK), TILE):
        best = tl.load(blocks + at + item, mask=at + item < tl.cdiv(end, BLOCK), other=-1)
        counted += tl.histogram(coarse(best), COARSE, mask=best >= 0)
    tl.atomic_add(histogram + row * COARSE + bins, counted, mask=counted > 0, sem="relaxed")
    tl.store(reals + row * SPLITS + split, tl.sum(real, 0))
    tl.store(part_masses + row * SPLITS + split, tl.sum(mass, 0))
