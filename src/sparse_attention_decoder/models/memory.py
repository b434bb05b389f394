"""What a model's cache takes, token by token."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import stored_bytes
from sparse_attention_decoder.models.cache import SparseCache


def token_bytes(model_config: PreTrainedConfig, kv_dtype: str | None, dtype: torch.dtype) -> int:
    """Bytes that keys and values of one token take in all full-attention layers of a model, scales included.

    Args:
        dtype: of the model; with kv_dtype None keys and values are kept in it.
    """
    text: Any = model_config.get_text_config(decoder=True)
    layers = len(SparseCache(model_config, AttentionConfig()).sparse_layers)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * layers * int(heads) * stored_bytes(int(dim), kv_dtype, dtype)
