"""The definition of every kernel, in plain PyTorch. Runs on any device, in float64 too.

The sketch (shared/README names the study; TurboQuant-like rotation, RaBitQ-like rescale):
a key is rotated by a fixed orthogonal matrix, standardised per channel, and each channel kept in
two bits. Four equally spaced levels -1.5, -0.5, 0.5, 1.5 (times a step that the factor absorbs)
cover attention as well as the Lloyd-Max levels do (docs/experiments.md) and make the score linear
in the code, so it is one matrix product over small integers.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.protocol import Request, Statistics
from sparse_attention_decoder.selection import Selection

# step of the best uniform 2-bit quantiser of a unit normal: cuts at -STEP, 0, STEP
STEP = 0.9957
_LARGEST_FACTOR = 65504.0


class ReferenceKernels:
    """Plain PyTorch: slower than a fused kernel, right everywhere."""

    name = "reference"
    # measured by benchmarks/crossover.py on two cores: unpacking codes in PyTorch costs nearly what it saves
    crossover_tokens = 65536

    def refuses(self, request: Request) -> str | None:
        """Serves every floating-point dtype on every device."""
        return None if request.dtype.is_floating_point else f"dtype {request.dtype} is not floating point"

    def fit(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [Hkv, D] of one row's keys [Hkv, N, D] after rotation; N may be 0."""
        rotated = rotate(keys)
        if keys.shape[1] == 0:
            mean = rotated.new_zeros(rotated.shape[0], rotated.shape[2])
            return mean, torch.ones_like(mean)
        deviation, mean = torch.std_mean(rotated.double(), dim=1, correction=0)
        # a channel that has not varied yet still needs a scale for the keys to come
        typical = deviation.square().mean(-1, keepdim=True).sqrt()
        deviation = torch.where(typical > 0, deviation.maximum(0.01 * typical), 1.0)
        return mean.to(rotated.dtype), deviation.to(rotated.dtype)

    def encode(self, keys: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Two bits a channel and one factor a token.

        Args:
            keys: [B, Hkv, N, D], after RoPE.
            statistics: of the rotated keys, [B, Hkv, D].
        Returns:
            codes: uint8 [B, Hkv, N, ceil(D/4)]; channel c sits in byte c % ceil(D/4), bits 2*(c // ceil(D/4)).
            factors: float16 [B, Hkv, N], |z|^2 / (z . level): makes a code's product with its own key exact.
        """
        z = (rotate(keys) - statistics.mean.unsqueeze(2)) / statistics.deviation.unsqueeze(2)
        levels = (z >= -STEP).to(torch.uint8) + (z >= 0) + (z >= STEP)
        along = (z * (levels.to(z.dtype) - 1.5)).sum(-1)
        # z = 0 means the key is the mean itself, which a factor of 0 says exactly
        factors = (z.square().sum(-1) / along.clamp_min(1e-20)).clamp_max(_LARGEST_FACTOR)
        return _pack(levels), factors.to(torch.float16)

    def score(self, query: Tensor, codes: Tensor, factors: Tensor, statistics: Statistics, scaling: float) -> Tensor:
        """Estimated logits of coded keys.

        Args:
            query: [B, Hq, D], after RoPE, not scaled.
            codes, factors, statistics: as `encode` and `fit` made them.
        Returns:
            [B, Hkv, G, N], float32 (float64 for float64 queries).
        Raises:
            ShapeError: Hq is no multiple of Hkv.
        Cost: reads ceil(D/4) + 2 bytes a token and KV head, and no key.
        """
        batch, heads, tokens, _ = codes.shape
        work = _work_dtype(query)
        rotated = _grouped(query, heads).to(work) @ rotation(query.shape[-1], query.device, work)
        weights = rotated * statistics.deviation.unsqueeze(2)
        # without the mean's share the estimate has no scale across heads: KL 3.3 (algorithm study)
        mean_logit = (rotated * statistics.mean.unsqueeze(2)).sum(-1, keepdim=True)
        levels = _unpack(codes, query.shape[-1], weights.dtype)
        along = weights @ levels.transpose(-1, -2) - 1.5 * weights.sum(-1, keepdim=True)
        return scaling * (along * factors.unsqueeze(2).to(along.dtype) + mean_logit)

    def exact_logits(self, query: Tensor, keys: Tensor, tokens: Tensor, scaling: float) -> Tensor:
        """Logits [B, Hkv, G, N] against the keys at `tokens` [B, Hkv, N], in float32 or float64."""
        picked = _gather(keys, tokens).to(_work_dtype(query))
        return scaling * (_grouped(query, keys.shape[1]).to(picked.dtype) @ picked.transpose(-1, -2))

    def select(
        self, logits: Tensor, near_lse: Tensor, low: int, middle: Tensor | None, floor: int, threshold: float
    ) -> Selection:
        """A threshold with a floor, on the group's share of attention.

        Args:
            logits: [B, Hkv, G, M], estimated, of positions low..low+M-1.
            near_lse: [B, Hkv, G], log-sum-exp of the exact logits of sinks and window.
            middle: [B, M] bool, which positions may be chosen; None for all.
            floor: tokens to choose at least, where there are that many.
            threshold: a group share above this is chosen too; 0 turns it off.
        Returns:
            Selection, best tokens first, with the estimated missing mass.
        """
        if middle is not None:
            logits = logits.masked_fill(~middle[:, None, None], -math.inf)
        # one pass of exponentials serves the normaliser and the shares
        peak = torch.maximum(logits.amax(-1), near_lse).unsqueeze(-1)
        mass = (logits - peak).exp_()
        total = mass.sum(-1, keepdim=True) + (near_lse.unsqueeze(-1) - peak).exp()
        share = (mass / total).mean(2)
        candidates = share if middle is None else share.masked_fill(~middle[:, None], -1.0)
        if middle is None:
            counts = torch.full(share.shape[:2], min(floor, share.shape[2]), device=share.device)
        else:
            counts = middle.sum(-1, keepdim=True).clamp_max(floor).expand(share.shape[:2])
        if threshold > 0:
            counts = torch.maximum(counts, (candidates > threshold).sum(-1))
        best = candidates.topk(int(counts.max()), dim=-1)
        selection = Selection(best.indices + low, counts)
        read = (best.values * selection.chosen).sum(-1)
        return Selection(selection.tokens, counts, (share.sum(-1) - read).clamp_min(0))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, valid: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Exact attention over the listed tokens alone.

        Args:
            query: [B, Hq, D]; keys [B, Hkv, T, D]; values [B, Hkv, T, Dv], any strides.
            tokens: [B, Hkv, N] int64 positions; valid: [B, Hkv, N] bool, or None for all.
        Returns:
            output [B, Hq, Dv] in the query's dtype and log-sum-exp [B, Hq] in float32 (float64 for
            float64); a row and head without a valid token gives 0 and -inf.
        """
        logits = self.exact_logits(query, keys, tokens, scaling)
        if valid is not None:
            logits = logits.masked_fill(~valid.unsqueeze(2), -math.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse.unsqueeze(-1).clamp_min(torch.finfo(lse.dtype).min)).exp()
        output = weights @ _gather(values, tokens).to(weights.dtype)
        return output.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def rotate(x: Tensor) -> Tensor:
    """Rotate the last axis: random signs, a Hadamard butterfly, a cosine transform over the odd part of D.

    Returns float32 (float64 for float64). Every element is a chain of single additions in a fixed
    order, so a vector gets the same bits alone and in a batch: codes of keys appended one by one
    equal codes of keys appended together. A matrix product would not promise that.
    """
    size = x.shape[-1]
    x = x.to(_work_dtype(x)) * _signs(size, x.device)
    power = size & -size
    half = 1
    while half < power:
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    x = x * power**-0.5
    if power == size:
        return x
    blocks = x.unflatten(-1, (size // power, power))
    cosine = _cosine(size // power, x.device).to(x.dtype)
    mixed: Tensor = cosine[:, :1] * blocks[..., :1, :]
    for part in range(1, size // power):
        mixed = mixed + cosine[:, part : part + 1] * blocks[..., part : part + 1, :]
    return mixed.flatten(-2)


@lru_cache(maxsize=16)
def rotation(size: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """`rotate` as a matrix: `x @ rotation(D, ...)`, one product where the last bit does not matter."""
    return rotate(torch.eye(size, dtype=torch.float64, device=device)).to(dtype)


@lru_cache(maxsize=16)
def _signs(size: int, device: torch.device) -> Tensor:
    # drawn from a generator of our own: the same on every machine and in every process
    return (torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)) * 2 - 1).to(device)


@lru_cache(maxsize=16)
def _cosine(size: int, device: torch.device) -> Tensor:
    angles = torch.outer(torch.arange(size), torch.arange(size) + 0.5).double() * math.pi / size
    cosine = torch.cos(angles) * math.sqrt(2 / size)
    cosine[0] /= math.sqrt(2)
    return cosine.to(device)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    batch, heads, dim = query.shape
    if heads % kv_heads:
        raise ShapeError(
            f"{heads} query heads do not share {kv_heads} KV heads evenly; expected a multiple of {kv_heads}"
        )
    return query.reshape(batch, kv_heads, heads // kv_heads, dim)


def _pack(levels: Tensor) -> Tensor:
    width = -(-levels.shape[-1] // 4)
    padded = torch.nn.functional.pad(levels, (0, 4 * width - levels.shape[-1]))
    first, second, third, fourth = padded.split(width, dim=-1)
    packed: Tensor = first | (second << 2) | (third << 4) | (fourth << 6)
    return packed


def _unpack(codes: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    planes = torch.cat([codes & 3, (codes >> 2) & 3, (codes >> 4) & 3, codes >> 6], dim=-1)
    return planes[..., :size].to(dtype)


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    # index_select per head moves whole rows: five times faster than gather on a CPU
    batch, heads, _, dim = x.shape
    out = x.new_empty(batch, heads, tokens.shape[-1], dim)
    for row in range(batch):
        for head in range(heads):
            torch.index_select(x[row, head], 0, tokens[row, head], out=out[row, head])
    return out
