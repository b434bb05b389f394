"""Sparse and dense decoding of one prompt, side by side: text, speed, what was read, agreement."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.models.adapter import enable, take_off
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.reading import Progress

# tokens decoded by one side before the next has its turn: noise of the machine then falls on all alike
TURN = 8

STOCK, DENSE, SPARSE = "transformers", "dense", "sparse"


@dataclass
class Side:
    """One way of decoding the prompt.

    name: "transformers" (its own cache and attention), "dense" (everything, on our cache) or "sparse".
    ids: tokens written; text: the same as text.
    step_seconds: wall time of each decode step; the first one, which builds the index, included.
    share_read: bytes of keys, values and index read, over the bytes dense decoding reads.
    tokens_read, tokens_cached: summed over steps, layers and KV heads.
    """

    name: str
    ids: list[int] = field(default_factory=list)
    text: str = ""
    step_seconds: list[float] = field(default_factory=list)
    share_read: float = 1.0
    tokens_read: int = 0
    tokens_cached: int = 0

    @property
    def tokens_per_second(self) -> float:
        """From the median step."""
        return 1.0 / statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Comparison:
    """The three sides, after one dense prefill that all share.

    prompt_tokens, prefill_seconds: the prompt and the time to read it.
    sides: transformers, dense and sparse, decoded in turns of a few tokens.
    """

    prompt_tokens: int
    prefill_seconds: float
    sides: tuple[Side, Side, Side]

    def side(self, name: str) -> Side:
        """The side of that name."""
        return next(side for side in self.sides if side.name == name)

    @property
    def agreeing(self) -> int:
        """How many first tokens sparse and dense have in common."""
        pairs = zip(self.side(SPARSE).ids, self.side(DENSE).ids, strict=False)
        return next((at for at, (one, other) in enumerate(pairs) if one != other), self.shortest)

    @property
    def shortest(self) -> int:
        """Tokens of the shorter of sparse and dense."""
        return min(len(self.side(SPARSE).ids), len(self.side(DENSE).ids))


@torch.no_grad()
def side_by_side(
    model: SparseAttention,
    input_ids: Tensor,
    max_new_tokens: int,
    on_prefill: Progress | None = None,
    on_token: Callable[[Side], None] | None = None,
) -> Comparison:
    """Decode one prompt greedily three ways, in turns, each until its end-of-text token.

    Args:
        model: its config is the sparse side's. If its steps are compiled, those of both our sides are.
        input_ids: [1, T] int64.
        on_prefill: called with (tokens read, T) while the prompt is read.
        on_token: called with the side that has just decoded.
    Raises:
        InputError, ContextLengthError: as for `generate`.
    """
    started = time.perf_counter()
    if input_ids.shape[1] < 2:
        raise InputError(f"the prompt has {input_ids.shape[1]} token; a comparison needs a context, so at least 2")
    # the last token is left to be decoded, by each side its own way
    cache = model.prefill(input_ids[:, :-1], on_prefill)
    prefill_seconds = time.perf_counter() - started
    caches: dict[str, Any] = {
        STOCK: cache.to_stock(model.model.config),
        DENSE: copy.deepcopy(cache.reconfigured(AttentionConfig(policy="dense", kv_dtype=model.config.kv_dtype))),
        SPARSE: cache,
    }
    sides = (Side(STOCK), Side(DENSE), Side(SPARSE))
    last = {side.name: input_ids[:, -1:] for side in sides}
    running = list(sides)
    try:
        while running:
            for side in list(running):
                _switch(model, side.name)
                for _ in range(TURN):
                    begun = time.perf_counter()
                    logits = model.model(last[side.name], past_key_values=caches[side.name], use_cache=True).logits
                    last[side.name] = logits[:, -1:].argmax(-1)
                    side.step_seconds.append(time.perf_counter() - begun)
                    token = int(last[side.name])
                    side.ids.append(token)
                    if on_token is not None:
                        on_token(side)
                    if token in ends_of(model.model) or len(side.ids) == max_new_tokens:
                        running.remove(side)
                        break
    finally:
        enable(model.model, model.config)
    for side in sides:
        _close(side, caches[side.name], model)
    return Comparison(input_ids.shape[1], prefill_seconds, sides)


def _switch(model: SparseAttention, name: str) -> None:
    if name == STOCK:
        take_off(model.model)
    else:
        enable(model.model, model.config)


def ends_of(model: Any) -> set[int]:
    """The ids that end a text of this transformers model; none where it names none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {int(ends)}


def _close(side: Side, cache: Any, model: SparseAttention) -> None:
    if model.tokenizer is not None:
        side.text = str(model.tokenizer.decode(side.ids, skip_special_tokens=True))
    if isinstance(cache, SparseCache):
        reads = cache.reads
        side.share_read, side.tokens_read, side.tokens_cached = reads.share_read, reads.tokens_read, reads.tokens_cached
