"""One decode step. Scores choose tokens, attention reads only those; the rest is bookkeeping.

Read this page first, then policies/sketch.py, then kernels/reference.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attention_decoder.cache import Index, KVBuffer
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels import Kernels, Request, resolve
from sparse_attention_decoder.policies import Policy, Step
from sparse_attention_decoder.policies import resolve as resolve_policy
from sparse_attention_decoder.selection import Reads, Rows, Selection


@dataclass(frozen=True)
class Decoded:
    """What a decode step gives.

    output: [B, Hq, Dv] in the query's dtype.
    lse: [B, Hq] log-sum-exp over the tokens read; None where a row was attended densely.
    selection: what was chosen beside sinks and window; None where every row was attended densely.
    """

    output: Tensor
    lse: Tensor | None
    selection: Selection | None


class LayerState:
    """The mutable state of one layer: the KV buffer, the policy's index, what was read so far."""

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self.policy: type[Policy] = resolve_policy(config.policy)
        self.buffer = KVBuffer()
        self.reads = Reads()
        self.index: Index | None = None
        self._kernels: Kernels | None = None

    @property
    def kernels(self) -> Kernels:
        """The backend that serves this layer's dtype, device and head size."""
        if self._kernels is None:
            keys = self.buffer.keys
            self._kernels = resolve(self.config.backend, Request(keys.device, keys.dtype, keys.shape[-1]))
        return self._kernels

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, in buffer and index."""
        self.buffer.truncate(length)
        if self.index is not None:
            self.index.truncate(length)

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held."""
        self.buffer.take_rows(rows)
        if self.index is not None:
            self.index.take_rows(rows)

    def reset(self) -> None:
        """Forget everything."""
        self.buffer.reset()
        self.reads = Reads()
        self.index = None
        self._kernels = None

    def dense_rows(self, rows: Rows) -> list[bool]:
        """Which rows are read whole: those within the budget or below the crossover."""
        if self.policy.reads_everything:
            return [True] * len(rows.counts)
        below = self.config.dense_below
        crossover = self.kernels.crossover_tokens if below is None else below
        return [count <= self.config.budget_tokens or count < crossover for count in rows.counts]


@torch.no_grad()
def decode_step(query: Tensor, layer: LayerState, rows: Rows, scaling: float) -> Decoded:
    """Attend one new token per row to the cache that already holds it.

    Args:
        query: [B, Hq, D], after RoPE, not scaled; Hq a multiple of the cache's Hkv.
        layer: its buffer holds the new token's key and value as the last ones.
        rows: which cached tokens exist for each row.
        scaling: what logits are multiplied by, usually D ** -0.5.
    Returns:
        Decoded; rows within the budget equal dense attention.
    Raises:
        ShapeError: query and cache do not fit together.
        NonFiniteError: cached keys hold NaN or infinity.
    """
    _check(query, layer, rows)
    dense = layer.dense_rows(rows)
    if all(dense):
        layer.reads.add(_count(layer, rows, None, dense))
        return Decoded(attend_densely(query, layer.buffer, rows, scaling), None, None)

    selection = choose(query, layer, rows, scaling)
    tokens, valid = tokens_read(layer, rows, selection)
    output, lse = layer.kernels.attend(query, layer.buffer.keys, layer.buffer.values, tokens, valid, scaling)
    layer.reads.add(_count(layer, rows, selection, dense))
    if any(dense):
        # a mixed batch: short rows get what they would get alone
        whole = torch.tensor(dense, device=query.device)[:, None, None]
        return Decoded(torch.where(whole, attend_densely(query, layer.buffer, rows, scaling), output), None, selection)
    return Decoded(output, lse, selection)


def choose(query: Tensor, layer: LayerState, rows: Rows, scaling: float) -> Selection:
    """Ask the policy which tokens of the middle to read."""
    config, buffer = layer.config, layer.buffer
    regions = rows.regions(config.sink_tokens, config.attention_window, query.device)
    if regions.high <= regions.low:
        return Selection.empty(query.shape[0], buffer.keys.shape[1], query.device)
    if layer.index is None:
        layer.index = layer.policy.new_index(layer.kernels, config)
    return layer.policy.select(Step(query, buffer, layer.index, rows, regions, scaling, layer.kernels, config))


def tokens_read(layer: LayerState, rows: Rows, selection: Selection) -> tuple[Tensor, Tensor | None]:
    """Positions [B, Hkv, N] of sinks, window and selection, and which of them count (None: all)."""
    heads = layer.buffer.keys.shape[1]
    regions = rows.regions(layer.config.sink_tokens, layer.config.attention_window, layer.buffer.keys.device)
    near = regions.near[:, None].expand(-1, heads, -1)
    tokens = torch.cat([near, selection.tokens], dim=-1)
    if regions.near_valid is None and bool((selection.counts == selection.tokens.shape[-1]).all()):
        return tokens, None
    near_valid = torch.ones_like(near, dtype=torch.bool)
    if regions.near_valid is not None:
        near_valid = regions.near_valid[:, None].expand_as(near)
    return tokens, torch.cat([near_valid, selection.chosen], dim=-1)


def attend_densely(query: Tensor, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
    """Attention [B, Hq, Dv] of queries [B, Hq, D] over the whole cache, KV heads not repeated."""
    keys, values = buffer.keys, buffer.values
    # the two calls transformers makes for one query token, so that the bits are the same
    if rows.valid is None and keys.shape[-1] == values.shape[-1] <= 256:
        shared = query.shape[1] != keys.shape[1]
        return scaled_dot_product_attention(query.unsqueeze(2), keys, values, scale=scaling, enable_gqa=shared).squeeze(
            2
        )
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
    mask = None if rows.valid is None else rows.valid[:, None, None]
    return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling).flatten(1, 2)


def _check(query: Tensor, layer: LayerState, rows: Rows) -> None:
    batch, kv_heads, length, dim = layer.buffer.keys.shape
    if query.ndim != 3 or query.shape[0] != batch or query.shape[2] != dim or query.shape[1] % kv_heads:
        raise ShapeError(
            f"query has shape {tuple(query.shape)}; the cache expects [{batch}, a multiple of {kv_heads}, {dim}]"
        )
    if rows.length != length or len(rows.counts) != batch:
        raise ShapeError(
            f"rows describe {len(rows.counts)} rows of {rows.length} tokens; the cache holds {batch} of {length}"
        )


def _count(layer: LayerState, rows: Rows, selection: Selection | None, dense: list[bool]) -> Reads:
    buffer = layer.buffer
    heads = buffer.keys.shape[1]
    token_bytes = (buffer.keys.shape[-1] + buffer.values.shape[-1]) * buffer.keys.element_size()
    cached = sum(rows.counts) * heads
    reads = Reads(steps=1, tokens_cached=cached, bytes_dense=cached * token_bytes)
    near = layer.config.sink_tokens + layer.config.attention_window
    counts = [0] * len(dense) if selection is None else selection.counts.sum(-1).tolist()
    for count, is_dense, chosen in zip(rows.counts, dense, counts, strict=True):
        reads.tokens_read += count * heads if is_dense else min(count, near) * heads + int(chosen)
    reads.bytes_read = reads.tokens_read * token_bytes
    if selection is not None:
        reads.sparse_steps = 1
        reads.index_bytes = selection.index_bytes
        if selection.missing_mass is not None:
            sparse = torch.tensor(dense).logical_not().to(selection.missing_mass)
            reads.missing_mass = float((selection.missing_mass.mean(-1) * sparse).mean())
    return reads
