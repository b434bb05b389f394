"""The mean value of one layer's tokens: what those that a step leaves unread stand for."""

import torch
from torch import Tensor

from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.kernels import Packed
from sparse_attention_decoder.kernels.rotation import unrotate
from sparse_attention_decoder.selection import Rows

# packed values that are unpacked at a time
_PIECE = 1024


class FarField:
    """Adds to a step's output what the tokens left unread would have added, were their values all the mean one.

    strength: how much of that, from 0 to 1. The fewer tokens are read, the more those left unread are like those read
        and the less like the mean.

    Each row's mean is taken of its first `fit_length(n)` of n tokens, sinks left out, as a sketch's statistics are:
    a function of the row's values and length alone, however they got there.
    """

    def __init__(self, sinks: int, strength: float = 1.0) -> None:
        self._sinks, self._strength = sinks, strength
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._mean: Tensor | None = None
        # per row: tokens the mean was taken of, and the cached length that those tokens reach
        self._fitted: list[int] = []
        self._reach: list[int] = []
        self._rows: Rows | None = None

    def truncate(self, length: int) -> None:
        """Forget what was made of tokens from `length` on."""
        for row, reach in enumerate(self._reach):
            if reach > length:
                self._fitted[row], self._reach[row] = -1, 0

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` held."""
        if self._mean is not None:
            self._mean = self._mean.index_select(0, rows.to(self._mean.device))
            self._fitted = [self._fitted[row] for row in rows.tolist()]
            self._reach = [self._reach[row] for row in rows.tolist()]
            self._rows = None if self._rows is None else self._rows.take(rows)

    def add(self, output: Tensor, missing: Tensor, values: Tensor | Packed, rows: Rows) -> Tensor:
        """The output with the far field in it.

        Args:
            output: [B, Hq, Dv], attention over the tokens read alone.
            missing: [B, Hq], each head's estimated share of attention on the others.
            values: [B, Hkv, T, Dv], the layer's.
            rows: which of them exist.
        """
        mean = self._mean_of(values, rows)
        heads = output.unflatten(1, (mean.shape[1], -1))
        share = self._strength * missing.view(*heads.shape[:3], 1).to(mean.dtype)
        return torch.lerp(heads.to(mean.dtype), mean.unsqueeze(2), share).flatten(1, 2).to(output.dtype)

    def _mean_of(self, values: Tensor | Packed, rows: Rows) -> Tensor:
        if self._rows is not None and not rows.same_past(self._rows, max(self._reach)):
            # a token that the mean was taken of has been masked since
            self._fitted = [-1] * len(self._fitted)
        self._rows = rows
        targets = [fit_length(count) for count in rows.counts]
        if self._mean is None or targets != self._fitted:
            self._mean = self._refitted(values, rows, targets)
        return self._mean

    @torch.inference_mode(False)
    @torch.no_grad()
    def _refitted(self, values: Tensor | Packed, rows: Rows, targets: list[int]) -> Tensor:
        if self._mean is None:
            batch, heads, _, dim = values.shape
            self._mean = torch.zeros(batch, heads, dim, dtype=_work(values), device=values.device)
            self._fitted, self._reach = [-1] * batch, [0] * batch
        for row, target in enumerate(targets):
            if self._fitted[row] != target:
                self._fit_row(row, values, rows, target)
        return self._mean

    def _fit_row(self, row: int, values: Tensor | Packed, rows: Rows, tokens: int) -> None:
        assert self._mean is not None
        if rows.valid is None:
            own, reach = values[row, :, self._sinks : tokens], tokens
        else:
            real = rows.valid[row].nonzero().squeeze(-1)
            reach = int(real[tokens - 1]) + 1 if tokens else 0
            own = values[row].index_select(1, real[self._sinks : tokens])
        self._mean[row] = _mean(own)
        self._fitted[row], self._reach[row] = tokens, reach


def _work(values: Tensor | Packed) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _mean(values: Tensor | Packed) -> Tensor:
    """Mean [Hkv, Dv] of values [Hkv, N, Dv]; 0 where there are none."""
    count = max(1, values.shape[1])
    if isinstance(values, Tensor):
        return values.sum(1, dtype=_work(values)) / count
    # a piece at a time, so that there is never a float copy of the whole cache
    pieces = [
        values[:, start : start + _PIECE].settled().rotated().sum(1) for start in range(0, values.shape[1], _PIECE)
    ]
    return unrotate(torch.stack(pieces).sum(0)) / count if pieces else torch.zeros(values.shape[0], values.shape[2])
