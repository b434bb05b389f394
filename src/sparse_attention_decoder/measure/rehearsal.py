"""What decoding under a config would give, for many tokens in one pass: cheap enough to search with.

A pass over 96 tokens behind 4,096 takes a twelfth of the time of decoding them one by one, and gives the same KL to
three digits (docs/experiments.md). What is claimed is measured by decoding all the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention_decoder.cache import FarField, Sketch
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import InputError, UnsupportedError
from sparse_attention_decoder.kernels.reference import REFERENCE
from sparse_attention_decoder.kernels.rotation import work_dtype
from sparse_attention_decoder.models.reading import Progress
from sparse_attention_decoder.models.rehearsal import rehearse
from sparse_attention_decoder.selection import Rows


@dataclass(frozen=True)
class Rehearsed:
    """One config over the tokens behind a prompt.

    kl, ce_change: float64 [N, B] of every token: divergence of the next-token distributions (dense from sparse, nats),
        and how much the cross-entropy of the true next token grows.
    retrieved: of each full-attention layer, tokens beside sinks and window, mean per step and KV head; the whole
        context where it is dense.
    share_read: bytes of keys, values and sketch, over what dense attention reads.
    """

    kl: Tensor
    ce_change: Tensor
    retrieved: tuple[float, ...]
    share_read: float


class Rehearsal:
    """Texts whose first tokens are read once, densely, and whose next ones are then decoded under any config, at once.

    Args:
        decoder: the model, with a config whose policy is dense.
        input_ids: [B, context + N + 1] int64, one text a row, no padding.
        context: tokens read first.
        on_prefill: called with (tokens read, context).
    Raises:
        InputError: no token left behind the context. ContextLengthError: too many. UnsupportedError: layers without
            full attention.
    Policy sketch alone, without kv_dtype or a cap.
    """

    def __init__(
        self, decoder: SparseAttention, input_ids: Tensor, context: int, on_prefill: Progress | None = None
    ) -> None:
        if input_ids.shape[1] < context + 2:
            raise InputError(f"{input_ids.shape[1]} tokens leave none to decode behind a context of {context}")
        decoder.check_ids(input_ids)
        self._decoder, self.context = decoder, context
        self._next, self._targets = input_ids[:, context:-1], input_ids[:, context + 1 :]
        self._cache = decoder.prefill(input_ids[:, :context], on_prefill)
        self._sketches: dict[tuple[int, int], Sketch] = {}
        self.layers = len(self._cache.sparse_layers)
        if self.layers < len(self._cache.layers):
            raise UnsupportedError(
                f"{decoder.model.config.model_type} has {len(self._cache.layers) - self.layers} layers without full "
                "attention, whose cache cannot go back to where a rehearsal began; tune models of full attention alone"
            )
        self._dense = self._decode([None] * self.layers)

    @property
    def tokens(self) -> int:
        """Tokens decoded, in all texts."""
        return self._next.numel()

    def run(self, config: AttentionConfig, only: int | None = None) -> Rehearsed:
        """Decode under a config; with `only`, that full-attention layer alone is sparse, the others are dense."""
        return self.judge(
            [
                None if one.policy == "dense" or only not in (None, number) else self.part(number, one)
                for number, one in enumerate(config.of_layers(self.layers))
            ]
        )

    def part(self, layer: int, config: AttentionConfig, kind: "type[Part] | None" = None) -> "Part":
        """How one layer attends under a config of policy sketch; `kind` for experiments."""
        state = self._cache.sparse_layers[layer].state
        key = layer, config.sink_tokens
        if key not in self._sketches:
            self._sketches[key] = Sketch(state.kernels, config.sink_tokens)
            rows = Rows.full(self._next.shape[0], self.context)
            self._sketches[key].catch_up(state.buffer.keys, rows, self.context)
        return (kind or Part)(self._sketches[key], config, self.context)

    def judge(self, parts: "Sequence[Part | None]") -> Rehearsed:
        """Decode with these parts, one for each full-attention layer; None is dense."""
        logps = self._decode(parts)
        kl = (self._dense.exp() * (self._dense - logps)).sum(-1)
        gained = (self._dense - logps).gather(-1, self._targets.unsqueeze(-1)).squeeze(-1)
        retrieved = tuple(float(self.context) if part is None else part.retrieved for part in parts)
        return Rehearsed(kl.T, gained.T, retrieved, self._share_read(parts))

    def _decode(self, parts: "Sequence[Part | None]") -> Tensor:
        logits = rehearse(self._decoder.model, self._cache, self._next, parts)
        return logits.double().log_softmax(-1)

    def _share_read(self, parts: "Sequence[Part | None]") -> float:
        total = 0.0
        for layer, part in zip(self._cache.sparse_layers, parts, strict=True):
            each = layer.state.buffer.token_bytes(layer.state.buffer.kv_dtype)
            if part is None:
                total += 1.0
            else:
                near = part.config.sink_tokens + part.config.attention_window
                scored = self.context - near
                index = part.sketch.coded.bytes_per_token
                total += ((near + part.retrieved) * each + scored * index) / (self.context * each)
        return total / self.layers


class Part:
    """One layer: the decode step of policy sketch for several queries, each of which sees what came before it.

    retrieved: tokens beside sinks and window, mean per query and KV head, of the newest call.
    """

    def __init__(self, sketch: Sketch, config: AttentionConfig, context: int) -> None:
        self.sketch, self.config, self._context = sketch, config, context
        self._far = FarField(config.sink_tokens, config.far_field) if config.far_field else None
        self.retrieved = 0.0

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention [B, Hq, N, Dv] of the newest N queries [B, Hq, N, D] to keys and values [B, Hkv, T, D]."""
        config, work = self.config, work_dtype(query)
        batch, heads, total = keys.shape[:3]
        count = query.shape[2]
        at, own = torch.arange(total), torch.arange(total - count, total).unsqueeze(-1)
        seen = at <= own
        near = ((at < config.sink_tokens) | (at > own - config.attention_window)) & seen
        grouped = query.to(work).reshape(batch, heads, -1, query.shape[-1])
        logits = (scaling * grouped @ keys.to(work).transpose(-1, -2)).view(batch, heads, -1, count, total)
        logits = logits.masked_fill(~seen, -math.inf)
        estimated = torch.where(near | ~seen, logits, self._scores(query, keys, scaling, logits))
        shares = estimated.softmax(-1)
        chosen = self.choose(shares.mean(2).masked_fill(near | ~seen, -1.0)) & ~near & seen
        self.retrieved = float(chosen.sum(-1).double().mean())
        read = (near | chosen).unsqueeze(2)
        weights = logits.masked_fill(~read, -math.inf).softmax(-1)
        output = (weights.flatten(2, 3) @ values.to(work)).flatten(1, 2)
        output = self.finish(output, shares.masked_fill(read | ~seen, 0).flatten(2, 3), values)
        return output.view(*query.shape[:3], -1).to(query.dtype)

    def choose(self, shares: Tensor) -> Tensor:
        """Which tokens to read beside the near ones: bool, of the group's shares [B, Hkv, N, T], -1 for no token."""
        best = shares.topk(min(self.config.top_k, shares.shape[-1]), -1).indices
        return (shares > (self.config.threshold or 2.0)).scatter(-1, best, True)

    def finish(self, output: Tensor, unread: Tensor, values: Tensor) -> Tensor:
        """Output [B, Hq * N, Dv] with the far field; `unread` [B, Hkv, G * N, T] are shares of what was not read."""
        if self._far is None:
            return output
        # the queries are so many more heads that share a KV head
        missing = unread.sum(-1).flatten(1)
        return self._far.add(output, missing, values, Rows.full(output.shape[0], self._context))

    def _scores(self, query: Tensor, keys: Tensor, scaling: float, logits: Tensor) -> Tensor:
        """Estimated logits of the coded tokens; of the others what `logits` has, which is near or not seen."""
        batch, _, _, dim = query.shape
        total = keys.shape[2]
        low, high = self.config.sink_tokens, total - self.config.attention_window
        if high > self._context:
            self.sketch.catch_up(keys, Rows.full(batch, self._context), high)
        scores = logits.clone()
        if high > low:
            found = REFERENCE.score(query.reshape(batch, -1, dim), self.sketch.coded, low, high, scaling)
            scores[..., low:high] = found.view(*scores.shape[:4], -1)
        if high > self._context:
            self.sketch.truncate(self._context)
        return scores
