"""Keys and values of one layer: preallocated, grown by half, read through views."""

from torch import Tensor

from sparse_attention_decoder.cache.arena import room
from sparse_attention_decoder.errors import ShapeError, UnsupportedError


class KVBuffer:
    """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of one layer.

    Appending a token writes it in place; only growing copies, and grows by half, so a token is
    copied about twice in its life, however long the context gets.

    limit: capacity beyond which it does not grow ahead of need; None for none.
    evicted: tokens that each row and head held once and no longer does.
    """

    def __init__(self) -> None:
        self.length = 0
        self.limit: int | None = None
        self.evicted = 0
        # what was held when tokens were last evicted: those heads hold different ones
        self._settled = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def is_allocated(self) -> bool:
        """Whether anything has been appended since the start or the last reset."""
        return self._keys is not None

    @property
    def capacity(self) -> int:
        """Tokens that fit before the next growth."""
        return 0 if self._keys is None else self._keys.shape[2]

    @property
    def seen(self) -> int:
        """Tokens ever appended and not truncated: those held and those evicted."""
        return self.length + self.evicted

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room for tokens to come included."""
        return sum(held.nbytes for held in (self._keys, self._values) if held is not None)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, Hkv, T, D of the keys held now."""
        batch, heads, _, dim = self._storage()[0].shape
        return batch, heads, self.length, dim

    @property
    def keys(self) -> Tensor:
        """View [B, Hkv, T, D] of the keys held now; a later append may leave it behind."""
        return self._storage()[0][:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """View [B, Hkv, T, Dv] of the values held now."""
        return self._storage()[1][:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] behind those held.

        Raises:
            ShapeError: other rows, heads, dims, dtype or device than those held.
        """
        keys, values = keys.detach(), values.detach()
        self._check_pair(keys, values)
        if self._keys is None or self._values is None:
            tokens = self._room(keys.shape[2], keys.shape[2] // 2)
            self._keys, self._values = _allocate(keys, tokens), _allocate(values, tokens)
        self._check_fits("keys", keys, self._keys)
        self._check_fits("values", values, self._values)
        needed = self.length + keys.shape[2]
        if needed > self.capacity:
            self._grow(max(needed, self._room(self.capacity, self.capacity // 2)))
        self._keys[:, :, self.length : needed] = keys
        self._values[:, :, self.length : needed] = values
        self.length = needed

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
        self.length = length

    def take_tokens(self, keep: Tensor, capacity: int) -> None:
        """Hold only the tokens at `keep` [B, Hkv, N] int64, ascending, and have room for `capacity` of them.

        Works in place where the capacity stays, else one stored tensor at a time.
        """
        keys, values = self._storage()
        self._keys = _compact(keys, keep, capacity)
        del keys
        self._values = _compact(values, keep, capacity)
        self.evicted += self.length - keep.shape[2]
        self.length = self._settled = keep.shape[2]

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held: reorder, repeat or select rows."""
        if self._keys is None or self._values is None:
            return
        rows = rows.to(self._keys.device)
        keys, values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        if len(rows) != self._keys.shape[0]:
            tokens = self.capacity
            self._keys, self._values = _allocate(keys, tokens), _allocate(values, tokens)
        self._keys[:, :, : self.length] = keys
        self._values[:, :, : self.length] = values

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.length = self.evicted = self._settled = 0
        self._keys = self._values = None

    def _room(self, tokens: int, more: int) -> int:
        return tokens + more if self.limit is None else max(tokens, min(tokens + more, self.limit))

    def _storage(self) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            raise ShapeError("the cache is empty; append keys and values before reading them")
        return self._keys, self._values

    def _grow(self, capacity: int) -> None:
        keys, values = self.keys, self.values
        self._keys, self._values = _allocate(keys, capacity), _allocate(values, capacity)
        self._keys[:, :, : self.length] = keys
        self._values[:, :, : self.length] = values

    @staticmethod
    def _check_pair(keys: Tensor, values: Tensor) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise ShapeError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not match; expected [B, Hkv, N, D] each"
            )

    @classmethod
    def _check_fits(cls, name: str, new: Tensor, held: Tensor) -> None:
        if new.ndim != 4 or new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
            expected = f"[{held.shape[0]}, {held.shape[1]}, N, {held.shape[3]}]"
            raise ShapeError(f"{name} to append have shape {tuple(new.shape)}; the cache holds {expected}")
        if new.dtype != held.dtype or new.device != held.device:
            raise ShapeError(
                f"{name} to append are {new.dtype} on {new.device}; the cache holds {held.dtype} on {held.device}"
            )


def _allocate(like: Tensor, tokens: int) -> Tensor:
    batch, heads, _, dim = like.shape
    return room((batch, heads, tokens, dim), like.dtype, like.device)


def _compact(held: Tensor, keep: Tensor, capacity: int) -> Tensor:
    target = held if capacity == held.shape[2] else _allocate(held, capacity)
    # head by head: what is picked is a copy, and need not be one of the whole layer
    for row, own in enumerate(keep):
        for head, tokens in enumerate(own):
            target[row, head, : len(tokens)] = held[row, head].index_select(0, tokens)
    return target
