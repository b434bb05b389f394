"""What a model's cache takes, token by token."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from sparse_attention_decoder.cache import newest_bytes
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import stored_bytes
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.tables import KV_BITS


def token_bytes(model_config: PreTrainedConfig, kv_dtype: str | None, dtype: torch.dtype) -> int:
    """Bytes that keys and values of one token take in all full-attention layers of a model, scales included.

    Under a kv_dtype: once they are packed. The newest tokens are not, see `whole_bytes`.

    Args:
        dtype: of the model; with kv_dtype None keys and values are kept in it.
    """
    each, dim = _vectors(model_config)
    return each * stored_bytes(dim, kv_dtype, dtype)


def whole_bytes(model_config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that the newest tokens of one row take beside packed ones, in all full-attention layers of a model."""
    each, dim = _vectors(model_config)
    return each // 2 * newest_bytes(dim, dim, dtype)


def gguf_bytes(file: Path) -> tuple[dict[str, int], int]:
    """For the model of a GGUF file, what a token takes in bfloat16 and every kv_dtype, by name; and `whole_bytes`."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=str(file.absolute()))
    forms: dict[str, str | None] = {"bfloat16": None, **{name: name for name in KV_BITS}}
    each = {name: token_bytes(config, kv_dtype, torch.bfloat16) for name, kv_dtype in forms.items()}
    return each, whole_bytes(config, torch.bfloat16)


def _vectors(model_config: PreTrainedConfig) -> tuple[int, int]:
    """How many keys and values a token has, and how many channels each."""
    text: Any = model_config.get_text_config(decoder=True)
    layers = len(SparseCache(model_config, AttentionConfig()).sparse_layers)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * layers * int(heads), int(dim)
