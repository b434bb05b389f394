"""Reading a prompt into a cache: densely, a chunk at a time, so that memory stays bounded."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.static import StaticSparseCache

# tokens of a prompt read at once where memory is bounded
PREFILL_CHUNK = 1024
CAPACITY_STEP = 4096
# an answer of the usual length
DEFAULT_NEW_TOKENS = 256

# told (tokens read, tokens to read) after each chunk
Progress = Callable[[int, int], None]


@torch.no_grad()
def read_into(
    model: PreTrainedModel, ids: Tensor, cache: SparseCache | StaticSparseCache, on_progress: Progress | None = None
) -> None:
    """Read ids [B, T] behind what a cache holds."""
    total, done = ids.shape[1], 0
    if isinstance(cache, SparseCache) and cache.get_seq_length() == 0:
        cache.reserve(total + DEFAULT_NEW_TOKENS)
    while done < total:
        # a last chunk of one token would be a decode step, and read sparsely: it joins the one before
        size = total - done if total - done == PREFILL_CHUNK + 1 else PREFILL_CHUNK
        chunk = ids[:, done : done + size]
        # the backbone alone: logits of a prompt are large and nobody reads them
        model.base_model(chunk.to(model.device), past_key_values=cache, use_cache=True)
        done += chunk.shape[1]
        if on_progress is not None:
            on_progress(done, total)


def read_into_static(
    model: PreTrainedModel,
    config: AttentionConfig,
    ids: Tensor,
    mask: Tensor | None,
    new_tokens: int,
    on_progress: Progress | None = None,
) -> StaticSparseCache:
    """A static cache with room for ids [B, T] and more; all but the last two of them are read, if none is padding."""
    # a compiled step is of one capacity: in coarse steps, so that another prompt seldom needs another
    capacity = -(-(ids.shape[1] + new_tokens) // CAPACITY_STEP) * CAPACITY_STEP
    cache = StaticSparseCache(model.config, config, capacity)
    if ids.shape[1] > 3 and (mask is None or bool(mask.all())):
        # two tokens are left to generate: one alone would be a decode step
        read_into(model, ids[:, :-2], cache, on_progress)
    return cache


def chunking(config: AttentionConfig, tokens: int) -> dict[str, int]:
    """What to tell `generate` so that a prompt of so many tokens does not pass the cap by more than a chunk."""
    most = PREFILL_CHUNK if config.max_cache_tokens is None else max(PREFILL_CHUNK, config.max_cache_tokens)
    if not config.is_capped or tokens <= most:
        return {}
    # a last chunk of one token would be a decode step, and read sparsely
    return {"prefill_chunk_size": PREFILL_CHUNK + int(tokens % PREFILL_CHUNK == 1)}
