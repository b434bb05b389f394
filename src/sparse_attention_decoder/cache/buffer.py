"""Keys and values of one layer: preallocated, grown by half, read through views."""

from torch import Tensor

from sparse_attention_decoder.cache.arena import room
from sparse_attention_decoder.errors import ShapeError


class KVBuffer:
    """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of one layer.

    Appending a token writes it in place; only growing copies, and grows by half, so a token is
    copied about twice in its life, however long the context gets.
    """

    def __init__(self) -> None:
        self.length = 0
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
            tokens = keys.shape[2] + keys.shape[2] // 2
            self._keys, self._values = _allocate(keys, tokens), _allocate(values, tokens)
        self._check_fits("keys", keys, self._keys)
        self._check_fits("values", values, self._values)
        needed = self.length + keys.shape[2]
        if needed > self.capacity:
            self._grow(max(needed, self.capacity + self.capacity // 2))
        self._keys[:, :, self.length : needed] = keys
        self._values[:, :, self.length : needed] = values
        self.length = needed

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            ShapeError: length is negative or beyond what is held.
        """
        if not 0 <= length <= self.length:
            raise ShapeError(f"cannot truncate to {length} tokens; the cache holds {self.length}")
        self.length = length

    def tensors(self, spare: int) -> dict[str, tuple[Tensor, int]]:
        """What is held, by name, tokens along axis 2; and how many rows of that axis `spare` more tokens will take."""
        return {"keys": (self.keys, spare), "values": (self.values, spare)}

    def adopt(self, tensors: dict[str, Tensor], length: int) -> None:
        """Hold `length` tokens in these very tensors, named as `tensors` names them, with what room they have.

        Raises:
            ShapeError: they do not fit together, or have no room for so many tokens.
        """
        keys, values = tensors["keys"], tensors["values"]
        self._check_pair(keys, values)
        if keys.shape[2] < length:
            raise ShapeError(f"keys {tuple(keys.shape)} have no room for {length} tokens")
        self._keys, self._values, self.length = keys, values, length

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
        self.length = 0
        self._keys = self._values = None

    def _storage(self) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            raise ShapeError("the cache is empty; append keys and values before reading them")
        return self._keys, self._values

    def _grow(self, capacity: int) -> None:
        keys, values = _allocate(self.keys, capacity), _allocate(self.values, capacity)
        keys[:, :, : self.length] = self.keys
        values[:, :, : self.length] = self.values
        # last: what breaks off before this has lost nothing
        self._keys, self._values = keys, values

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
