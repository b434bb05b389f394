"""Attention scores one can read: which tokens the last position attended to, and how much."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_attention_decoder.attention import Decoded, LayerState
from sparse_attention_decoder.errors import UnsupportedError
from sparse_attention_decoder.models import compiled
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.selection import Rows

if TYPE_CHECKING:
    from sparse_attention_decoder.decoder import SparseAttention


@dataclass(frozen=True)
class HeadTrace:
    """What one KV head of one layer read for the last position.

    layer, kv_head: where, counted from 0.
    positions: [N] int64, the tokens read, in order of position.
    weights: [G, N] float32, attention of each of the G query heads that share the KV head; each
        row sums to 1 over the tokens read.
    texts: the N tokens as text.
    missing_mass: estimated attention mass on tokens left unread; 0.0 where everything was read,
        None where the policy does not estimate.
    """

    layer: int
    kv_head: int
    positions: Tensor
    weights: Tensor
    texts: tuple[str, ...]
    missing_mass: float | None

    def top(self, count: int = 10) -> list[tuple[int, str, float]]:
        """The tokens with most attention, as (position, text, mean weight over the query heads)."""
        mean = self.weights.mean(0)
        best = mean.topk(min(count, len(mean))).indices.tolist()
        return [(int(self.positions[i]), self.texts[i], float(mean[i])) for i in best]


@dataclass(frozen=True)
class Trace:
    """Attention of the last position of a text, for every layer and KV head.

    tokens: the whole text, token by token; a head's `positions` count in it.
    heads: one entry per layer and KV head, layers first.
    """

    tokens: tuple[str, ...]
    heads: tuple[HeadTrace, ...]

    def head(self, layer: int, kv_head: int) -> HeadTrace:
        """The entry of one layer and KV head.

        Raises:
            KeyError: no such layer or head, or the layer keeps a sliding window of its own.
        """
        for entry in self.heads:
            if (entry.layer, entry.kv_head) == (layer, kv_head):
                return entry
        raise KeyError(f"no trace of layer {layer}, KV head {kv_head}")

    def __str__(self) -> str:
        """A line per head: share of the tokens read, and the three with most attention."""
        lines = []
        for entry in self.heads:
            best = "  ".join(f"{text!r}@{position} {weight:.2f}" for position, text, weight in entry.top(3))
            read = f"{len(entry.positions)}/{len(self.tokens)}"
            lines.append(f"layer {entry.layer:2} head {entry.kv_head}  read {read:>11}  {best}")
        return "\n".join(lines)


def trace_layer(
    number: int, state: LayerState, last: tuple[Tensor, Rows, float, Decoded], tokens: tuple[str, ...]
) -> list[HeadTrace]:
    """The heads of one layer, from its newest decode step; the batch holds one row.

    Raises:
        UnsupportedError: tokens were evicted.
    """
    if state.buffer.evicted:
        raise UnsupportedError(
            f"{state.buffer.evicted} tokens were evicted to stay below the cap, and positions of those held no longer "
            "name tokens of the text; trace without max_cache_tokens and max_cache_bytes"
        )
    query, rows, scaling, decoded = last
    keys = state.buffer.keys
    batch, heads, length, _ = keys.shape
    if decoded.selection is None:
        read = torch.arange(length, device=keys.device).expand(batch, heads, -1)
        valid = None
    else:
        config = state.config
        regions = rows.regions(config.sink_tokens, config.attention_window, keys.device)
        read, valid = regions.with_chosen(decoded.selection)
    logits = state.kernels.exact_logits(query, keys, read, scaling)
    logits = logits if decoded.selection is None else decoded.selection.weigh(logits)
    found = []
    for head in range(heads):
        kept = slice(None) if valid is None else valid[0, head]
        positions, order = read[0, head][kept].sort()
        weights = logits[0, head][:, kept].softmax(-1)[:, order]
        missing = 0.0 if decoded.selection is None else None
        if decoded.selection is not None and decoded.selection.missing_mass is not None:
            missing = float(decoded.selection.missing_mass[0, head])
        texts = tuple(tokens[position] for position in positions.tolist())
        found.append(HeadTrace(number, head, positions.cpu(), weights.float().cpu(), texts, missing))
    return found


@torch.no_grad()
def trace_text(decoder: "SparseAttention", text: str, chat: bool) -> Trace:
    """What `SparseAttention.trace` calls; see there."""
    ids = decoder.prompt_ids(text, chat)
    decoder.check_ids(ids, 0)
    cache = decoder.prefill(ids[:, :-1]) if ids.shape[1] > 1 else SparseCache(decoder.model.config, decoder.config)
    with compiled.set_aside(decoder.model):
        decoder.model(ids[:, -1:], past_key_values=cache, use_cache=True)
    tokens = tuple(decoder.require_tokenizer().decode([token]) for token in ids[0].tolist())
    heads = []
    for number, layer in enumerate(cache.layers):
        if layer in cache.sparse_layers and layer.last is not None:
            heads += trace_layer(number, layer.state, layer.last, tokens)
    return Trace(tokens, tuple(heads))
