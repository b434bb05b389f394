"""The 2-bit sketch of one layer's keys: codes, factors and the statistics they were coded with."""

from functools import lru_cache

import torch
from torch import Tensor

from sparse_attention_decoder.errors import NonFiniteError, ShapeError
from sparse_attention_decoder.kernels import BLOCK, Coded, Kernels, Packed, Statistics
from sparse_attention_decoder.selection import Rows


class Sketch:
    """Codes and factors of the first `length` tokens, kept in step with the keys.

    Each row's statistics are fitted on its first `fit_length(n)` of n tokens, sinks left out, and
    fitted anew whenever that number changes, that is, whenever the context has grown by a quarter.
    The fit depends on the row's length alone, not on how it got there, so appending one by one,
    appending at once and truncating back all leave the same codes. Packed keys are fitted and coded
    as they are stored or, while they are whole, will be, never as they came, for the same reason.

    limit: tokens beyond which it does not grow ahead of need; None for none.
    """

    def __init__(self, kernels: Kernels, sinks: int) -> None:
        self.limit: int | None = None
        self._kernels = kernels
        self._sinks = sinks
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        # per row: tokens the statistics were fitted on, and the cached length that those tokens reach
        self._fitted: list[int] = []
        self._reach: list[int] = []
        self._rows: Rows | None = None
        self._coded: Coded | None = None

    @property
    def coded(self) -> Coded:
        """Codes, factors and statistics; those of the first `length` tokens are valid after `catch_up`."""
        assert self._coded is not None
        return self._coded

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room for tokens to come included."""
        if self._coded is None:
            return 0
        statistics = self._coded.statistics
        parts = (self._coded.codes, self._coded.factors, statistics.mean, statistics.deviation)
        return sum(part.nbytes for part in parts)

    def covers(self, high: int, fitted: int) -> bool:
        """Whether the first `high` tokens are coded, with statistics fitted on the first `fitted` of each row."""
        return self.length >= high and all(count == fitted for count in self._fitted)

    def catch_up(self, keys: Tensor | Packed, rows: Rows, needed: int) -> None:
        """Cover at least the first `needed` of the keys [B, Hkv, T, D].

        Window tokens are never scored, so new keys are coded a windowful at a time: when the first
        of them has left the window, everything held by then is coded.

        Raises:
            NonFiniteError: a key to be coded holds NaN or infinity.
        """
        if self._rows is not None and not rows.same_past(self._rows, max(self._reach)):
            # a token that was fitted on has been masked since, as the padding behind a finished row is
            self._fitted = [-1] * len(self._fitted)
        self._rows = rows
        targets = [fit_length(count) for count in rows.counts]
        if self.length < needed or targets != self._fitted:
            self._recode(keys, rows, targets)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _recode(self, keys: Tensor | Packed, rows: Rows, targets: list[int]) -> None:
        if self._coded is None:
            self._allocate(keys)
        stale = [row for row, target in enumerate(targets) if self._fitted[row] != target]
        if stale:
            # first: if fitting breaks off, no code counts that other statistics made
            self.length = 0
        for row in stale:
            self._fit_row(row, keys, rows, targets[row])
        self._encode(keys, rows)

    def truncate(self, length: int) -> None:
        """Forget what was read off tokens from `length` on: codes, and statistics fitted on any of them."""
        self.length = min(self.length, length)
        for row, reach in enumerate(self._reach):
            if reach > length:
                self._fitted[row], self._reach[row] = -1, 0

    def tensors(self, spare: int) -> dict[str, tuple[Tensor, int]]:
        """What was coded, by name, and how many rows of axis 2 `spare` more tokens will take."""
        held, blocks, more = self.coded, -(-self.length // BLOCK), -(-spare // BLOCK)
        # the last block may hold tokens that were truncated since: they are nobody's to read
        held.codes[:, :, blocks - 1, :, (self.length - 1) % BLOCK + 1 :] = 0
        held.factors[:, :, self.length :] = 0
        codes, factors = held.codes[:, :, :blocks], held.factors[:, :, : blocks * BLOCK]
        moments = {"mean": (held.statistics.mean, 0), "deviation": (held.statistics.deviation, 0)}
        return {"codes": (codes, more), "factors": (factors, more * BLOCK), **moments}

    def adopt(self, tensors: dict[str, Tensor], keys: Tensor | Packed) -> None:
        """Take over the sketch of all these keys [B, Hkv, T, D] as `tensors` gave it: nothing is coded again.

        Raises:
            ShapeError: it does not fit the keys. None of them may be padding.
        """
        self._allocate(keys)
        fresh, statistics = self.coded, Statistics(tensors["mean"], tensors["deviation"])
        given = Coded(tensors["codes"], tensors["factors"], statistics)
        room, tokens = given.codes.shape[2] * BLOCK, keys.shape[2]
        fits = statistics.mean.shape == statistics.deviation.shape == fresh.statistics.mean.shape
        fits = fits and statistics.mean.dtype == statistics.deviation.dtype == fresh.statistics.mean.dtype
        for held, like in ((given.codes, fresh.codes), (given.factors, fresh.factors)):
            fits = fits and held.dtype == like.dtype and held[:, :, :0].shape == like[:, :, :0].shape
        if not fits or not tokens <= given.factors.shape[2] == room:
            shapes = {name: tuple(held.shape) for name, held in tensors.items()}
            raise ShapeError(f"a sketch of {shapes} does not fit keys {tuple(keys.shape)}")
        rows, fitted = keys.shape[0], fit_length(tokens)
        self._coded, self._rows, self.length = given, Rows.full(rows, tokens), tokens
        self._fitted, self._reach = [fitted] * rows, [fitted] * rows

    @torch.inference_mode(False)
    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` held."""
        if self._coded is None:
            return
        held = self._coded
        rows = rows.to(held.codes.device)
        self._fitted = [self._fitted[row] for row in rows.tolist()]
        self._reach = [self._reach[row] for row in rows.tolist()]
        self._rows = None if self._rows is None else self._rows.take(rows)
        mean, deviation = held.statistics.mean.index_select(0, rows), held.statistics.deviation.index_select(0, rows)
        self._coded = Coded(
            held.codes.index_select(0, rows), held.factors.index_select(0, rows), Statistics(mean, deviation)
        )

    def _allocate(self, keys: Tensor | Packed) -> None:
        batch, heads, tokens, dim = keys.shape
        work = torch.float64 if keys.dtype == torch.float64 else torch.float32
        mean = torch.zeros(batch, heads, dim, dtype=work, device=keys.device)
        self._coded = Coded.room(self._room(tokens), Statistics(mean, torch.ones_like(mean)))
        self._fitted, self._reach = [-1] * batch, [0] * batch

    def _room(self, tokens: int) -> int:
        more = tokens + tokens // 2
        return more if self.limit is None else max(tokens, min(more, self.limit))

    def _fit_row(self, row: int, keys: Tensor | Packed, rows: Rows, tokens: int) -> None:
        if rows.valid is None:
            own, reach = keys[row, :, self._sinks : tokens], tokens
        else:
            real = rows.valid[row].nonzero().squeeze(-1)
            reach = int(real[tokens - 1]) + 1 if tokens else 0
            own = keys[row].index_select(1, real[self._sinks : tokens])
        mean, deviation = self._kernels.fit(own)
        _require_finite(mean)
        statistics = self.coded.statistics
        statistics.mean[row], statistics.deviation[row] = mean, deviation
        self._fitted[row], self._reach[row] = tokens, reach

    def _encode(self, keys: Tensor | Packed, rows: Rows) -> None:
        total, coded = keys.shape[2], self.coded
        if total > coded.factors.shape[2]:
            coded = Coded.room(self._room(total), coded.statistics)
            blocks = self.coded.codes.shape[2]
            coded.codes[:, :, :blocks] = self.coded.codes
            coded.factors[:, :, : self.coded.factors.shape[2]] = self.coded.factors
            self._coded = coded
        self._kernels.encode(keys[:, :, self.length :], coded, self.length)
        new = coded.factors[:, :, self.length : total]
        _require_finite(new if rows.valid is None else new.masked_fill(~rows.valid[:, None, self.length :], 0))
        self.length = total


# every layer of a step asks the same question
@lru_cache(maxsize=64)
def fit_length(tokens: int) -> int:
    """How many of a row's first tokens its statistics are fitted on: the largest step of 5/4 within."""
    fitted = 0
    step = 8
    while step <= tokens:
        fitted = step
        step += step // 4
    return fitted


def _require_finite(numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        raise NonFiniteError(
            "cached keys hold NaN or infinity; check the model's weights and its dtype "
            "(float16 overflows where bfloat16 does not)"
        )
