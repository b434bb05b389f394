"""What may be put into a buffer: keys that match values, what is like what is held, and fewer bits than there are."""

from torch import Tensor

from sparse_attention_decoder.errors import ConfigError, ShapeError, UnsupportedError
from sparse_attention_decoder.kernels import Packed
from sparse_attention_decoder.tables import KV_BITS


def check_pair(keys: Tensor, values: Tensor) -> None:
    """Raise ShapeError unless keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] are of the same tokens."""
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ShapeError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not match; expected [B, Hkv, N, D] each"
        )


def check_fits(name: str, new: Tensor, held: Tensor | Packed) -> None:
    """Raise ShapeError unless new tokens [B, Hkv, N, D] are like those held."""
    if new.ndim != 4 or new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
        expected = f"[{held.shape[0]}, {held.shape[1]}, N, {held.shape[3]}]"
        raise ShapeError(f"{name} to append have shape {tuple(new.shape)}; the cache holds {expected}")
    if new.dtype != held.dtype or new.device != held.device:
        raise ShapeError(
            f"{name} to append are {new.dtype} on {new.device}; the cache holds {held.dtype} on {held.device}"
        )


def check_room(tensors: dict[str, Tensor], capacity: int, length: int) -> None:
    """Raise ShapeError unless stored tensors are of the same rows and heads, and have room for `length` tokens."""
    if len({held.shape[:2] for held in tensors.values()}) != 1 or capacity < length:
        shapes = {name: tuple(held.shape) for name, held in tensors.items()}
        raise ShapeError(f"{shapes} have no room for {length} tokens, or do not fit together")


def check_fewer_bits(kv_dtype: str, held: str | None) -> None:
    """Raise ConfigError unless this kv_dtype has fewer bits than the one held."""
    if KV_BITS.get(kv_dtype, 16) >= KV_BITS.get(str(held), 16):
        fewer = [name for name, bits in KV_BITS.items() if bits < KV_BITS.get(str(held), 16)]
        raise ConfigError(
            f"kv_dtype {kv_dtype!r} is no less than {held!r}, which this cache holds; "
            f"it converts to {' or '.join(fewer) or 'nothing smaller'}"
        )


def check_cut(length: int, held: int, settled: int, evicted: int) -> None:
    """Raise ShapeError unless `held` tokens can be cut to `length`, UnsupportedError if some were evicted since."""
    if not 0 <= length <= held:
        raise ShapeError(f"cannot truncate to {length} tokens; the cache holds {held}")
    if length < settled:
        raise UnsupportedError(
            f"cannot go back by {held - length} tokens: {evicted} were evicted to stay below the cap, "
            f"the last of them {held - settled} tokens ago; raise max_cache_tokens or max_cache_bytes"
        )
