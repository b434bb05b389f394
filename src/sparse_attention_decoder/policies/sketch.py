"""The default: score a 2-bit sketch of every key, read every token above a share of attention."""

from typing import ClassVar

from sparse_attention_decoder.cache import Sketch
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels
from sparse_attention_decoder.policies.protocol import Step
from sparse_attention_decoder.selection import Selection


class SketchPolicy:
    """Token-level selection by a rotated 2-bit sketch; near the oracle at a sixteenth of its bytes.

    Rotation as in QuIP# (arXiv:2402.04396), per-token factor as in RaBitQ (arXiv:2405.12497),
    GQA heads share one selection by the mean of their estimated probabilities.
    """

    reads_everything: ClassVar[bool] = False

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> Sketch:
        """An empty sketch; sinks are kept out of its statistics, their keys are outliers."""
        return Sketch(kernels, config.sink_tokens)

    @staticmethod
    def select(step: Step) -> Selection:
        """Score the middle's codes, choose by share of attention."""
        low, high = step.regions.low, step.regions.high
        sketch: Sketch = step.index
        sketch.catch_up(step.buffer.keys, step.rows, high)
        logits = step.kernels.score(
            step.query, sketch.codes[:, :, low:high], sketch.factors[:, :, low:high], sketch.statistics, step.scaling
        )
        chosen = step.kernels.select(
            logits, step.near_lse(), low, step.regions.middle, step.config.top_k, step.threshold
        )
        scored = sum(step.regions.middle_counts) * step.buffer.keys.shape[1]
        return Selection(chosen.tokens, chosen.counts, chosen.missing_mass, scored * sketch.bytes_per_token)
