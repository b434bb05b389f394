"""Shares of attention, and which tokens to read by them, in plain PyTorch."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from sparse_attention_decoder.selection import Selection


def sample_tail(shares: Tensor, selection: Selection, low: int, cell: float) -> Selection:
    """What was chosen, and of the rest one token for every `cell` of attention, which stands for that much.

    Shares of the rest are added up in the order of the text; the token with which the sum passes half a cell, one and a
    half, and so on is read. The logarithm of cell over its share is added to its logits: expected over where cells
    begin, sums over tokens come out as if all had been read (systematic sampling), whatever the sketch's error.

    Args:
        shares: [B, Hkv, M], estimated, of positions low..low+M-1, 0 for those that may not be chosen.
        selection: holds every token whose share is above the cell.
    Returns:
        Selection in the order of the text, with log_weights; its missing mass is that of tokens not read.
    """
    places = (selection.tokens - low).clamp_min(0)
    # added, not set: filler may repeat a position that counts
    chosen = torch.zeros(shares.shape, dtype=torch.int32, device=shares.device)
    chosen = chosen.scatter_add_(-1, places, selection.chosen.int()) > 0
    rest = shares.masked_fill(chosen, 0)
    passed = (rest.double().cumsum(-1) / cell - 0.5).ceil().clamp_min(0)
    taken = torch.diff(passed, dim=-1, prepend=torch.zeros_like(passed[..., :1])) > 0
    read = chosen | (taken & (rest > 0))
    counts = read.sum(-1)
    best = read.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
    weights = (cell / rest.clamp_min(torch.finfo(rest.dtype).tiny)).log().masked_fill(chosen, 0).gather(-1, best)
    counted = torch.arange(best.shape[-1], device=best.device) < counts.unsqueeze(-1)
    return replace(
        selection,
        tokens=best.masked_fill(~counted, 0) + low,
        counts=counts,
        missing_mass=rest.masked_fill(read, 0).sum(-1),
        log_weights=weights.masked_fill(~counted, 0),
    )


def shares_of(logits: Tensor, near_lse: Tensor, middle: Tensor | None) -> Tensor:
    """[B, Hkv, G, M], each token's share of each head's attention; 0 for what is not middle."""
    if middle is not None:
        logits = logits.masked_fill(~middle[:, None, None], -math.inf)
    # one pass of exponentials serves the normaliser and the shares
    peak = torch.maximum(logits.amax(-1), near_lse).unsqueeze(-1)
    mass = (logits - peak).exp_()
    total = mass.sum(-1, keepdim=True) + (near_lse.unsqueeze(-1) - peak).exp()
    return mass / total


def first_best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last axis; of equal ones the first."""
    more = values.topk(min(count + 1, values.shape[-1]), dim=-1)
    if bool((more.values[..., 1:] == more.values[..., :-1]).any()):
        # topk leaves open which of equal values comes first
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return more.indices[..., :count]
