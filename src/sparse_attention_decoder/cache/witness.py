"""What the prompt's queries attended to. Some policies choose by it, and it is gone once the prompt is read."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_attention_decoder.errors import UnsupportedError
from sparse_attention_decoder.kernels import Packed, plain
from sparse_attention_decoder.kernels.rotation import work_dtype
from sparse_attention_decoder.selection import Rows

# queries kept of the end of a prompt: SnapKV's observation window
OBSERVED = 32
# logits held at a time: 64 MB in float32, however long the prompt
_MOST_LOGITS = 1 << 24


@dataclass(frozen=True)
class Observation:
    """The last queries of the newest prompt or turn, at most `OBSERVED` real ones of each row.

    queries: [B, Hq, W, D], after RoPE, not scaled.
    positions: [B, W] int64, where they stand in the cache; real: [B, W] bool, which of them count.
    rows: the rows when the last of them was read, so rows.length is where the prompt ended.
    scaling: what logits are multiplied by.
    """

    queries: Tensor
    positions: Tensor
    real: Tensor
    rows: Rows
    scaling: float

    def attention(self, keys: Tensor | Packed) -> Tensor:
        """What each of the prompt's tokens got of their attention, summed over these queries.

        Args:
            keys: [B, Hkv, T, D], the prompt's first.
        Returns:
            [B, Hq, P] float32 (float64 for float64), P tokens up to the prompt's end.
        """
        length, heads = self.rows.length, keys.shape[1]
        work = work_dtype(self.queries)
        received = torch.zeros(*self.queries.shape[:2], length, dtype=work, device=keys.device)
        group = self.queries.shape[1] // heads
        block = max(1, _MOST_LOGITS // (keys.shape[0] * group * length))
        key_at = torch.arange(length, device=keys.device)
        for head in range(heads):
            own = plain(keys[:, head, None, :length]).to(received.dtype).transpose(-1, -2)
            of_group = slice(head * group, (head + 1) * group)
            for start in range(0, self.positions.shape[1], block):
                some = slice(start, start + block)
                at = self.positions[:, some]
                # keys behind the newest of these queries are not seen by any of them
                reach = int(at.max()) + 1
                hidden = key_at[:reach] > at[..., None]
                if self.rows.valid is not None:
                    hidden = hidden | ~self.rows.valid[:, None, :reach].to(keys.device)
                logits = self.scaling * (self.queries[:, of_group, some].to(own.dtype) @ own[..., :reach])
                weights = logits.masked_fill_(hidden[:, None], -torch.inf).softmax(-1)
                # a query that is padding may see nothing at all, which gives NaN
                weights = weights.masked_fill_(~self.real[:, None, some, None], 0)
                received[:, of_group, :reach] += weights.sum(2)
        return received

    def newest(self) -> "Observation":
        """Of each row the last `OBSERVED` queries that are real."""
        # a stable sort of "real last" lists the real queries of each row in order
        order = self.real.int().argsort(dim=-1, stable=True)[:, -OBSERVED:]
        where = order[:, None, :, None].expand(-1, self.queries.shape[1], -1, self.queries.shape[3])
        return replace(
            self,
            queries=self.queries.gather(2, where),
            positions=self.positions.gather(1, order),
            real=self.real.gather(1, order),
        )

    def behind(self, earlier: "Observation") -> "Observation":
        """Both, as one: this one goes on where the earlier ended."""
        return replace(
            self,
            queries=torch.cat([earlier.queries, self.queries], 2),
            positions=torch.cat([earlier.positions, self.positions], 1),
            real=torch.cat([earlier.real, self.real], 1),
        )

    def cut(self, length: int) -> "Observation | None":
        """What is left of it in the first `length` tokens; None where a row has no query left."""
        if length >= self.rows.length:
            return self
        real = self.real & (self.positions < length)
        if not bool(real.any(-1).all()):
            return None
        batch, valid = len(self.rows.counts), self.rows.valid
        rows = Rows.full(batch, length) if valid is None else Rows.from_mask(valid[:, :length])
        return replace(self, real=real, rows=rows)

    def take(self, rows: Tensor) -> "Observation":
        """The rows that `rows` [B'] int64 names, in that order."""
        queries, positions, real = (held.index_select(0, rows) for held in (self.queries, self.positions, self.real))
        return Observation(queries, positions, real, self.rows.take(rows), self.scaling)


class Witness:
    """Sees the queries of one layer that were attended densely, and keeps what policies choose by.

    The last queries of the prompt cost next to nothing and are always kept. How much attention each
    token received from all queries is a second pass over the prompt, quadratic in its length like
    attention itself: it is added up only where `adds_up` says so.
    Tensors are replaced, never written to, so that a shallow copy goes its own way.
    """

    def __init__(self, adds_up: bool = False) -> None:
        self.adds_up = adds_up
        self.reset()

    def reset(self) -> None:
        """Forget everything but what is to be kept."""
        # tokens whose queries have all been added up
        self._length = 0
        self._observation: Observation | None = None
        self._received: Tensor | None = None

    @property
    def observation(self) -> Observation:
        """The end of the newest prompt or turn.

        Raises:
            UnsupportedError: no query of it was seen.
        """
        if self._observation is None:
            raise UnsupportedError(_missing("the queries at the end of the prompt were not seen"))
        return self._observation

    def received(self, length: int) -> Tensor:
        """The attention each of `length` tokens received from all queries before the newest one's.

        Returns:
            [B, Hkv, length] float32 (float64 for float64), mean over the query heads of a KV head.
        Raises:
            UnsupportedError: not every query was seen.
        """
        if self._received is None or self._length < length - 1:
            raise UnsupportedError(_missing("the attention of all queries so far was not added up"))
        return torch.nn.functional.pad(self._received, (0, length - self._received.shape[2]))

    @torch.no_grad()
    def see(self, queries: Tensor, keys: Tensor | Packed, rows: Rows, scaling: float) -> None:
        """Queries that were attended densely: a prompt, a chunk of one, a turn, or a single step.

        Args:
            queries: [B, Hq, N, D], after RoPE, not scaled, of the newest N tokens.
            keys: [B, Hkv, T, D], theirs included; each query sees those up to its own.
            rows: which of the T tokens exist.
            scaling: what logits are multiplied by.
        Several queries at once, or the very first, are a prompt; a single one is a decode step.
        """
        past = rows.length - queries.shape[2]
        positions = torch.arange(past, rows.length, device=queries.device).expand(queries.shape[0], -1)
        real = torch.ones_like(positions, dtype=torch.bool)
        if rows.valid is not None:
            real = rows.valid[:, past:].to(queries.device)
        seen = Observation(queries.detach(), positions, real, rows, scaling)
        if self.adds_up:
            grouped = seen.attention(keys).unflatten(1, (keys.shape[1], -1))
            self._add(grouped.mean(2), past, rows.length)
        if queries.shape[2] > 1 or past == 0:
            earlier = self._observation
            if earlier is not None and earlier.rows.length == past:
                seen = seen.behind(earlier)
            self._observation = seen.newest()

    @torch.no_grad()
    def add(self, tokens: Tensor, attention: Tensor, length: int) -> None:
        """A decode step of a cache of `length` tokens gave `tokens` [B, Hkv, N] so much `attention` [B, Hkv, N]."""
        whole = attention.new_zeros(*tokens.shape[:2], length)
        self._add(whole.scatter_add(-1, tokens, attention), length - 1, length)

    def _add(self, attention: Tensor, past: int, length: int) -> None:
        if past == 0:
            self._received = attention
        elif self._received is None or self._length < past:
            # queries in between were missed, so the sum is not the sum any more
            self._received = None
        else:
            self._received = attention + torch.nn.functional.pad(self._received, (0, length - self._received.shape[2]))
        self._length = length

    def truncate(self, length: int) -> None:
        """Keep what does not depend on tokens from `length` on; a sum that does is dropped."""
        if self._observation is not None:
            self._observation = self._observation.cut(length)
        if length < self._length:
            self._length, self._received = 0, None

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held."""
        if self._observation is not None:
            self._observation = self._observation.take(rows.to(self._observation.queries.device))
        if self._received is not None:
            self._received = self._received.index_select(0, rows.to(self._received.device))


def _missing(what: str) -> str:
    return (
        f"{what}, and this policy chooses by it; read the whole prompt anew under this policy, "
        "or under any other after SparseCache.watch([its name])"
    )
