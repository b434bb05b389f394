"""Asking about a context that has been read: the question and the answer are decoded, and so read sparsely."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, InputError, UnsupportedError
from sparse_attention_decoder.measure.compare import ends_of
from sparse_attention_decoder.models.cache import SparseCache, SparseLayer
from sparse_attention_decoder.selection import Reads


@dataclass(frozen=True)
class Answer:
    """What was written and what was read for it.

    ids: tokens written, without the one that ends the text.
    reads: of the decode steps for question and answer, summed over layers.
    """

    ids: list[int]
    reads: Reads


@torch.no_grad()
def answer(
    model: Any,
    cache: SparseCache,
    question_ids: Tensor,
    config: AttentionConfig,
    new_tokens: int,
    is_done: Callable[[list[int]], bool],
) -> Answer:
    """Decode a question and then greedily its answer, reading the context as `config` says.

    The question is fed one token at a time: read all at once it would be a prefill, which is dense.

    Args:
        model: a causal LM that has been enabled, with any config.
        cache: holds the context, densely prefilled, of one row. It is left as it was.
        question_ids: [1, N] int64.
        new_tokens: at most so many are written; an end-of-text token ends the answer before.
        is_done: told the tokens written so far; True ends the answer.
    Raises:
        InputError: no context, no question or no token to write, or more rows than one.
        UnsupportedError: no layer of the model is read sparsely.
        ConfigError: the context exceeds the budget and yet no step was sparse: dense against dense.
    """
    _check(cache, question_ids, new_tokens)
    context = cache.get_seq_length()
    reading = cache.reconfigured(config)
    # transformers' own layers (sliding, linear) cannot be cropped: a copy of them is decoded on
    reading.layers = [layer if isinstance(layer, SparseLayer) else copy.deepcopy(layer) for layer in reading.layers]
    ends = ends_of(model)
    written: list[int] = []
    try:
        for token in question_ids.to(model.device).split(1, dim=1):
            logits = model(token, past_key_values=reading, use_cache=True).logits
        _require_sparse(reading, config, context)
        while True:
            token = logits[:, -1:].argmax(-1)
            if int(token) in ends:
                break
            written.append(int(token))
            if len(written) == new_tokens or is_done(written):
                break
            logits = model(token, past_key_values=reading, use_cache=True).logits
        return Answer(written, reading.reads)
    finally:
        for layer in cache.sparse_layers:
            # the buffer is shared: this also takes the tokens out that `reading` put in
            layer.crop(context - layer.get_seq_length())


def _check(cache: SparseCache, question_ids: Tensor, new_tokens: int) -> None:
    if not cache.sparse_layers:
        raise UnsupportedError("no layer of this model has full attention, so there is nothing to read sparsely")
    if cache.get_seq_length() == 0:
        raise InputError("the cache is empty; read a context into it first")
    if question_ids.ndim != 2 or question_ids.shape[0] != 1 or question_ids.shape[1] == 0:
        raise InputError(
            f"question_ids have shape {tuple(question_ids.shape)}; expected [1, N] with at least one token"
        )
    rows = cache.sparse_layers[0].state.buffer.keys.shape[0]
    if rows != 1:
        raise InputError(f"the cache holds {rows} rows; a question is asked of one")
    if new_tokens < 1:
        raise InputError(f"new_tokens is {new_tokens}; use 1 or more")


def _require_sparse(cache: SparseCache, config: AttentionConfig, context: int) -> None:
    """Whoever asks for sparse decoding of a long context must not be given dense decoding unawares."""
    if cache.sparse_layers[0].state.policy.reads_everything or context <= config.budget_tokens:
        return
    if cache.reads.sparse_steps == 0:
        raise ConfigError(
            f"the context of {context} tokens exceeds the budget of {config.budget_tokens}, but every step read all "
            f"of it, because dense_below={config.dense_below} waits for a longer one; use dense_below=0"
        )
