"""What a kernel backend offers. Tensors in, tensors out: no state, no policy, no model. Keys may be packed.

Of packed keys and values the newest tokens may be whole: attention reads those as they are, but `fit` and `encode` take
every key as it is or will be stored.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_attention_decoder.kernels.packed import Packed
from sparse_attention_decoder.selection import Regions, Selection

# tokens coded side by side: their codes interleave, so that a vector register holds one word of each
BLOCK = 16


@dataclass(frozen=True)
class Request:
    """What a backend is asked to serve, so that it can refuse with a reason.

    kv_dtype: what keys are packed in; sampled: steps read a sample of what lies below the threshold.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int | None = None
    kv_dtype: str | None = None
    sampled: bool = False


@dataclass(frozen=True)
class Statistics:
    """Per-channel moments of the rotated keys of each row and KV head: mean, deviation [B, Hkv, D]."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Coded:
    """The sketch of a layer's keys, with room for tokens to come.

    codes: uint8 [B, Hkv, N/16, W, 16, 4], W = ceil(D/16): word w of token t is the four bytes [t // 16, w, t % 16].
        Channel c sits in byte c % 4W of its token (bytes counted over the words), bits 2 * (c // 4W).
    factors: float16 [B, Hkv, N].
    statistics: what the keys were coded with.
    """

    codes: Tensor
    factors: Tensor
    statistics: Statistics

    @classmethod
    def room(cls, tokens: int, statistics: Statistics) -> "Coded":
        """Room for `tokens` tokens of every row and head, rounded up to whole blocks."""
        batch, heads, dim = statistics.mean.shape
        blocks, device = -(-tokens // BLOCK), statistics.mean.device
        codes = torch.zeros(batch, heads, blocks, -(-dim // 16), BLOCK, 4, dtype=torch.uint8, device=device)
        factors = torch.zeros(batch, heads, blocks * BLOCK, dtype=torch.float16, device=device)
        return cls(codes, factors, statistics)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of code and factor that scoring a token reads, per KV head."""
        return self.codes.shape[3] * 4 + 2


class Kernels(Protocol):
    """The operations of the sparse step. `reference.ReferenceKernels` is their definition."""

    name: str
    # the context from which a sparse step was measured to be faster than a dense one
    crossover_tokens: int

    def refuses(self, request: Request) -> str | None:
        """Why this backend cannot serve the request, or None if it can."""

    def pack(self, x: Tensor, into: Packed) -> None:
        """Write keys or values [B, Hkv, N, D] into a packed view of N tokens."""

    def fit(self, keys: Tensor | Packed) -> tuple[Tensor, Tensor]:
        """Mean and deviation [Hkv, D] of one row's keys [Hkv, N, D], rotated."""

    def encode(self, keys: Tensor | Packed, coded: Coded, start: int) -> None:
        """Code keys [B, Hkv, N, D] into tokens start .. start + N - 1."""

    def score(self, query: Tensor, coded: Coded, low: int, high: int, scaling: float) -> Tensor:
        """Estimated logits [B, Hkv, G, high - low] of queries [B, Hq, D] against coded keys, scaling included."""

    def exact_logits(self, query: Tensor, keys: Tensor | Packed, tokens: Tensor, scaling: float) -> Tensor:
        """Logits [B, Hkv, G, N] of queries [B, Hq, D] against the keys at `tokens` [B, Hkv, N]."""

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
        """Choose tokens of the middle by their share of attention: a threshold with a floor and a cap."""

    def attend(
        self,
        query: Tensor,
        keys: Tensor | Packed,
        values: Tensor | Packed,
        tokens: Tensor,
        valid: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        """Exact attention [B, Hq, Dv] and its log-sum-exp [B, Hq] over the listed tokens alone."""

    def attend_all(
        self, query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, valid: Tensor | None, scaling: float
    ) -> Tensor:
        """Exact attention [B, Hq, Dv] over every token, `valid` [B, T] marking those that count: the dense baseline."""

    def attend_causal(self, query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, scaling: float) -> Tensor:
        """Exact attention [B, Hq, N, Dv] of the newest N tokens' queries, causal among themselves.

        Each gets to the last bit what `attend_all` gives it alone."""

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
        """Score, select and attend in one: output [B, Hq, Dv], log-sum-exp [B, Hq], what was chosen."""
