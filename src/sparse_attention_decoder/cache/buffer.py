"""Keys and values of one layer: preallocated, grown by half, read through views; as they came or packed."""

import torch
from torch import Tensor

from sparse_attention_decoder.cache.arena import SCALES, allocate, packed_view, room
from sparse_attention_decoder.errors import ConfigError, ShapeError, UnsupportedError
from sparse_attention_decoder.kernels import Kernels, Packed, Request, plain, resolve, stored_bytes
from sparse_attention_decoder.tables import KV_BITS

_NAMES = (*SCALES, *SCALES.values())
# tokens packed anew at a time, when a cache is converted
_PIECE = 4096


class KVBuffer:
    """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of one layer.

    Appending a token writes it in place; only growing copies, and grows by half, so a token is
    copied about twice in its life, however long the context gets; not even that where `reserve` said how long.

    limit: capacity beyond which it does not grow ahead of need; None for none.
    evicted: tokens that each row and head held once and no longer does; demoted: those it had to keep in fewer bits.

    Args:
        kv_dtype: None keeps what comes; "int8" or "int4" pack it, see `kernels.packed`.
        backend: whose kernels pack; all give the same codes.
    """

    def __init__(self, kv_dtype: str | None = None, backend: str = "auto") -> None:
        self.kv_dtype = kv_dtype
        self._backend = backend
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.length = 0
        self.limit: int | None = None
        self.evicted = self.demoted = 0
        # what was held when tokens were last evicted: those heads hold different ones
        self._settled = 0
        self._reserved = 0
        # keys and values, and where they are packed key_scales and value_scales; tokens are the third axis of each
        self._stored: dict[str, Tensor] = {}
        # views of all that is held, made once a step; dropped by whatever changes it
        self._views: dict[str, Tensor | Packed] = {}
        self._dtype = torch.float32
        self._kernels: Kernels | None = None

    @property
    def is_allocated(self) -> bool:
        """Whether anything has been appended since the start or the last reset."""
        return bool(self._stored)

    @property
    def capacity(self) -> int:
        """Tokens that fit before the next growth."""
        # the least of all: growing may have been broken off in between
        return min((held.shape[2] for held in self._stored.values()), default=0)

    @property
    def seen(self) -> int:
        """Tokens ever appended and not truncated: those held and those evicted."""
        return self.length + self.evicted

    @property
    def kept_as(self) -> str:
        """What a channel is kept in: int4, int8, or the name of the dtype that came."""
        return self.kv_dtype or str(self._dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room for tokens to come included."""
        return sum(held.nbytes for held in self._stored.values())

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, Hkv, T, D of the keys held now."""
        batch, heads, length, dim = self.keys.shape
        return batch, heads, length, dim

    @property
    def keys(self) -> Tensor | Packed:
        """View [B, Hkv, T, D] of the keys held now, as kernels take it; a later append may leave it behind."""
        return self._whole("keys")

    @property
    def values(self) -> Tensor | Packed:
        """View [B, Hkv, T, Dv] of the values held now."""
        return self._whole("values")

    @property
    def plain_keys(self) -> Tensor:
        """Keys [B, Hkv, T, D] in the dtype they came in: a view, or unpacked into a tensor of its own."""
        return plain(self.keys)

    @property
    def plain_values(self) -> Tensor:
        """Values [B, Hkv, T, Dv] in the dtype they came in: a view, or unpacked into a tensor of its own."""
        return plain(self.values)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one head, as they are kept."""
        return sum(stored_bytes(x.shape[-1], self.kv_dtype, self._dtype) for x in (self.keys, self.values))

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's key in one head, as it is kept."""
        return stored_bytes(self.keys.shape[-1], self.kv_dtype, self._dtype)

    @property
    def plain_token_bytes(self) -> int:
        """The same in the dtype they came in."""
        return sum(stored_bytes(x.shape[-1], None, self._dtype) for x in (self.keys, self.values))

    def tensors(self) -> dict[str, Tensor]:
        """Views of all that is stored, by name: tokens are the third axis of each, T of them."""
        return {name: held[:, :, : self.length] for name, held in self._stored.items()}

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] behind those held.

        Raises:
            ShapeError: other rows, heads, dims, dtype or device than those held.
            BackendError: the backend does not pack such tensors.
        """
        keys, values = keys.detach(), values.detach()
        self._check_pair(keys, values)
        count = keys.shape[2]
        if not self._stored:
            self._dtype = keys.dtype
            if self.kv_dtype is not None:
                self._kernels = self._resolve(self.kv_dtype, keys, values)
            tokens = self._room(count, max(0, self._reserved - count) if self._reserved else count // 2)
            for name, like in (("keys", keys), ("values", values)):
                self._stored.update(allocate(name, like, tokens, self.kv_dtype))
        self._check_fits("keys", keys, self.keys)
        self._check_fits("values", values, self.values)
        self._views.clear()
        needed = self.length + count
        if needed > self.capacity:
            self._grow(max(needed, self._room(self.capacity, self.capacity // 2)))
        for name, new in (("keys", keys), ("values", values)):
            place = self._view(name, self.length, needed)
            if isinstance(place, Packed):
                assert self._kernels is not None
                self._kernels.pack(new, place)
            else:
                place.copy_(new)
        self.length = needed

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, so that what is appended up to there is never copied."""
        self._reserved = tokens
        self._views.clear()
        if self._stored and tokens > self.capacity:
            self._grow(self._room(self.capacity, tokens - self.capacity))

    def convert(self, kv_dtype: str) -> None:
        """Keep what is held, and all to come, in fewer bits; keys first, their old memory freed before values follow.

        Raises:
            ConfigError: not a kv_dtype of fewer bits than there are now.
            BackendError: the backend does not pack such tensors.
        """
        if KV_BITS.get(kv_dtype, 16) >= KV_BITS.get(str(self.kv_dtype), 16):
            fewer = [name for name, bits in KV_BITS.items() if bits < KV_BITS.get(str(self.kv_dtype), 16)]
            raise ConfigError(
                f"kv_dtype {kv_dtype!r} is no less than {self.kv_dtype!r}, which this cache holds; "
                f"it converts to {' or '.join(fewer) or 'nothing smaller'}"
            )
        if self._stored:
            self._kernels = kernels = self._resolve(kv_dtype, self.keys, self.values)
            self._views.clear()
            fresh: dict[str, Tensor] = {}
            for name in ("keys", "values"):
                old = self._view(name, 0, self.length)
                fresh.update(allocate(name, old, self.capacity if not fresh else fresh["keys"].shape[2], kv_dtype))
                new = packed_view(fresh, name, 0, self.length, self._dtype)
                for start in range(0, self.length, _PIECE):
                    piece = slice(start, start + _PIECE)
                    kernels.pack(plain(old[:, :, piece]), new[:, :, piece])
                del old
                for part in (name, SCALES[name]):
                    self._stored.pop(part, None)
            self._stored = fresh
        self.demoted += self.length
        self.kv_dtype = kv_dtype

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            ShapeError: length is negative or beyond what is held.
            UnsupportedError: tokens have been evicted since there were that few.
        """
        if not 0 <= length <= self.length:
            raise ShapeError(f"cannot truncate to {length} tokens; the cache holds {self.length}")
        if length < self._settled:
            raise UnsupportedError(
                f"cannot go back by {self.length - length} tokens: {self.evicted} were evicted to stay below the cap, "
                f"the last of them {self.length - self._settled} tokens ago; raise max_cache_tokens or max_cache_bytes"
            )
        self._views.clear()
        self.length = length

    def adopt(self, tensors: dict[str, Tensor], length: int, dtype: torch.dtype) -> None:
        """Hold `length` tokens in these very tensors, named as `tensors` names them, with what room they have.

        Args:
            dtype: that of the keys and values which they stand for, where they are packed.
        Raises:
            ShapeError: they do not fit together, or have no room for so many tokens.
        """
        stored = {name: held for name, held in tensors.items() if name in _NAMES}
        forms = {Packed.storage(8, name)[1]: name for name in KV_BITS}
        self._views.clear()
        self._stored, self.kv_dtype = stored, forms.get(stored["keys"].dtype)
        self._dtype = stored["keys"].dtype if self.kv_dtype is None else dtype
        self._check_pair(stored["keys"], stored["values"])
        if any(held.shape[:2] != stored["keys"].shape[:2] for held in stored.values()) or self.capacity < length:
            shapes = {name: tuple(held.shape) for name, held in stored.items()}
            raise ShapeError(f"{shapes} have no room for {length} tokens, or do not fit together")
        self.length = length
        if self.kv_dtype is not None:
            self._kernels = self._resolve(self.kv_dtype, self.keys, self.values)

    def take_tokens(self, keep: Tensor, capacity: int) -> None:
        """Hold only the tokens at `keep` [B, Hkv, N] int64, ascending, and have room for `capacity` of them.

        Works in place where the capacity stays, else one stored tensor at a time.
        """
        self._views.clear()
        for name in self._stored:
            held = self._stored[name]
            if capacity != held.shape[2]:
                self._stored[name] = room((*held.shape[:2], capacity, *held.shape[3:]), held.dtype, held.device)
            # head by head: what is picked is a copy, and need not be one of the whole layer
            for row, own in enumerate(keep):
                for head, tokens in enumerate(own):
                    self._stored[name][row, head, : len(tokens)] = held[row, head].index_select(0, tokens)
        self.evicted += self.length - keep.shape[2]
        self.length = self._settled = keep.shape[2]

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held: reorder, repeat or select rows."""
        self._views.clear()
        for name in self._stored:
            held = self._stored[name]
            taken = held[:, :, : self.length].index_select(0, rows.to(held.device))
            if len(rows) != held.shape[0]:
                self._stored[name] = held = room((len(rows), *held.shape[1:]), held.dtype, held.device)
            held[:, :, : self.length] = taken

    def _room(self, tokens: int, more: int) -> int:
        return tokens + more if self.limit is None else max(tokens, min(tokens + more, self.limit))

    def _whole(self, name: str) -> Tensor | Packed:
        if name not in self._views:
            self._views[name] = self._view(name, 0, self.length)
        return self._views[name]

    def _view(self, name: str, low: int, high: int) -> Tensor | Packed:
        if not self._stored:
            raise ShapeError("the cache is empty; append keys and values before reading them")
        if self.kv_dtype is not None:
            return packed_view(self._stored, name, low, high, self._dtype)
        return self._stored[name][:, :, low:high]

    def _resolve(self, kv_dtype: str, keys: Tensor | Packed, values: Tensor | Packed) -> Kernels:
        return resolve(self._backend, Request(keys.device, self._dtype, keys.shape[-1], values.shape[-1], kv_dtype))

    def _grow(self, capacity: int) -> None:
        # one tensor after the other, so that no more than one is there twice
        for name in self._stored:
            held = self._stored[name]
            larger = room((*held.shape[:2], capacity, *held.shape[3:]), held.dtype, held.device)
            larger[:, :, : self.length] = held[:, :, : self.length]
            self._stored[name] = larger

    @staticmethod
    def _check_pair(keys: Tensor, values: Tensor) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not match; expected [B, Hkv, N, D] each"
            )

    @staticmethod
    def _check_fits(name: str, new: Tensor, held: Tensor | Packed) -> None:
        if new.ndim != 4 or new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
            expected = f"[{held.shape[0]}, {held.shape[1]}, N, {held.shape[3]}]"
            raise ShapeError(f"{name} to append have shape {tuple(new.shape)}; the cache holds {expected}")
        if new.dtype != held.dtype or new.device != held.device:
            raise ShapeError(
                f"{name} to append are {new.dtype} on {new.device}; the cache holds {held.dtype} on {held.device}"
            )
