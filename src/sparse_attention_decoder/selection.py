"""What may be read and what was chosen: Rows, Regions, Selection, Reads, Held. Data only."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError


@dataclass(frozen=True)
class Regions:
    """The cached tokens of each row, split into near (sinks and window) and middle.

    near: [B, N] int64, positions that are always read.
    near_valid: [B, N] bool, or None where every entry counts.
    low, high: the middle lies in positions low..high-1; empty when high <= low.
    middle: [B, high - low] bool, or None where all of low..high-1 is middle in every row.
    middle_counts: middle tokens of each row.
    """

    near: Tensor
    near_valid: Tensor | None
    low: int
    high: int
    middle: Tensor | None
    middle_counts: tuple[int, ...]

    def with_chosen(self, selection: "Selection") -> tuple[Tensor, Tensor | None]:
        """Positions [B, Hkv, N] of sinks, window and selection, and which of them count (None: all)."""
        near = self.near[:, None].expand(-1, selection.tokens.shape[1], -1)
        tokens = torch.cat([near, selection.tokens], dim=-1)
        if self.near_valid is None and bool((selection.counts == selection.tokens.shape[-1]).all()):
            return tokens, None
        near_valid = torch.ones_like(near, dtype=torch.bool)
        if self.near_valid is not None:
            near_valid = self.near_valid[:, None].expand_as(near)
        return tokens, torch.cat([near_valid, selection.chosen], dim=-1)


@dataclass(frozen=True)
class Rows:
    """Which cached tokens exist for each row of the batch.

    length: T, cached positions, padding included.
    counts: real tokens of each row.
    valid: [B, T] bool, False for padding; None when nothing is padding.
    """

    length: int
    counts: tuple[int, ...]
    valid: Tensor | None = None
    _regions: dict[tuple[int, int], Regions] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def full(cls, batch: int, length: int) -> "Rows":
        """Rows without padding."""
        return _full_rows(batch, length)

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Rows":
        """Rows from a [B, T] bool mask, True for real tokens.

        Raises:
            ShapeError: not a 2-D bool tensor.
        """
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ShapeError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool [B, T]")
        counts = tuple(mask.sum(-1).tolist())
        if min(counts) == mask.shape[1]:
            return cls(mask.shape[1], counts)
        return cls(mask.shape[1], counts, mask)

    def take(self, rows: Tensor) -> "Rows":
        """The rows that `rows` [B'] int64 names, in that order."""
        valid = None if self.valid is None else self.valid.index_select(0, rows.to(self.valid.device))
        return Rows(self.length, tuple(self.counts[row] for row in rows.tolist()), valid)

    def same_past(self, earlier: "Rows", length: int) -> bool:
        """Whether the first `length` positions hold the same real tokens as they did earlier."""
        if self.valid is None and earlier.valid is None:
            return True
        now, then = (
            torch.ones(1, length, dtype=torch.bool) if rows.valid is None else rows.valid[:, :length].cpu()
            for rows in (self, earlier)
        )
        return bool((now == then).all())

    def regions(self, sinks: int, window: int, device: torch.device) -> Regions:
        """Split each row into its first `sinks`, its last `window` and what lies between."""
        if self.valid is None:
            return _full_regions(len(self.counts), self.length, sinks, window, device)
        key = (sinks, window)
        if key not in self._regions:
            self._regions[key] = self._masked_regions(self.valid, sinks, window)
        return self._regions[key]

    def _masked_regions(self, valid: Tensor, sinks: int, window: int) -> Regions:
        rank = valid.cumsum(-1)
        counts = rank[:, -1:]
        is_near = valid & ((rank <= sinks) | (rank > counts - window))
        is_middle = valid & ~is_near
        width = int(is_near.sum(-1).max())
        # a stable sort of "near first" lists the near positions of each row in order
        near = is_near.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
        near_valid = is_near.gather(-1, near)
        columns = is_middle.any(0).nonzero()
        low = int(columns[0]) if len(columns) else 0
        high = int(columns[-1]) + 1 if len(columns) else 0
        middle = is_middle[:, low:high]
        return Regions(near, near_valid, low, high, middle, tuple(middle.sum(-1).tolist()))


# every layer of a step asks the same two questions
@lru_cache(maxsize=4)
def _full_rows(batch: int, length: int) -> Rows:
    return Rows(length, (length,) * batch)


@lru_cache(maxsize=4)
def _full_regions(batch: int, length: int, sinks: int, window: int, device: torch.device) -> Regions:
    low = min(sinks, length)
    high = max(low, length - window)
    near = torch.cat([torch.arange(low, device=device), torch.arange(high, length, device=device)])
    return Regions(near.expand(batch, -1), None, low, high, None, (high - low,) * batch)


@dataclass(frozen=True)
class Selection:
    """The tokens a policy chose from the middle, per row and KV head.

    tokens: [B, Hkv, K] int64 positions, unique within a head; entries from counts on are filler.
    counts: [B, Hkv] int64, how many of them are chosen.
    missing_mass: [B, Hkv] float32, estimated share of the attention (mean over the query heads)
        on tokens left unread; no bound, and as the sketch sees it, biased low. None where no policy estimates.
    index_bytes: bytes read from the index, all rows and heads, to choose them.
    log_weights: [B, Hkv, K] float32, what is added to the logits of chosen tokens that stand for others too, 0 for the
        rest; None where all stand for themselves.
    head_missing: [B, Hq] float32, the missing mass of each query head; None where no backend gives it.
    """

    tokens: Tensor
    counts: Tensor
    missing_mass: Tensor | None = None
    index_bytes: int = 0
    log_weights: Tensor | None = None
    head_missing: Tensor | None = None

    @property
    def chosen(self) -> Tensor:
        """[B, Hkv, K] bool, True where an entry of `tokens` is chosen."""
        return torch.arange(self.tokens.shape[-1], device=self.tokens.device) < self.counts.unsqueeze(-1)

    def weigh(self, logits: Tensor) -> Tensor:
        """Logits [B, Hkv, G, N] of sinks, window and the chosen tokens in that order, with log_weights added."""
        if self.log_weights is None:
            return logits
        near = logits.shape[-1] - self.tokens.shape[-1]
        return logits + torch.nn.functional.pad(self.log_weights, (near, 0)).unsqueeze(2)

    @classmethod
    def empty(cls, batch: int, kv_heads: int, device: torch.device) -> "Selection":
        """Nothing chosen: only sinks and window will be read."""
        return cls(
            torch.zeros(batch, kv_heads, 0, dtype=torch.int64, device=device),
            torch.zeros(batch, kv_heads, dtype=torch.int64, device=device),
        )


@dataclass
class Reads:
    """What the decode steps of one layer read, added up. Bytes of keys, values and index.

    bytes_read: as they are kept, packed or not; bytes_dense: what dense attention over a cache in the model's own
        dtype would have read, so that `share_read` shows what packing saves too.
    steps: decode steps, sparse_steps of which chose tokens; the others read everything.
    tokens_read, tokens_cached: summed over steps, rows and KV heads.
    missing_mass: sum over sparse steps of the mean missing mass that is estimated, before audits correct it.
    audit_bytes: of keys read beside all that, to audit the estimate.
    """

    steps: int = 0
    sparse_steps: int = 0
    tokens_read: int = 0
    tokens_cached: int = 0
    bytes_read: int = 0
    index_bytes: int = 0
    bytes_dense: int = 0
    missing_mass: float = 0.0
    audit_bytes: int = 0

    def add(self, other: "Reads") -> None:
        """Add another count to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def share_read(self) -> float:
        """Bytes read, index and audits included, over those dense attention would have read; 1.0 before any step."""
        return (self.bytes_read + self.index_bytes + self.audit_bytes) / self.bytes_dense if self.bytes_dense else 1.0


@dataclass(frozen=True)
class Held:
    """What a cache holds.

    tokens_seen, tokens_held, tokens_evicted: of each row, layer and KV head; the latter two add up to the first.
    tokens_demoted: how often a token already held had to be kept in fewer bits, of each row, layer and KV head.
    bytes_now, bytes_most: of keys, values and sketch of all layers and rows, room for tokens to come included; now,
        and at most since the cache was empty (the chunk of a prompt that was just read included).
    kept_as: what each layer keeps a channel in now, such as "float32" or "int8".
    """

    tokens_seen: int
    tokens_held: int
    tokens_demoted: int
    tokens_evicted: int
    bytes_now: int
    bytes_most: int
    kept_as: tuple[str, ...]
