"""The baseline: read everything."""

from typing import ClassVar

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels
from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.selection import Selection


class DensePolicy(Policy):
    """Plain attention over the whole cache, on the best dense path."""

    reads_everything: ClassVar[bool] = True

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> None:
        """Needs none."""
        return None

    @staticmethod
    def select(step: Step) -> Selection:
        """Every token of the middle; the decode step goes around this to the dense kernel."""
        batch, heads = step.query.shape[0], step.buffer.keys.shape[1]
        width = step.regions.high - step.regions.low
        alike = step.query.new_zeros(batch, heads, step.query.shape[1] // heads, width)
        return step.kernels.select(alike, step.near_lse(), step.regions.low, step.regions.middle, width, 0.0)
