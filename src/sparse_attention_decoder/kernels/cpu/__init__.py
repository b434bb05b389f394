"""Compiled kernels for CPUs: the operations of `reference`, in C++ (csrc/), near the speed of memory."""

import torch
from torch import Tensor

import sparse_attention_decoder.kernels.cpu.operations as operations
from sparse_attention_decoder.kernels.checks import MOST_DIM, MOST_GROUP, serves
from sparse_attention_decoder.kernels.cpu.library import DTYPES, isa, load
from sparse_attention_decoder.kernels.cpu.ops import NAMESPACE
from sparse_attention_decoder.kernels.packed import Packed
from sparse_attention_decoder.kernels.protocol import Coded, Request
from sparse_attention_decoder.kernels.reference import ReferenceKernels
from sparse_attention_decoder.selection import Regions, Selection

__all__ = ["NAMESPACE", "CpuKernels", "isa"]


class CpuKernels(ReferenceKernels):
    """C++ for what a decode step does, PyTorch for the rest."""

    name = "cpu"
    # benchmarks/crossover.py on two cores, in float32: 3,072 in one run, 4,096 in others
    crossover_tokens = 4096

    def refuses(self, request: Request) -> str | None:
        """Needs the compiled library, a CPU, 16- or 32-bit floats and heads of a multiple of 8 channels."""
        if request.device.type != "cpu":
            return f"device {request.device} is not a CPU"
        if request.dtype not in DTYPES:
            return f"dtype {request.dtype} is none of float32, bfloat16, float16"
        for dim in (request.head_dim, request.value_dim or request.head_dim):
            if not serves(dim):
                return f"head_dim {dim} is no multiple of 8 up to {MOST_DIM}"
        library = load()
        return library if isinstance(library, str) else None

    def pack(self, x: Tensor, into: Packed) -> None:
        """Write keys or values [B, Hkv, N, D] into a packed view of N tokens."""
        operations.pack(x, into)

    def fit(self, keys: Tensor | Packed) -> tuple[Tensor, Tensor]:
        """Mean and deviation [Hkv, D] of one row's keys [Hkv, N, D] after rotation; N may be 0."""
        return operations.fit(keys)

    def encode(self, keys: Tensor | Packed, coded: Coded, start: int) -> None:
        """Code keys [B, Hkv, N, D] into tokens start .. start + N - 1."""
        operations.encode(keys, coded, start)

    def score(self, query: Tensor, coded: Coded, low: int, high: int, scaling: float) -> Tensor:
        """Estimated logits [B, Hkv, G, high - low] of queries [B, Hq, D] against coded keys."""
        return operations.score(query, coded, low, high, scaling)

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
        """A threshold with a floor and a cap, on the group's share of attention."""
        if logits.dtype != torch.float32 or near_lse.dtype != torch.float32 or logits.shape[-1] == 0:
            return super().select(logits, near_lse, low, middle, floor, threshold, cap)
        tokens, counts, missing, of_heads = operations.select(logits, near_lse, low, middle, floor, threshold, cap)
        return Selection(tokens[..., : int(counts.max())], counts, missing, head_missing=of_heads)

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
        return operations.attend(query, keys, values, tokens, valid, scaling)

    def attend_all(
        self, query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, valid: Tensor | None, scaling: float
    ) -> Tensor:
        """Exact attention [B, Hq, Dv] over every token, `valid` [B, T] marking those that count."""
        return operations.attend_all(query, keys, values, valid, scaling)[0]

    def attend_causal(self, query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, scaling: float) -> Tensor:
        """Exact attention [B, Hq, N, Dv] of the newest N tokens; each query's bits are those of `attend_all`."""
        # which tokens of a packed cache are whole differs from query to query
        if isinstance(keys, Packed) or query.shape[1] * query.shape[2] > MOST_GROUP * keys.shape[1]:
            return super().attend_causal(query, keys, values, scaling)
        return operations.attend_causal(query, keys, values, scaling)

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
        """Score, select and attend in one call."""
        output, lse, tokens, counts, missing, log_weights, of_heads = operations.step(
            query, keys, values, coded, regions, floor, threshold, scaling, sampled=sampled
        )
        return output, lse, Selection(tokens, counts, missing, log_weights=log_weights, head_missing=of_heads)
