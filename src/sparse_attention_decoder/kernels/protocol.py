"""What a kernel backend offers. Tensors in, tensors out: no state, no policy, no model."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_attention_decoder.selection import Selection


@dataclass(frozen=True)
class Request:
    """What a backend is asked to serve, so that it can refuse with a reason."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


@dataclass(frozen=True)
class Statistics:
    """Per-channel moments of the rotated keys of each row and KV head: mean, deviation [B, Hkv, D]."""

    mean: Tensor
    deviation: Tensor


class Kernels(Protocol):
    """The operations of the sparse step. `reference.ReferenceKernels` is their definition."""

    name: str
    # the context from which a sparse step was measured to be faster than a dense one
    crossover_tokens: int

    def refuses(self, request: Request) -> str | None:
        """Why this backend cannot serve the request, or None if it can."""

    def fit(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [Hkv, D] of one row's keys [Hkv, N, D], rotated."""

    def encode(self, keys: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Code keys [B, Hkv, N, D]: codes uint8 [B, Hkv, N, ceil(D/4)] and factors float16 [B, Hkv, N]."""

    def score(self, query: Tensor, codes: Tensor, factors: Tensor, statistics: Statistics, scaling: float) -> Tensor:
        """Estimated logits [B, Hkv, G, N] of queries [B, Hq, D] against coded keys, scaling included."""

    def exact_logits(self, query: Tensor, keys: Tensor, tokens: Tensor, scaling: float) -> Tensor:
        """Logits [B, Hkv, G, N] of queries [B, Hq, D] against the keys at `tokens` [B, Hkv, N]."""

    def select(
        self, logits: Tensor, near_lse: Tensor, low: int, middle: Tensor | None, floor: int, threshold: float
    ) -> Selection:
        """Choose tokens of the middle by their share of attention: a threshold with a floor."""

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, valid: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Exact attention [B, Hq, Dv] and its log-sum-exp [B, Hq] over the listed tokens alone."""
