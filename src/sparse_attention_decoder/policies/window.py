"""Sinks and window alone: what lies between is not read."""

from typing import ClassVar

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels
from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.selection import Selection


class WindowPolicy(Policy):
    """StreamingLLM's pattern (arXiv:2309.17453), with the middle kept but unread."""

    reads_everything: ClassVar[bool] = False

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> None:
        """Needs none."""
        return None

    @staticmethod
    def select(step: Step) -> Selection:
        """Nothing, whatever the budget."""
        return Selection.empty(step.query.shape[0], step.buffer.keys.shape[1], step.query.device)
