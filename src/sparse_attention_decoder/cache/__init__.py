"""What is remembered: keys and values, and an index kept in step with them. Knows no policy."""

from sparse_attention_decoder.cache.buffer import KVBuffer
from sparse_attention_decoder.cache.cap import Account, Cap
from sparse_attention_decoder.cache.far import FarField
from sparse_attention_decoder.cache.index import Index
from sparse_attention_decoder.cache.newest import NEWEST_NAMES, newest_bytes
from sparse_attention_decoder.cache.sketch import Sketch
from sparse_attention_decoder.cache.survivors import Survivors
from sparse_attention_decoder.cache.witness import Witness

__all__ = [
    "NEWEST_NAMES", "Account", "Cap", "FarField", "Index", "KVBuffer", "Sketch", "Survivors", "Witness", "newest_bytes",
]  # fmt: skip
