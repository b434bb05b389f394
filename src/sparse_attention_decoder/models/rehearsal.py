"""Many decode steps in one forward pass: each new token attends as its own step would, in plain PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from sparse_attention_decoder.models.adapter import sparse_attention_forward
from sparse_attention_decoder.models.cache import LAYER_TAG, SparseCache, SparseLayer

NAME = "sparse_attention_rehearsal"
_PART = "_sparse_part"

# query [B, Hq, N, D] of the newest N tokens, keys [B, Hkv, T, D], values [B, Hkv, T, Dv], scaling -> [B, Hq, N, Dv]
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@torch.no_grad()
def rehearse(model: PreTrainedModel, cache: SparseCache, ids: Tensor, parts: Sequence[Attend | None]) -> Tensor:
    """Logits [B, N, vocabulary] behind each of ids [B, N], read at once behind a cache that is left as it was.

    Args:
        model: enabled; it is enabled as before afterwards.
        parts: one for each full-attention layer: how it attends; None is densely.
    A token's keys and values are made of what was attended before it, so this is what decoding one token at a time
    gives, as far as `parts` attend the way decode steps do.
    """
    held, previous = cache.get_seq_length(), model.config._attn_implementation
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        for layer, part in zip(cache.sparse_layers, parts, strict=True):
            setattr(layer, _PART, part)
        logits: Tensor = model(ids, past_key_values=cache).logits
        return logits
    finally:
        model.set_attn_implementation(previous)
        for layer in cache.sparse_layers:
            setattr(layer, _PART, None)
        cache.crop(held - cache.get_seq_length())


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    layer: SparseLayer | None = getattr(key, LAYER_TAG, None)
    part: Attend | None = getattr(layer, _PART, None)
    if part is None:
        return sparse_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    output = part(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return output.transpose(1, 2), None
