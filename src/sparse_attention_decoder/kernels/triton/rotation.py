"""`kernels.rotation.rotate` on the device: the same chain of additions, so codes have the same bits."""

import triton
import triton.language as tl


@triton.jit
def rotate(x, parts, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Rotate x [ROWS, DP] float32, channels from D on being zero; `parts` is what `rotation_parts(D)` gives."""
    channel = tl.arange(0, DP)
    inside = channel < D
    whole = tl.broadcast_to(channel[None, :], (ROWS, DP))
    x = x * tl.load(parts + 1 + channel, mask=inside, other=0.0)[None, :]
    POWER: tl.constexpr = D & -D
    for step in tl.static_range(10):
        if (1 << step) < POWER:
            other = tl.gather(x, whole ^ (1 << step), 1)
            x = tl.where((whole & (1 << step)) != 0, other - x, x + other)
    x = x * tl.load(parts)
    if POWER != D:
        ODD: tl.constexpr = D // POWER
        mixed = tl.zeros((ROWS, DP), tl.float32)
        for part in tl.static_range(ODD):
            cosine = tl.load(parts + 1 + D + channel // POWER * ODD + part, mask=inside, other=0.0)
            mixed += cosine[None, :] * tl.gather(x, part * POWER + whole % POWER, 1)
        x = mixed
    return x
