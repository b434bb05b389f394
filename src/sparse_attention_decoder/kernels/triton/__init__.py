"""Kernels for NVIDIA GPUs in Triton: the operations of `reference`; a decode step scores, selects and attends."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from sparse_attention_decoder.errors import BackendError, ShapeError
from sparse_attention_decoder.kernels.checks import FLOATS
from sparse_attention_decoder.kernels.packed import Packed
from sparse_attention_decoder.kernels.protocol import Coded, Request
from sparse_attention_decoder.kernels.reference import ReferenceKernels
from sparse_attention_decoder.selection import Regions, Selection

__all__ = ["TritonKernels"]

LEAST_DIM, MOST_DIM = 16, 256


class TritonKernels(ReferenceKernels):
    """Triton for what a decode step does, PyTorch for the rest; triton itself is imported when first needed."""

    name = "triton"
    # predicted, not measured (benchmarks/gpu_predicted.md): one row of 8 KV heads; larger batches win earlier
    crossover_tokens = 65536

    def refuses(self, request: Request) -> str | None:
        """Needs triton, a CUDA device of compute capability 8.0, 16- or 32-bit floats, heads of 16 to 256 channels."""
        if request.kv_dtype is not None:
            return f"keys and values in {request.kv_dtype} are read by the backends cpu and reference alone"
        if request.sampled:
            return "a sample of what lies below the threshold is read by the backends cpu and reference alone"
        if find_spec("triton") is None:
            return "triton is not installed (pip install 'sparse-attention-decoder[gpu]')"
        if request.device.type != "cuda":
            # the interpreter is there for tests, and asked for by a variable
            if request.device.type != "cpu" or not interpreted():
                return f"device {request.device} is not a CUDA GPU"
        elif torch.cuda.get_device_capability(request.device) < (8, 0):
            return "this GPU is older than compute capability 8.0"
        if request.dtype not in FLOATS:
            return f"dtype {request.dtype} is none of float32, bfloat16, float16"
        for dim in (request.head_dim, request.value_dim or request.head_dim):
            if dim % 8 or not LEAST_DIM <= dim <= MOST_DIM:
                return f"head_dim {dim} is no multiple of 8 from {LEAST_DIM} to {MOST_DIM}"
        return None

    def encode(self, keys: Tensor | Packed, coded: Coded, start: int) -> None:
        """Code keys [B, Hkv, N, D] into tokens start .. start + N - 1."""
        from sparse_attention_decoder.kernels.triton.encode import encode

        encode(_whole(keys), coded, start)

    def score(self, query: Tensor, coded: Coded, low: int, high: int, scaling: float) -> Tensor:
        """Estimated logits [B, Hkv, G, high - low] of queries [B, Hq, D] against coded keys."""
        from sparse_attention_decoder.kernels.triton.score import score

        return score(query, coded, low, high, scaling)

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
        from sparse_attention_decoder.kernels.triton.select import select

        if logits.dtype != torch.float32 or near_lse.dtype != torch.float32 or logits.shape[-1] == 0:
            return super().select(logits, near_lse, low, middle, floor, threshold, cap)
        tokens, counts, missing = select(logits, near_lse, low, middle, floor, threshold, cap)
        return Selection(tokens[..., : int(counts.max())], counts, missing)

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
        from sparse_attention_decoder.kernels.triton.attend import attend

        return attend(query, _whole(keys), _whole(values), tokens, valid, scaling)

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
        """Score, select and attend, without a word from the device to the host in between."""
        from sparse_attention_decoder.kernels.triton.step import step

        if sampled:
            raise BackendError("Triton's step reads no sample; use sample_tail=False, or backend cpu or reference")
        output, lse, tokens, counts, missing = step(
            query, _whole(keys), _whole(values), coded, regions, floor, threshold, scaling
        )
        return output, lse, Selection(tokens, counts, missing)


def _whole(x: Tensor | Packed) -> Tensor:
    if isinstance(x, Packed):
        raise ShapeError("keys or values are packed, which Triton's kernels do not read; use backend cpu or reference")
    return x


def interpreted() -> bool:
    """Whether Triton's interpreter plays the device."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
