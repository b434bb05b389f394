"""The definition of every kernel, in plain PyTorch. Runs on any device, in float64 too.

The sketch (shared/README names the study; TurboQuant-like rotation, RaBitQ-like rescale):
a key is rotated by a fixed orthogonal matrix, standardised per channel, and each channel kept in
two bits. Four equally spaced levels -1.5, -0.5, 0.5, 1.5 (times a step that the factor absorbs)
cover attention as well as the Lloyd-Max levels do (docs/experiments.md) and make the score linear
in the code. The query's weights are rounded to eight bits, so a score is an integer dot product that
every backend gets right to the last bit.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.causal import OneByOne
from sparse_attention_decoder.kernels.choice import first_best, sample_tail, shares_of
from sparse_attention_decoder.kernels.packed import Packed, rotated, rows_at, settled
from sparse_attention_decoder.kernels.protocol import BLOCK, Coded, Request
from sparse_attention_decoder.kernels.rotation import rotate, unrotate, work_dtype
from sparse_attention_decoder.selection import Regions, Selection

# step of the best uniform 2-bit quantiser of a unit normal: cuts at -STEP, 0, STEP
STEP = 0.9957
_LARGEST_FACTOR = 65504.0
# packed tokens that are unpacked at a time
_PIECE = 1024


class ReferenceKernels(OneByOne):
    """Plain PyTorch: slower than a fused kernel, right everywhere."""

    name = "reference"
    # measured by benchmarks/crossover.py on two cores: unpacking codes in PyTorch costs nearly what it saves
    crossover_tokens = 65536

    def refuses(self, request: Request) -> str | None:
        """Serves every floating-point dtype on every device; four bits need an even number of channels."""
        if request.kv_dtype == "int4" and any(dim and dim % 2 for dim in (request.head_dim, request.value_dim)):
            return f"int4 puts two channels in a byte, and heads have {request.head_dim} and {request.value_dim}"
        return None if request.dtype.is_floating_point else f"dtype {request.dtype} is not floating point"

    def pack(self, x: Tensor, into: Packed) -> None:
        """Write keys or values [B, Hkv, N, D] into a packed view of N tokens; `Packed` says how."""
        into.write(x)

    def fit(self, keys: Tensor | Packed) -> tuple[Tensor, Tensor]:
        """Mean and deviation [Hkv, D] of one row's keys [Hkv, N, D] after rotation; N may be 0."""
        turned = rotated(settled(keys))
        if keys.shape[1] == 0:
            mean = turned.new_zeros(turned.shape[0], turned.shape[2])
            return mean, torch.ones_like(mean)
        deviation, mean = torch.std_mean(turned.double(), dim=1, correction=0)
        # a channel that has not varied yet still needs a scale for the keys to come
        typical = deviation.square().mean(-1, keepdim=True).sqrt()
        deviation = torch.where(typical > 0, deviation.maximum(0.01 * typical), 1.0)
        return mean.to(turned.dtype), deviation.to(turned.dtype)

    def encode(self, keys: Tensor | Packed, coded: Coded, start: int) -> None:
        """Two bits a channel and one factor a token, written into `coded`.

        Args:
            keys: [B, Hkv, N, D], after RoPE; packed ones are coded as they are stored, however they got there, and
                those that are still whole as they will be: the same token has the same code before and after.
            coded: its statistics are of the rotated keys; has room for token start + N - 1.
            start: where the first of the keys belongs.
        The factor |z|^2 / (z . level) makes a code's product with its own key exact.
        """
        mean, deviation = coded.statistics.mean.unsqueeze(2), coded.statistics.deviation.unsqueeze(2)
        z = (rotated(settled(keys)) - mean) / deviation
        levels = (z >= -STEP).to(torch.uint8) + (z >= 0) + (z >= STEP)
        along = (z * (levels.to(z.dtype) - 1.5)).sum(-1)
        # z = 0 means the key is the mean itself, which a factor of 0 says exactly
        factors = (z.square().sum(-1) / along.clamp_min(1e-20)).clamp_max(_LARGEST_FACTOR)
        _write(coded.codes, levels, start)
        coded.factors[:, :, start : start + keys.shape[2]] = factors

    def score(self, query: Tensor, coded: Coded, low: int, high: int, scaling: float) -> Tensor:
        """Estimated logits of the coded keys of tokens low .. high - 1.

        Args:
            query: [B, Hq, D], after RoPE, not scaled.
        Returns:
            [B, Hkv, G, high - low], float32 (float64 for float64 queries).
        Raises:
            ShapeError: Hq is no multiple of Hkv.
        Cost: reads 4 * ceil(D/16) + 2 bytes a token and KV head, and no key.
        """
        heads, work, statistics = coded.codes.shape[1], work_dtype(query), coded.statistics
        turned = rotate(_grouped(query, heads))
        weights = turned * statistics.deviation.unsqueeze(2)
        step = weights.abs().amax(-1, keepdim=True) / 127
        whole = torch.where(step > 0, weights / step, 0).round()
        # without the mean's share the estimate has no scale across heads: KL 3.3 (algorithm study)
        mean_logit = (turned * statistics.mean.unsqueeze(2)).sum(-1, keepdim=True)
        levels = _read(coded.codes, query.shape[-1], low, high).to(work)
        along = 2 * (whole @ levels.transpose(-1, -2)) - 3 * whole.sum(-1, keepdim=True)
        factors = coded.factors[:, :, None, low:high].to(work)
        return scaling * (along * factors * (step / 2) + mean_logit)

    def exact_logits(self, query: Tensor, keys: Tensor | Packed, tokens: Tensor, scaling: float) -> Tensor:
        """Logits [B, Hkv, G, N] against the keys at `tokens` [B, Hkv, N], in float32 or float64."""
        if isinstance(keys, Packed):
            # where all are rotated, products are what they were
            query = rotate(query)
        picked = rows_at(keys, tokens).to(work_dtype(query))
        return scaling * (_grouped(query, keys.shape[1]).to(picked.dtype) @ picked.transpose(-1, -2))

    def select(
        self,
        logits: Tensor,
        near_lse: Tensor,
        low: int,
        middle: Tensor | None,
        floor: int,
        threshold: float,
        cap: int | None = None,
    ) -> Selection:
        """A threshold with a floor and a cap, on the group's share of attention.

        Args:
            logits: [B, Hkv, G, M], estimated, of positions low..low+M-1.
            near_lse: [B, Hkv, G], log-sum-exp of the exact logits of sinks and window.
            middle: [B, M] bool, which positions may be chosen; None for all.
            floor: tokens to choose at least, where there are that many.
            threshold: a group share above this is chosen too; 0 turns it off.
            cap: tokens to choose at most, the best of them; None for no limit.
        Returns:
            Selection, in the order of the text, with the estimated missing mass. Of tokens whose
            share is equal, the first in the text are taken.
        """
        shares = shares_of(logits, near_lse, middle)
        share = shares.mean(2)
        candidates = share if middle is None else share.masked_fill(~middle[:, None], -1.0)
        if middle is None:
            counts = torch.full(share.shape[:2], min(floor, share.shape[2]), device=share.device)
        else:
            counts = middle.sum(-1, keepdim=True).clamp_max(floor).expand(share.shape[:2])
        if threshold > 0:
            counts = torch.maximum(counts, (candidates > threshold).sum(-1))
        if cap is not None:
            counts = counts.clamp_max(cap)
        best = first_best(candidates, int(counts.max()))
        chosen = torch.arange(best.shape[-1], device=best.device) < counts.unsqueeze(-1)
        read = (torch.take_along_dim(shares, best.unsqueeze(2), -1) * chosen.unsqueeze(2)).sum(-1)
        tokens = best.masked_fill(~chosen, share.shape[2]).sort(-1).values.masked_fill(~chosen, 0)
        left = (shares.sum(-1) - read).clamp_min(0)
        return Selection(tokens + low, counts, left.mean(2), head_missing=left.flatten(1))

    def attend(
        self,
        query: Tensor,
        keys: Tensor | Packed,
        values: Tensor | Packed,
        tokens: Tensor,
        valid: Tensor | None,
        scaling: float,
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
        output, lse = _average(logits, values, tokens, valid)
        return output.to(query.dtype), lse

    def attend_all(
        self, query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, valid: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention [B, Hq, Dv] of queries [B, Hq, D] over all of keys and values, KV heads not repeated.

        Args:
            valid: bool [B, T], which tokens count; None for all.
        """
        if isinstance(keys, Packed) or isinstance(values, Packed):
            return self._attend_pieces(query, keys, values, valid, scaling)
        # the two calls transformers makes for one query token, so that the bits are the same
        if valid is None and keys.shape[-1] == values.shape[-1] <= 256:
            shared = query.shape[1] != keys.shape[1]
            return scaled_dot_product_attention(
                query.unsqueeze(2), keys, values, scale=scaling, enable_gqa=shared
            ).squeeze(2)
        mask = None if valid is None else valid[:, None, None]
        return scaled_dot_product_attention(
            _grouped(query, keys.shape[1]), keys, values, attn_mask=mask, scale=scaling
        ).flatten(1, 2)

    def _attend_pieces(
        self, query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, valid: Tensor | None, scaling: float
    ) -> Tensor:
        # a piece at a time, so that there is never a float copy of the whole cache
        outputs, masses = [], []
        for start in range(0, keys.shape[2], _PIECE):
            tokens = torch.arange(start, min(start + _PIECE, keys.shape[2]), device=query.device)
            counts = None if valid is None else valid[:, None, tokens].expand(-1, keys.shape[1], -1)
            listed = tokens.expand(*keys.shape[:2], -1)
            output, lse = ReferenceKernels.attend(
                self, query.to(work_dtype(query)), keys, values, listed, counts, scaling
            )
            outputs.append(output)
            masses.append(lse)
        shares = torch.stack(masses).softmax(0).nan_to_num().unsqueeze(-1)
        return (torch.stack(outputs) * shares).sum(0).to(query.dtype)

    def step(
        self,
        query: Tensor,
        keys: Tensor | Packed,
        values: Tensor | Packed,
        coded: Coded,
        regions: Regions,
        floor: int,
        threshold: float,
        scaling: float,
        sampled: bool = False,
    ) -> tuple[Tensor, Tensor, Selection]:
        """The sparse step: score the middle, choose from it, attend to sinks, window and what was chosen.

        Args:
            query: [B, Hq, D]; keys [B, Hkv, T, D]; values [B, Hkv, T, Dv], the new token the last.
            coded: covers the middle.
            regions: of the rows; the middle is not empty.
            floor, threshold: as for `select`.
            sampled: beside those, read a sample of the tokens below the threshold, see `sample_tail`.
        Returns:
            output [B, Hq, Dv] in the query's dtype, log-sum-exp [B, Hq] (weights included), and the selection.
        """
        logits = self.score(query, coded, regions.low, regions.high, scaling)
        near = regions.near[:, None].expand(-1, keys.shape[1], -1)
        near_logits = self.exact_logits(query, keys, near, scaling)
        if regions.near_valid is not None:
            near_logits = near_logits.masked_fill(~regions.near_valid[:, None, None], -math.inf)
        near_lse = near_logits.logsumexp(-1)
        selection = self.select(logits, near_lse, regions.low, regions.middle, floor, threshold)
        if sampled and threshold > 0:
            selection = sample_tail(
                shares_of(logits, near_lse, regions.middle).mean(2), selection, regions.low, threshold
            )
        tokens, valid = regions.with_chosen(selection)
        logits = selection.weigh(self.exact_logits(query, keys, tokens, scaling))
        output, lse = _average(logits, values, tokens, valid)
        return output.to(query.dtype), lse, selection


REFERENCE = ReferenceKernels()


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    batch, heads, dim = query.shape
    if heads % kv_heads:
        raise ShapeError(
            f"{heads} query heads do not share {kv_heads} KV heads evenly; expected a multiple of {kv_heads}"
        )
    return query.reshape(batch, kv_heads, heads // kv_heads, dim)


def _write(codes: Tensor, levels: Tensor, start: int) -> None:
    width = 4 * codes.shape[3]
    padded = torch.nn.functional.pad(levels, (0, 4 * width - levels.shape[-1]))
    first, second, third, fourth = padded.split(width, dim=-1)
    packed = first | (second << 2) | (third << 4) | (fourth << 6)
    token = torch.arange(start, start + levels.shape[2], device=codes.device)
    # [B, Hkv, N/16, 16, W, 4], a view
    codes.transpose(3, 4)[:, :, token // BLOCK, token % BLOCK] = packed.unflatten(-1, (-1, 4))


def _read(codes: Tensor, size: int, low: int, high: int) -> Tensor:
    first = low // BLOCK
    blocks = codes[:, :, first : -(-high // BLOCK)].transpose(3, 4)
    packed = blocks.flatten(4).flatten(2, 3)[:, :, low - first * BLOCK : high - first * BLOCK]
    return torch.cat([packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6], dim=-1)[..., :size]


def _average(logits: Tensor, values: Tensor | Packed, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    if valid is not None:
        logits = logits.masked_fill(~valid.unsqueeze(2), -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1).clamp_min(torch.finfo(lse.dtype).min)).exp()
    output = weights @ rows_at(values, tokens).to(weights.dtype)
    if isinstance(values, Packed):
        output = unrotate(output)
    return output.flatten(1, 2), lse.flatten(1, 2)
