"""Which tokens a cache that evicts would still hold."""

import torch
from torch import Tensor

from sparse_attention_decoder.kernels import Packed
from sparse_attention_decoder.selection import Regions, Rows, Selection


class Survivors:
    """A mask over one layer's tokens: held until thrown away, and then gone for good.

    Unlike other indexes it is no function of the keys: it depends on when was chosen, and going back to
    fewer tokens brings none back.

    turn: length of the cache at the end of the prompt or turn for which was last chosen; 0 before any.
    """

    def __init__(self) -> None:
        self.turn = 0
        self._held: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """[B, Hkv, T] bool, True for tokens not thrown away; up to date after `catch_up`."""
        assert self._held is not None
        return self._held

    def catch_up(self, keys: Tensor | Packed, rows: Rows, needed: int) -> None:
        """Hold the tokens that are new among keys [B, Hkv, T, D]."""
        if self._held is None:
            self._held = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
        elif self._held.shape[2] < keys.shape[2]:
            self._held = torch.nn.functional.pad(self._held, (0, keys.shape[2] - self._held.shape[2]), value=True)

    def keep_best(self, scores: Tensor, regions: Regions, count: int) -> None:
        """Of the middle's tokens still held, keep the `count` best of each KV head.

        Args:
            scores: [B, Hkv, M] of positions low..low+M-1; of equal ones the first in the text are kept.
        """
        held = self.held[..., regions.low : regions.high]
        rivals = held if regions.middle is None else held & regions.middle[:, None]
        order = scores.masked_fill(~rivals, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        lost = torch.zeros_like(held).scatter(-1, order[..., count:], True) & rivals
        kept = [self.held[..., : regions.low], held & ~lost, self.held[..., regions.high :]]
        self._held = torch.cat(kept, -1)

    def selection(self, regions: Regions, bytes_per_token: int = 0) -> Selection:
        """The middle's tokens that are still held; index bytes are counted for each of them."""
        chosen = self.held[..., regions.low : regions.high]
        if regions.middle is not None:
            chosen = chosen & regions.middle[:, None]
        counts = chosen.sum(-1)
        # a stable sort of "chosen first" lists the chosen positions in order
        tokens = chosen.byte().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
        return Selection(tokens + regions.low, counts, None, bytes_per_token * int(counts.sum()))

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""
        if self._held is not None:
            self._held = self._held[..., :length]
        if length < self.turn:
            self.turn = 0

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held."""
        if self._held is not None:
            self._held = self._held.index_select(0, rows.to(self._held.device))
