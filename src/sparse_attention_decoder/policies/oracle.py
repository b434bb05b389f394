"""The upper bound of token selection: exact scores of every key, then the best tokens."""

from dataclasses import replace
from typing import ClassVar

import torch

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels, stored_bytes
from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.selection import Selection


class OraclePolicy(Policy):
    """Exact top-k tokens. Reads every key to choose, so it saves only values: for comparison."""

    reads_everything: ClassVar[bool] = False

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> None:
        """Needs none: it reads the keys."""
        return None

    @staticmethod
    def select(step: Step) -> Selection:
        """Score the middle's keys exactly, choose by share of attention; its missing mass is exact."""
        keys = step.buffer.keys
        low, high = step.regions.low, step.regions.high
        tokens = torch.arange(low, high, device=keys.device).expand(*keys.shape[:2], -1)
        logits = step.kernels.exact_logits(step.query, keys, tokens, step.scaling)
        chosen = step.kernels.select(
            logits, step.near_lse(), low, step.regions.middle, step.config.top_k, step.threshold
        )
        scored = sum(step.regions.middle_counts) * keys.shape[1]
        key_bytes = stored_bytes(keys.shape[-1], step.buffer.kv_dtype, keys.dtype)
        return replace(chosen, index_bytes=scored * key_bytes)
