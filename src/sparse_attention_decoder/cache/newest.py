"""The newest tokens of a packed cache, whole: rounded as they came, they cost four bits a tenth of the perplexity."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_attention_decoder.cache.arena import room
from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels import Packed

# tokens that stay as they came at least; how many are packed together when they leave; and how many of those are
# still here as well, to go back to; docs/experiments.md, 17
LEAST, TOGETHER, BACK = 64, 32, 32
ROOM = BACK + LEAST + TOGETHER
_PREFIX = "newest_"
NEWEST_NAMES = (f"{_PREFIX}keys", f"{_PREFIX}values")

# takes the name, tokens [B, Hkv, N, D] and the position of the first
Pack = Callable[[str, Tensor, int], None]


class Newest:
    """Keys and values of the newest tokens of one layer, as they came.

    How many they are depends on how many tokens have come, at once or one by one: from 64 to 95, or all where there are
    fewer. Going back, by up to 32 tokens in all, leaves what would be here without them; further back it leaves fewer,
    for what was packed stays packed. Padding counts as tokens: beside a longer row up to 31 more of a row's are
    whole, or fewer, than alone.

    first: tokens packed before them, which is where the first of them stands.
    count: how many they are.
    """

    def __init__(self, keys: Tensor | Packed, values: Tensor | Packed) -> None:
        self.first = self.count = 0
        # where the first token of the rooms stands: there may be some that are packed already
        self._start = 0
        self._rooms = {name: room((*like.shape[:2], ROOM, like.shape[3]), like.dtype, like.device)
                       for name, like in (("keys", keys), ("values", values))}  # fmt: skip

    @classmethod
    def behind(cls, keys: Tensor, values: Tensor) -> "Newest":
        """Of the keys and values [B, Hkv, T, D] that are about to be packed."""
        found, first = cls(keys, values), packed_of(keys.shape[2])
        found.hold({NEWEST_NAMES[0]: keys[:, :, first:], NEWEST_NAMES[1]: values[:, :, first:]}, first)
        return found

    @property
    def steady_tokens(self) -> int:
        """Tokens that the cache may hold before any of these is packed."""
        return self.first + LEAST + TOGETHER - 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(held.nbytes for held in self._rooms.values())

    def tensors(self) -> dict[str, Tensor]:
        """Views of what is whole, by name: tokens are the third axis of each, `count` of them."""
        return {_PREFIX + name: self.view(name) for name in self._rooms}

    def view(self, name: str) -> Tensor:
        """View [B, Hkv, count, D] of the keys or values."""
        low = self.first - self._start
        return self._rooms[name][:, :, low : low + self.count]

    def hold(self, tensors: dict[str, Tensor], first: int) -> None:
        """Copy tokens named as `tensors` names them, or none, the first of which stands at `first`.

        Raises:
            ShapeError: more than there is room for.
        """
        self.first = self._start = first
        for name, new in tensors.items():
            self.count = new.shape[2]
            if self.count > ROOM:
                raise ShapeError(f"{self.count} tokens are not packed; {ROOM} may be at most")
            self._rooms[name.removeprefix(_PREFIX)][:, :, : self.count] = new

    def push(self, keys: Tensor, values: Tensor, pack: Pack) -> None:
        """Add keys [B, Hkv, N, D] and values; `pack` is given what leaves, of those held and of the new ones."""
        end, more, old = self.first + self.count, keys.shape[2], self._start
        first = max(self.first, packed_of(end + more))
        self._start = start = max(old, first - BACK)
        for name, fresh in (("keys", keys), ("values", values)):
            whole = self._rooms[name]
            if first > self.first:
                if self.count:
                    pack(name, whole[:, :, self.first - old : min(first, end) - old], self.first)
                if first > end:
                    pack(name, fresh[:, :, : first - end], end)
            if start > old:
                whole[:, :, : max(0, end - start)] = whole[:, :, start - old : max(start, end) - old].clone()
                fresh = fresh[:, :, max(0, start - end) :]
            whole[:, :, max(end, start) - start : end + more - start].copy_(fresh)
        self.first, self.count = first, end + more - first

    def truncate(self, length: int) -> None:
        """The cache keeps its first `length` tokens."""
        self._start = min(self._start, length)
        self.first = min(self.first, max(self._start, packed_of(length)))
        self.count = length - self.first

    def take_tokens(self, keep: Tensor, pack: Pack) -> Tensor:
        """The cache keeps the tokens at `keep` [B, Hkv, N] int64, ascending; returns those that are packed then.

        As many stay whole as are left in every row and head. Where one has more left than another `pack` is given all,
        to be stored where they would be stored anyway.
        """
        stays = int((keep >= self.first).sum(-1).min()) if keep.numel() else 0
        packed, whole = keep[..., : keep.shape[2] - stays], keep[..., keep.shape[2] - stays :] - self.first
        for name, held in self._rooms.items():
            view = self.view(name)
            if stays < self.count:
                pack(name, view, self.first)
            held[:, :, :stays] = view.gather(2, whole.unsqueeze(-1).expand(-1, -1, -1, held.shape[3]))
        self.first = self._start = packed.shape[2]
        self.count = stays
        return packed

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held."""
        for name, held in self._rooms.items():
            self._rooms[name] = held.index_select(0, rows.to(held.device))


def packed_of(length: int) -> int:
    """How many of so many tokens are packed."""
    return max(0, length - LEAST) // TOGETHER * TOGETHER


def newest_bytes(dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one row's and head's newest tokens, room for those to come included."""
    return ROOM * (dim + value_dim) * dtype.itemsize
