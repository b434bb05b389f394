"""What a sparse decode step missed: its output and its choice against exact attention over the whole cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.models.cache import SparseLayer


@dataclass(frozen=True)
class Audit:
    """The newest decode step of one layer against exact attention.

    error: |o - o_dense| / |o_dense|, mean over rows and query heads.
    mass: share of the attention on the tokens read, mean over rows and query heads.
    recall: of the middle's tokens with most attention (mean over the query heads of a KV head), as many as
        were chosen, the share that was chosen; mean over the KV heads that chose any, None if none did.
    """

    error: float
    mass: float
    recall: float | None


@torch.no_grad()
def audit(layer: SparseLayer) -> Audit:
    """Compare a layer's newest decode step with float32 attention over all its cache holds, row by row.

    Raises:
        InputError: no decode step yet, or the cache has changed since.
    Cost: reads the whole cache, as dense attention does.
    """
    if layer.last is None:
        raise InputError("this layer has made no decode step; decode a token before asking what the step missed")
    query, rows, scaling, decoded = layer.last
    state = layer.state
    if state.buffer.shape[0] != query.shape[0] or state.buffer.length != rows.length:
        raise InputError(
            f"the newest decode step read {query.shape[0]} rows of {rows.length} tokens; the cache now holds "
            f"{state.buffer.shape[0]} of {state.buffer.length}; ask right after the step"
        )
    chosen, near = _read(layer)
    dense = state.dense_rows(rows)
    errors, masses, recalls = [], [], []
    for row, is_dense in enumerate(dense):
        real = slice(None) if rows.valid is None else rows.valid[row].nonzero().squeeze(-1)
        keys, values = (held[row][:, real].float() for held in (state.buffer.plain_keys, state.buffer.plain_values))
        asked = query[row].float().unflatten(0, (keys.shape[0], -1))
        weights = (scaling * asked @ keys.transpose(-1, -2)).softmax(-1)  # [Hkv, G, n]
        exact = (weights @ values).flatten(0, 1)
        distance = (decoded.output[row].float() - exact).norm(dim=-1)
        errors.append(distance / exact.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny))
        if is_dense or decoded.selection is None:
            masses.append(torch.ones_like(errors[-1]))
            continue
        own, always = chosen[row][:, real], near[row, real]
        masses.append((weights * (own | always)[:, None]).sum(-1).flatten())
        recalls += _recalls(weights.mean(1).masked_fill(always, -1.0), own)
    return Audit(
        error=float(torch.cat(errors).mean()),
        mass=float(torch.cat(masses).mean()),
        recall=sum(recalls) / len(recalls) if recalls else None,
    )


def _read(layer: SparseLayer) -> tuple[Tensor, Tensor]:
    """Which tokens the newest step chose [B, Hkv, T], and which it reads always [B, T]; bool."""
    assert layer.last is not None
    _, rows, _, decoded = layer.last
    state = layer.state
    keys = state.buffer.keys
    chosen = torch.zeros(keys.shape[:3], dtype=torch.int32, device=keys.device)
    near = torch.zeros(keys.shape[0], rows.length, dtype=torch.int32, device=keys.device)
    if decoded.selection is not None:
        selection = decoded.selection
        # added, not set: filler may repeat a position that counts
        chosen.scatter_add_(-1, selection.tokens, selection.chosen.int())
        regions = rows.regions(state.config.sink_tokens, state.config.attention_window, keys.device)
        counts = torch.ones_like(regions.near) if regions.near_valid is None else regions.near_valid
        near.scatter_add_(-1, regions.near, counts.int())
    return chosen > 0, near > 0


def _recalls(shares: Tensor, chosen: Tensor) -> list[float]:
    """Per KV head that chose any of its tokens [Hkv, n]: how many are among as many with the largest share."""
    found = []
    for share, own in zip(shares, chosen, strict=True):
        count = int(own.sum())
        if count:
            best = share.topk(count).indices
            found.append(int(own[best].sum()) / count)
    return found
