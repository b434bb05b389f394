"""SnapKV: the last queries of the prompt choose what is kept of it, once."""

from typing import ClassVar

import torch
from torch import Tensor

from sparse_attention_decoder.cache import Survivors
from sparse_attention_decoder.cache.witness import Observation
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels, Packed
from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.selection import Regions, Selection

# tokens that share the largest of their scores, as in the paper's LongBench runs: a clue keeps its neighbours
POOL = 7


class SnapKVPolicy(Policy):
    """Eviction at the end of the prompt (SnapKV, arXiv:2404.14469).

    The attention of the prompt's last 32 queries, summed over them, max-pooled over 7 tokens and averaged
    over the query heads of a KV head, ranks the middle; the best top_k stay. Nothing is thrown away
    after that, so what leaves the window later is read as well and a step reads more as it goes on.
    A further turn chooses again among what is left and what has come.
    """

    reads_everything: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    needs_witness: ClassVar[bool] = True

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> Survivors:
        """Everything is held."""
        return Survivors()

    @staticmethod
    def select(step: Step) -> Selection:
        """What is left; the first step after a prompt chooses that."""
        assert step.witness is not None
        seen, survivors, keys, config = step.witness.observation, step.index, step.buffer.keys, step.config
        survivors.catch_up(keys, step.rows, step.regions.high)
        if survivors.turn != seen.rows.length:
            regions = seen.rows.regions(config.sink_tokens, config.attention_window, keys.device)
            if regions.high > regions.low:
                survivors.keep_best(observed_scores(seen, keys, regions), regions, config.top_k)
            survivors.turn = seen.rows.length
        chosen: Selection = survivors.selection(step.regions)
        return chosen


def observed_scores(seen: Observation, keys: Tensor | Packed, regions: Regions) -> Tensor:
    """[B, Hkv, M], pooled attention that the prompt's last queries paid to positions low..low+M-1.

    Only the middle is pooled: sinks and window are kept anyway, and would lift their neighbours.
    """
    paid = seen.attention(keys)[..., regions.low : regions.high]
    order = None
    if regions.middle is not None:
        # neighbours are a row's own: padding between two turns does not part them
        paid = paid.masked_fill(~regions.middle[:, None], 0)
        order = (~regions.middle).byte().argsort(dim=-1, stable=True)[:, None].expand_as(paid)
        paid = paid.gather(-1, order)
    pooled = torch.nn.functional.max_pool1d(paid, POOL, stride=1, padding=POOL // 2)
    if order is not None:
        pooled = torch.zeros_like(pooled).scatter(-1, order, pooled)
    scores: Tensor = pooled.unflatten(1, (keys.shape[1], -1)).mean(2)
    return scores
