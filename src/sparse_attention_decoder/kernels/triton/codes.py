"""Codes and the query's weights, laid out for integer tensor cores.

Codes come through shared memory as they are, 16 channels to a 32-bit word. A word needs one shift and four masks: the
two planes that sit two bits higher count four times. Where there are fewer heads than a tensor core has columns, FOLD
tokens lie side by side in a row, and a column has weights for its own token alone. docs/experiments.md, 15 and 16.
"""

import triton
import triton.language as tl

from sparse_attention_decoder.kernels.triton.rotation import rotate


@triton.jit
def planes(packed, PACKED: tl.constexpr):
    """Planes of int8 codes [T, KB]: bits 0..1 as 0..3, and bits 2..3 as 0, 4, 8, 12; then the upper two likewise."""
    if PACKED:
        # four bytes to an instruction; left to itself the compiler takes them one by one
        upper = tl.inline_asm_elementwise("shr.b32 $0, $1, 4;", "=r,r", [packed], tl.int8, True, 4)
        first = tl.inline_asm_elementwise("and.b32 $0, $1, 0x03030303;", "=r,r", [packed], tl.int8, True, 4)
        second = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0c0c0c0c;", "=r,r", [packed], tl.int8, True, 4)
        third = tl.inline_asm_elementwise("and.b32 $0, $1, 0x03030303;", "=r,r", [upper], tl.int8, True, 4)
        fourth = tl.inline_asm_elementwise("and.b32 $0, $1, 0x0c0c0c0c;", "=r,r", [upper], tl.int8, True, 4)
    else:
        first, second = (packed & 3).to(tl.int8), (packed & 12).to(tl.int8)
        third, fourth = ((packed >> 4) & 3).to(tl.int8), ((packed >> 4) & 12).to(tl.int8)
    return first, second, third, fourth


@triton.jit
def load_codes(codes, start, stop, T: tl.constexpr, W: tl.constexpr, KB: tl.constexpr, FOLD: tl.constexpr):
    """Packed codes [T / FOLD, FOLD * KB] of T tokens from `start`, a multiple of 16; blocks from `stop` on are 0.

    FOLD tokens of a block lie side by side in a row: see `token_of`.
    """
    ROWS: tl.constexpr = 16 // FOLD
    codes += start.to(tl.int64) * (4 * W)
    if 4 * W == KB:
        # whole blocks as they lie, 16 bytes to a load
        block = tl.arange(0, T // 16)
        raw = tl.load(
            codes + block[:, None] * (64 * W) + tl.arange(0, 64 * W)[None, :],
            mask=(start + block * 16 < stop)[:, None], other=0,
        )  # fmt: skip
        by_row = tl.permute(tl.reshape(raw, (T // 16, W, FOLD, ROWS, 4)), (0, 3, 2, 1, 4))
        packed = tl.reshape(by_row, (T // FOLD, FOLD * KB))
    else:
        row, column = tl.arange(0, T // FOLD), tl.arange(0, FOLD * KB)
        byte = column % KB
        of_row = (row // ROWS * (64 * W) + row % ROWS * 4)[:, None]
        place = of_row + (column // KB * (4 * ROWS) + byte // 4 * 64 + byte % 4)[None, :]
        there = (start + row // ROWS * 16 < stop)[:, None] & (byte < 4 * W)[None, :]
        packed = tl.load(codes + place, mask=there, other=0)
    return packed


@triton.jit
def token_of(T: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, FOLD: tl.constexpr):
    """Which token of a tile each score [T / FOLD, GP] is of: GS columns for each of the FOLD tokens of a row."""
    ROWS: tl.constexpr = 16 // FOLD
    row, column = tl.arange(0, T // FOLD), tl.arange(0, GP)
    return (row // ROWS * 16 + row % ROWS)[:, None] + (column // GS * ROWS)[None, :]


@triton.jit
def weigh_query(
    query,
    mean,
    deviation,
    parts,
    G: tl.constexpr,
    GP: tl.constexpr,
    GS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """The rotated query as whole weights [GP, DP], their step, their sum, and its product with the mean."""
    head, channel = tl.arange(0, GP) % GS, tl.arange(0, DP)
    inside = (head < G)[:, None] & (channel < D)[None, :]
    x = tl.load(query + head[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    x = rotate(x, parts, GP, D, DP)
    spread = tl.load(deviation + channel, mask=channel < D, other=0.0)
    centre = tl.load(mean + channel, mask=channel < D, other=0.0)
    weights = x * spread[None, :]
    step = tl.max(tl.abs(weights), 1) / 127
    whole = tl.where((step > 0)[:, None], tl.div_rn(weights, tl.where(step > 0, step, 1.0)[:, None]), 0.0)
    # adding 1.5 * 2^23 leaves no bits behind the point: rounds to the nearest, halves to the even
    whole = (whole + 12582912.0) - 12582912.0
    return whole, step, tl.sum(whole, 1), tl.sum(x * centre[None, :], 1)


@triton.jit
def plane_weights(
    whole, plane: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, KB: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Weights int8 [FOLD * KB, GP] of the channels in bits 2 * plane of the bytes of a column's own token."""
    place, column = tl.arange(0, FOLD * KB), tl.arange(0, GP)
    byte = place % KB
    channel = tl.broadcast_to(tl.minimum(plane * 4 * W + byte, D - 1)[None, :], (GP, FOLD * KB))
    real = ((byte < 4 * W) & (plane * 4 * W + byte < D))[None, :] & ((column // GS)[:, None] == (place // KB)[None, :])
    return tl.trans(tl.where(real, tl.gather(whole, channel, 1), 0.0).to(tl.int8))
