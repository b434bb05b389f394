"""The default: score a 2-bit sketch of every key, read every token above a share of attention."""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from sparse_attention_decoder.cache import Sketch
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Coded, Kernels
from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.selection import Selection


class SketchPolicy(Policy):
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
        logits = step.kernels.score(step.query, _coded(step), low, high, step.scaling)
        chosen = step.kernels.select(
            logits, step.near_lse(), low, step.regions.middle, step.config.top_k, step.threshold
        )
        return _with_cost(step, chosen)

    @classmethod
    def attend(cls, step: Step) -> tuple[Tensor, Tensor, Selection]:
        """The same and the attention, in one kernel call."""
        output, lse, chosen = step.kernels.step(
            step.query,
            step.buffer.keys,
            step.buffer.values,
            _coded(step),
            step.regions,
            step.config.top_k,
            step.threshold,
            step.scaling,
        )
        return output, lse, _with_cost(step, chosen)


def _coded(step: Step) -> Coded:
    sketch: Sketch = step.index
    sketch.catch_up(step.buffer.keys, step.rows, step.regions.high)
    return sketch.coded


def _with_cost(step: Step, chosen: Selection) -> Selection:
    scored = sum(step.regions.middle_counts) * step.buffer.shape[1]
    cost = scored * step.index.coded.bytes_per_token
    return replace(chosen, index_bytes=cost)
