"""Sparse decoding of long contexts: read the cached tokens that matter, keep the rest where it is."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import SparseAttentionError

if TYPE_CHECKING:
    from sparse_attention_decoder.decoder import SparseAttention
    from sparse_attention_decoder.models.adapter import disable, enable
    from sparse_attention_decoder.models.cache import SparseCache
    from sparse_attention_decoder.models.lossless import Lossless
    from sparse_attention_decoder.models.static import StaticSparseCache
    from sparse_attention_decoder.session import Session

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "Lossless",
    "Session",
    "SparseAttention",
    "SparseAttentionError",
    "SparseCache",
    "StaticSparseCache",
    "disable",
    "enable",
]

# these import transformers, which takes seconds: only when first asked for
_LAZY = {
    "Lossless": "models.lossless",
    "Session": "session",
    "SparseAttention": "decoder",
    "SparseCache": "models.cache",
    "StaticSparseCache": "models.static",
    "disable": "models.adapter",
    "enable": "models.adapter",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
