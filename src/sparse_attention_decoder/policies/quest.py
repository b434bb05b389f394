"""Quest: bound what any key of a page can score from its per-channel extremes, read the best pages."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels, Packed, plain, settled
from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.selection import Rows, Selection

PAGE = 16


class PageBounds:
    """Smallest and largest key per channel of every page of 16 tokens, [B, Hkv, P, D] each.

    Pages count each row's own tokens, padding left out, so a padded row has the pages it would
    have alone.
    """

    def __init__(self) -> None:
        self.length = 0
        self._rows: Rows | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def catch_up(self, keys: Tensor | Packed, rows: Rows, needed: int) -> None:
        """Cover all keys [B, Hkv, T, D]; only those not yet seen are read."""
        total = keys.shape[2]
        if self._rows is not None and not rows.same_past(self._rows, self.length):
            self.length = 0
        self._rows = rows
        if self.length == total:
            return
        pages = -(-total // PAGE)
        if self.low is None or self.high is None or self.length == 0:
            self.low = torch.full((*keys.shape[:2], 0, keys.shape[3]), math.inf, dtype=keys.dtype, device=keys.device)
            self.high = -self.low
            self.length = 0
        if pages > self.low.shape[2]:
            room = pages + pages // 2 - self.low.shape[2]
            fresh = self.low.new_full((*keys.shape[:2], room, keys.shape[3]), math.inf)
            self.low, self.high = torch.cat([self.low, fresh], 2), torch.cat([self.high, -fresh], 2)
        page = page_of(rows, keys.shape[0], keys.device)[:, None, self.length :, None]
        new = plain(settled(keys[:, :, self.length :]))
        where = page.expand_as(new)
        low, high = new, new
        if rows.valid is not None:
            padding = ~rows.valid[:, None, self.length :, None]
            low, high = new.masked_fill(padding, math.inf), new.masked_fill(padding, -math.inf)
        self.low.scatter_reduce_(2, where, low, "amin")
        self.high.scatter_reduce_(2, where, high, "amax")
        self.length = total

    def truncate(self, length: int) -> None:
        """Forget everything: a bound cannot be narrowed, so the next `catch_up` starts over."""
        if length < self.length:
            self.length = 0

    @torch.inference_mode(False)
    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` held."""
        if self.low is not None and self.high is not None:
            rows = rows.to(self.low.device)
            self._rows = None if self._rows is None else self._rows.take(rows)
            self.low, self.high = self.low.index_select(0, rows), self.high.index_select(0, rows)


class QuestPolicy(Policy):
    """Page min/max bounds (Quest, arXiv:2406.10774), pages of 16, top_k tokens as top_k/16 pages.

    Bounds become shares of attention as the sketch's scores do (mean over the group's softmax),
    which was the better variant in the study. Whole pages are read, so top_k rounds up to pages.
    """

    reads_everything: ClassVar[bool] = False

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> PageBounds:
        """Bounds without a page."""
        return PageBounds()

    @staticmethod
    def select(step: Step) -> Selection:
        """Bound the pages that hold middle tokens, read the best."""
        keys, regions, bounds = step.buffer.keys, step.regions, step.index
        bounds.catch_up(keys, step.rows, regions.high)
        batch, heads, total, dim = keys.shape
        page = page_of(step.rows, batch, keys.device)[:, regions.low : regions.high]
        middle = regions.middle if regions.middle is not None else torch.ones_like(page, dtype=torch.bool)
        pages = -(-total // PAGE)
        # a page may be read for its middle tokens only: sinks and window are read anyway
        size = torch.zeros(batch, pages, dtype=torch.int64, device=keys.device).scatter_add_(1, page, middle.long())
        candidates = size > 0
        query = step.query.reshape(batch, heads, -1, 1, dim)
        bound = torch.maximum(query * bounds.low[:, :, None, :pages], query * bounds.high[:, :, None, :pages]).sum(-1)
        bound = (bound.float() * step.scaling).masked_fill(~candidates[:, None, None], -math.inf)
        share = bound.softmax(-1).mean(2).masked_fill(~candidates[:, None], -1.0)
        best = share.sort(dim=-1, descending=True)
        held = size[:, None].expand_as(share).gather(-1, best.indices)
        # best pages first, until they hold top_k middle tokens
        wanted = (held.cumsum(-1) - held < step.config.top_k) & (held > 0)
        read = torch.zeros_like(share, dtype=torch.bool).scatter_(-1, best.indices, wanted)
        chosen = read.gather(-1, page[:, None].expand(-1, heads, -1)) & middle[:, None]
        counts = chosen.sum(-1)
        tokens = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())] + regions.low
        index_bytes = 2 * dim * keys.dtype.itemsize * heads * int(candidates.sum())
        return Selection(tokens, counts, None, index_bytes)


def page_of(rows: Rows, batch: int, device: torch.device) -> Tensor:
    """[B, T] int64, the page each token of a row falls into; padding falls into a neighbour's."""
    if rows.valid is None:
        return (torch.arange(rows.length, device=device) // PAGE).expand(batch, -1)
    return ((rows.valid.cumsum(-1) - 1).clamp_min(0) // PAGE).to(device)
