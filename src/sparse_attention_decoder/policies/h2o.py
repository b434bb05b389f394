"""H2O: keep the tokens that have received most attention so far."""

from typing import ClassVar

from torch import Tensor

from sparse_attention_decoder.cache import Survivors
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels
from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.selection import Selection

# a score is a float32
_SCORE_BYTES = 4


class H2OPolicy(Policy):
    """Heavy hitters (H2O, arXiv:2306.14048): eviction by accumulated attention.

    A token's score is the attention it received from every query so far, the prompt's and each step's,
    mean over the query heads of a KV head. Of the tokens that have left the window the best top_k
    stay; a step that pushes one more out of it throws the lowest away for good.
    """

    reads_everything: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    needs_witness: ClassVar[bool] = True
    needs_sums: ClassVar[bool] = True

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> Survivors:
        """Everything is held."""
        return Survivors()

    @staticmethod
    def select(step: Step) -> Selection:
        """Throw away what is beyond top_k, read the rest."""
        assert step.witness is not None
        survivors, regions = step.index, step.regions
        received = step.witness.received(step.rows.length)
        survivors.catch_up(step.buffer.keys, step.rows, regions.high)
        survivors.keep_best(received[..., regions.low : regions.high], regions, step.config.top_k)
        chosen: Selection = survivors.selection(regions, _SCORE_BYTES)
        return chosen

    @classmethod
    def attend(cls, step: Step) -> tuple[Tensor, Tensor, Selection]:
        """Read what is left, and add this step's attention to its scores."""
        assert step.witness is not None
        keys = step.buffer.keys
        output, lse, selection = step.read(cls.select(step))
        tokens, valid = step.regions.with_chosen(selection)
        logits = step.kernels.exact_logits(step.query, keys, tokens, step.scaling)
        paid = (logits - lse.unflatten(1, (keys.shape[1], -1)).unsqueeze(-1)).exp().mean(2)
        step.witness.add(tokens, paid if valid is None else paid.masked_fill(~valid, 0), step.rows.length)
        return output, lse, selection
