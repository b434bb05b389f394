"""How far sparse decoding strays from dense decoding of the same weights on the same text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.models.adapter import enable
from sparse_attention_decoder.models.cache import SparseCache

DENSE = AttentionConfig(policy="dense")


@dataclass(frozen=True)
class Agreement:
    """Sparse against dense on one text, over the tokens decoded.

    kl: mean KL divergence of the next-token distributions, dense from sparse, in nats.
    top1: share of steps where both prefer the same token.
    ce_dense, ce_change: cross-entropy of the true next token under dense, and how much sparse adds, in nats.
    """

    kl: float
    top1: float
    ce_dense: float
    ce_change: float


@dataclass(frozen=True)
class Outcome:
    """One config on a set of texts: agreement per text, and what was read for it.

    share_read: bytes of keys, values and index over the bytes dense decoding reads.
    index_share: the index's part of it.
    retrieved: tokens chosen beside sinks and window, mean per step, layer and KV head.
    missing_mass: mean estimated missing attention mass; 0 where the policy gives none.
    sparse_share: share of layer steps that chose tokens; 0 would mean dense against dense.
    """

    config: AttentionConfig
    texts: tuple[Agreement, ...]
    share_read: float
    index_share: float
    retrieved: float
    missing_mass: float
    sparse_share: float


@torch.inference_mode()
def compare(
    model: Any,
    input_ids: Tensor,
    context: int,
    configs: list[AttentionConfig],
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Outcome]:
    """Decode the same continuation densely and under every config, one token at a time.

    Args:
        model: a causal LM; it is enabled for the purpose.
        input_ids: [B, context + steps + 1] int64, one text a row, no padding.
        context: tokens read by a dense prefill; the next ones are fed one by one, and each
            feeding's prediction is compared.
        configs: what to compare with dense.
        on_step: called with (pass number from 0, step) for progress.
    Yields:
        An Outcome per config, in order.
    Raises:
        InputError: fewer tokens than the context and one step need.
    """
    steps = input_ids.shape[1] - context - 1
    if steps < 1:
        raise InputError(f"{input_ids.shape[1]} tokens leave no step after a context of {context}; give more text")
    enable(model, DENSE)
    cache = SparseCache(model.config, DENSE)
    model(input_ids[:, :context], past_key_values=cache, logits_to_keep=1)
    targets = input_ids[:, context + 1 :]
    dense = torch.stack(list(_decode(model, cache, input_ids, context, steps, 0, on_step)))
    cache.crop(-steps)
    for number, config in enumerate(configs, start=1):
        sparse = cache.reconfigured(config)
        sums = torch.zeros(4, input_ids.shape[0], dtype=torch.float64)
        for step, logp in enumerate(_decode(model, sparse, input_ids, context, steps, number, on_step)):
            sums += _disagreement(dense[step], logp, targets[:, step])
        yield _outcome(config, sparse, (sums / steps).T.tolist())
        sparse.crop(-steps)


def _decode(
    model: Any,
    cache: SparseCache,
    ids: Tensor,
    context: int,
    steps: int,
    number: int,
    on_step: Callable[[int, int], None] | None,
) -> Iterator[Tensor]:
    for step in range(steps):
        at = context + step
        logits = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
        if on_step is not None:
            on_step(number, step)
        yield logits.float().log_softmax(-1)


def _disagreement(dense: Tensor, sparse: Tensor, target: Tensor) -> Tensor:
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    same = (dense.argmax(-1) == sparse.argmax(-1)).double()
    ce_dense = -dense.gather(-1, target[:, None]).squeeze(-1)
    ce_sparse = -sparse.gather(-1, target[:, None]).squeeze(-1)
    return torch.stack([kl.double(), same, ce_dense.double(), (ce_sparse - ce_dense).double()])


def _outcome(config: AttentionConfig, cache: SparseCache, rows: list[list[float]]) -> Outcome:
    reads = cache.reads
    near = config.sink_tokens + config.attention_window
    heads = sum(layer.state.buffer.keys.shape[0] * layer.state.buffer.keys.shape[1] for layer in cache.sparse_layers)
    per_head = reads.tokens_read * len(cache.sparse_layers) / (reads.steps * heads)
    return Outcome(
        config=config,
        texts=tuple(Agreement(*row) for row in rows),
        share_read=reads.share_read,
        index_share=reads.index_bytes / reads.bytes_dense,
        retrieved=per_head - near,
        missing_mass=reads.missing_mass / max(1, reads.sparse_steps),
        sparse_share=reads.sparse_steps / reads.steps,
    )
