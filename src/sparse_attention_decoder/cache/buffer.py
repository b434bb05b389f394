"""Keys and values of one layer: preallocated, grown by half, read through views; as they came or packed."""

import torch
from torch import Tensor

import sparse_attention_decoder.cache.arena as arena
from sparse_attention_decoder.cache.fitting import check_cut, check_fewer_bits, check_fits, check_pair, check_room
from sparse_attention_decoder.cache.newest import NEWEST_NAMES, Newest
from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels import Kernels, Packed, Request, plain, resolve, stored_bytes
from sparse_attention_decoder.tables import KV_BITS


class KVBuffer:
    """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of one layer.

    Appending a token writes it in place; only growing copies, and grows by half, so a token is
    copied about twice in its life, however long the context gets; not even that where `reserve` said how long.
    Packed or to be packed, the newest tokens are kept as they came, see `Newest`, and packed when others have followed.

    newest: the tokens that are whole; None where nothing is packed.
    limit: capacity beyond which it does not grow ahead of need; None for none.
    evicted: tokens that each row and head held once and no longer does; demoted: those it had to keep in fewer bits.

    Args:
        kv_dtype: None keeps what comes; "int8" or "int4" pack it, see `kernels.packed`.
        backend: whose kernels pack; all give the same codes.
    """

    def __init__(self, kv_dtype: str | None = None, backend: str = "auto") -> None:
        self.kv_dtype = kv_dtype
        self._backend = backend
        # goes up whenever what is held moves, so that addresses of it are no longer good
        self.changes = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.changes += 1
        self.length = self.evicted = self.demoted = 0
        self.limit: int | None = None
        # what was held when tokens were last evicted: those heads hold different ones
        self._settled = 0
        self._reserved = 0
        # keys and values, and where they are packed key_scales and value_scales; tokens are the third axis of each
        self._stored: dict[str, Tensor] = {}
        self.newest: Newest | None = None
        # views of all that is held, made once a step, and of what is packed of it; dropped by whatever changes them
        self._views: dict[str, Tensor | Packed] = {}
        self._packed_views: dict[str, Packed] = {}
        # shapes, dtypes and devices of what was appended last, and fitted
        self._fitting: tuple[object, ...] = ()
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
    def steady_tokens(self) -> int:
        """Tokens that can be held before anything has to move or be packed."""
        return self.capacity if self.newest is None else min(self.capacity, self.newest.steady_tokens)

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
        return sum(held.nbytes for held in self._stored.values()) + (self.newest.nbytes if self.newest else 0)

    @property
    def whole(self) -> int:
        """How many of the newest tokens of a packed cache are kept as they came."""
        return self.newest.count if self.newest else 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, Hkv, T, D of the keys held now."""
        batch, heads, length, dim = self.keys.shape
        return batch, heads, length, dim

    @property
    def keys(self) -> Tensor | Packed:
        """View [B, Hkv, T, D] of the keys held now, as kernels take it; a later append may leave it behind."""
        return self._view("keys")

    @property
    def values(self) -> Tensor | Packed:
        """View [B, Hkv, T, Dv] of the values held now."""
        return self._view("values")

    @property
    def plain_keys(self) -> Tensor:
        """Keys [B, Hkv, T, D] in the dtype they came in: a view, or unpacked into a tensor of its own."""
        return plain(self.keys)

    @property
    def plain_values(self) -> Tensor:
        """Values [B, Hkv, T, Dv] in the dtype they came in: a view, or unpacked into a tensor of its own."""
        return plain(self.values)

    def token_bytes(self, kv_dtype: str | None) -> int:
        """Bytes of one token's key and value in one head, packed so, or as they came for None."""
        return sum(stored_bytes(x.shape[-1], kv_dtype, self._dtype) for x in (self.keys, self.values))

    def tensors(self) -> dict[str, Tensor]:
        """Views of all that is stored, by name, tokens the third axis of each; those that are whole under `newest_`."""
        stored = {name: held[:, :, : self._stored_length] for name, held in self._stored.items()}
        return stored | (self.newest.tensors() if self.newest else {})

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] behind those held.

        Raises:
            ShapeError: other rows, heads, dims, dtype or device than those held.
            BackendError: the backend does not pack such tensors.
        """
        keys, values = keys.detach(), values.detach()
        fitting = (keys.shape, values.shape, keys.dtype, values.dtype, keys.device, values.device)
        if fitting != self._fitting:
            check_pair(keys, values)
            if self._stored:
                check_fits("keys", keys, self.keys)
                check_fits("values", values, self.values)
            else:
                self._begin(keys, values)
            self._fitting = fitting
        self._views.clear()
        needed = self.length + keys.shape[2]
        if needed > self.capacity:
            self._grow(max(needed, self._room(self.capacity, self.capacity // 2)))
        if self.newest is not None:
            self.newest.push(keys, values, self._pack)
        else:
            self._stored["keys"][:, :, self.length : needed].copy_(keys)
            self._stored["values"][:, :, self.length : needed].copy_(values)
        self.length = needed

    def advance(self) -> None:
        """One more token is held, within `steady_tokens`: a kernel has written it."""
        self._views.clear()
        self.length += 1
        if self.newest is not None:
            self.newest.count += 1

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        self._dtype, count = keys.dtype, keys.shape[2]
        if self.kv_dtype is not None:
            self._kernels = self._resolve(self.kv_dtype, keys, values)
            self.newest = Newest(keys, values)
        tokens = self._room(count, max(0, self._reserved - count) if self._reserved else count // 2)
        for name, like in (("keys", keys), ("values", values)):
            self._stored.update(arena.allocate(name, like, tokens, self.kv_dtype))

    def _pack(self, name: str, new: Tensor, start: int) -> None:
        assert self._kernels is not None
        self._packed_views.clear()
        self.changes += 1
        self._kernels.pack(new, arena.packed_view(self._stored, name, start, start + new.shape[2], self._dtype))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, so that what is appended up to there is never copied."""
        self._reserved = tokens
        if self._stored and tokens > self.capacity:
            self._grow(self._room(self.capacity, tokens - self.capacity))

    def convert(self, kv_dtype: str) -> None:
        """Keep what is held, and all to come, in fewer bits; keys first, their old memory freed before values follow.

        Raises:
            ConfigError: not a kv_dtype of fewer bits than there are now.
            BackendError: the backend does not pack such tensors.
        """
        check_fewer_bits(kv_dtype, self.kv_dtype)
        if self._stored:
            self._convert(kv_dtype)
        self.demoted += self.length
        self.kv_dtype = kv_dtype

    def _convert(self, kv_dtype: str) -> None:
        kernels = self._resolve(kv_dtype, self.keys, self.values)
        newest = self.newest or Newest.behind(self.plain_keys, self.plain_values)
        fresh: dict[str, Tensor] = {}
        for name in ("keys", "values"):
            old = self._view(name)
            fresh.update(arena.allocate(name, old, self.capacity if not fresh else fresh["keys"].shape[2], kv_dtype))
            arena.pack_pieces(
                kernels, old[:, :, : newest.first], arena.packed_view(fresh, name, 0, newest.first, self._dtype)
            )
            del old
            self._forget_views()
            for part in (name, arena.SCALES[name]):
                self._stored.pop(part, None)
        self._stored, self.newest, self._kernels = fresh, newest, kernels

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            ShapeError: length is negative or beyond what is held.
            UnsupportedError: tokens have been evicted since there were that few.
        """
        check_cut(length, self.length, self._settled, self.evicted)
        self._views.clear()
        self.length = length
        if self.newest is not None:
            self._forget_views()
            self.newest.truncate(length)

    def adopt(self, tensors: dict[str, Tensor], length: int, dtype: torch.dtype) -> None:
        """Hold `length` tokens in these very tensors, named as `tensors` names them, with what room they have.

        Args:
            dtype: that of the keys and values which they stand for, where they are packed.
        Raises:
            ShapeError: they do not fit together, or have no room for so many tokens.
        """
        whole = {name: tensors[name] for name in NEWEST_NAMES if name in tensors}
        stored = {name: tensors[name] for name in (*arena.SCALES, *arena.SCALES.values()) if name in tensors}
        forms = {Packed.storage(8, name)[1]: name for name in KV_BITS}
        self._forget_views()
        self._stored, self.newest, self.kv_dtype = stored, None, forms.get(stored["keys"].dtype)
        self._dtype = stored["keys"].dtype if self.kv_dtype is None else dtype
        check_pair(stored["keys"], stored["values"])
        count = max((held.shape[2] for held in whole.values()), default=0)
        check_room(stored | whole, self.capacity + count, length)
        self.length = length
        if self.kv_dtype is not None:
            keys, values = (arena.packed_view(stored, name, 0, length - count, dtype) for name in arena.SCALES)
            self._kernels = self._resolve(self.kv_dtype, keys, values)
            self.newest = Newest(keys, values)
            self.newest.hold(whole, length - count)
            if self.capacity < length:
                self._grow(length)

    def take_tokens(self, keep: Tensor, capacity: int) -> None:
        """Hold only the tokens at `keep` [B, Hkv, N] int64, ascending, and have room for `capacity` of them.

        Works in place where the capacity stays, else one stored tensor at a time.
        """
        self._forget_views()
        arena.keep_tokens(self._stored, self.newest.take_tokens(keep, self._pack) if self.newest else keep, capacity)
        self.evicted += self.length - keep.shape[2]
        self.length = self._settled = keep.shape[2]

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held: reorder, repeat or select rows."""
        self._forget_views()
        if self.newest is not None:
            self.newest.take_rows(rows)
        arena.keep_rows(self._stored, rows, self._stored_length)

    def _room(self, tokens: int, more: int) -> int:
        return tokens + more if self.limit is None else max(tokens, min(tokens + more, self.limit))

    @property
    def _stored_length(self) -> int:
        return self.newest.first if self.newest else self.length

    def _forget_views(self) -> None:
        self._views.clear()
        self._packed_views.clear()
        self._fitting = ()
        self.changes += 1

    def _view(self, name: str) -> Tensor | Packed:
        if not self._stored:
            raise ShapeError("the cache is empty; append keys and values before reading them")
        if name not in self._views:
            self._views[name] = self._stored[name][:, :, : self.length] if self.newest is None else self._mixed(name)
        return self._views[name]

    def _mixed(self, name: str) -> Packed:
        assert self.newest is not None
        if name not in self._packed_views:
            self._packed_views[name] = arena.packed_view(self._stored, name, 0, self.newest.first, self._dtype)
        return self._packed_views[name].before(self.newest.view(name))

    def _resolve(self, kv_dtype: str, keys: Tensor | Packed, values: Tensor | Packed) -> Kernels:
        return resolve(self._backend, Request(keys.device, self._dtype, keys.shape[-1], values.shape[-1], kv_dtype))

    def _grow(self, capacity: int) -> None:
        self._forget_views()
        arena.grow(self._stored, capacity, self._stored_length)
