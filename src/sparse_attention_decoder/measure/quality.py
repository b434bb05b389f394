"""How far sparse decoding strays from dense decoding of the same weights on the same text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.audit import audit
from sparse_attention_decoder.measure.interval import of_tokens
from sparse_attention_decoder.models.adapter import enable
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.reading import Progress

# of the steps, one in so many is audited against exact attention, layer by layer
AUDIT_EVERY = 8
_KL, _TOP1, _CE, _CHANGE = range(4)
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """One config against dense decoding on a set of texts.

    config: what was compared with dense.
    tokens: [4, steps, B] float64, of every token decoded: KL divergence of the next-token distributions
        (dense from sparse, nats), whether both prefer the same token (0 or 1), cross-entropy of the true
        next token under dense, and how much sparse adds to it (nats).
    share_read: bytes of keys, values and index over the bytes dense decoding reads.
    index_share: the index's part of it.
    retrieved: tokens chosen beside sinks and window, mean per step, layer and KV head.
    missing_mass: mean estimated missing attention mass; 0 where the policy gives none.
    sparse_share: share of layer steps that chose tokens; 0 would mean dense against dense.
    error, mass, recall: per layer, of the audited steps: relative error of the attention output, true share
        of attention on the tokens read, recall against as many tokens of the oracle.
    """

    config: AttentionConfig
    tokens: Tensor
    share_read: float
    index_share: float
    retrieved: float
    missing_mass: float
    sparse_share: float
    error: tuple[float, ...]
    mass: tuple[float, ...]
    recall: tuple[float, ...]

    def mean(self, text: int | None = None) -> tuple[float, float, float, float]:
        """KL, top-1 agreement, cross-entropy under dense and its change; of one text, or of all."""
        values = self.tokens if text is None else self.tokens[:, :, text]
        kl, top1, ce_dense, change = values.flatten(1).mean(1).tolist()
        return kl, top1, ce_dense, change

    def result(self, names: list[str]) -> dict[str, Any]:
        """The outcome as a record's result; `names` are those of the texts."""
        kl, top1, ce_dense, change = self.mean()
        change_ci = of_tokens(self.tokens[_CHANGE])
        per_text = []
        for number, name in enumerate(names):
            one = self.mean(number)
            per_text.append({"name": name, "kl": one[_KL], "top1": one[_TOP1], "ce_change": one[_CHANGE]})
        layers = {"error": self.error, "mass": self.mass, "recall": self.recall}
        return {
            "kl": kl, "kl_ci": of_tokens(self.tokens[_KL]),
            "top1": top1, "top1_ci": of_tokens(self.tokens[_TOP1]),
            "ce_dense": ce_dense, "ppl_dense": math.exp(ce_dense),
            "ce_change": change, "ce_change_ci": change_ci,
            "ppl_change": math.expm1(change), "ppl_change_ci": [math.expm1(end) for end in change_ci],
            "share_read": self.share_read, "index_share": self.index_share, "retrieved": self.retrieved,
            "sparse_share": self.sparse_share, "missing_mass": self.missing_mass,
            **{name: sum(values) / len(values) if values else None for name, values in layers.items()},
            "layers": {name: [round(value, 5) for value in values] for name, values in layers.items()},
            "per_text": per_text,
        }  # fmt: skip


@torch.inference_mode()
def compare(
    decoder: SparseAttention,
    input_ids: Tensor,
    context: int,
    configs: list[AttentionConfig],
    on_step: OnStep | None = None,
    on_prefill: Progress | None = None,
) -> Iterator[Outcome]:
    """Decode the same continuation densely and under every config, one token at a time.

    Args:
        decoder: the model of both sides; it is enabled for the purpose, and for its own config at the end. Its
            kv_dtype is that of both sides: what packing costs is in neither.
        input_ids: [B, context + steps + 1] int64, one text a row, no padding.
        context: tokens read by one dense prefill that all share; the next ones are fed one by one, and each
            feeding's prediction is compared.
        configs: what to compare with dense.
        on_step: called with (pass number from 0, step) for progress. on_prefill: with (tokens, context).
    Yields:
        An Outcome per config, in order.
    Raises:
        InputError: fewer tokens than the context and one step need, or a config that would read all
            of the context: that would compare dense with dense.
        ConfigError: a config of another kv_dtype than the decoder's.
    """
    steps = input_ids.shape[1] - context - 1
    if steps < 1:
        raise InputError(f"{input_ids.shape[1]} tokens leave no step after a context of {context}; give more text")
    everything = AttentionConfig(policy="dense", kv_dtype=decoder.config.kv_dtype)
    enable(decoder.model, everything)
    try:
        cache = decoder.prefill(input_ids[:, :context], on_prefill, [config.policy for config in configs])
        targets = input_ids[:, context + 1 :]
        passed = _Pass(decoder.model, input_ids, context, steps, on_step)
        dense = torch.stack([logp for logp, _ in passed.decode(cache.reconfigured(everything), 0)])
        for number, config in enumerate(configs, start=1):
            cache.crop(context - cache.get_seq_length())
            sparse = cache.reconfigured(config)
            tokens = torch.zeros(4, steps, input_ids.shape[0], dtype=torch.float64)
            audits: list[Tensor] = []
            for step, (logp, audited) in enumerate(passed.decode(sparse, number)):
                tokens[:, step] = _disagreement(dense[step], logp, targets[:, step])
                audits += [] if audited is None else [audited]
            yield _outcome(config, sparse, tokens, audits)
    finally:
        enable(decoder.model, decoder.config)


@dataclass(frozen=True)
class _Pass:
    """Feeds the continuation to a cache, token by token."""

    model: Any
    ids: Tensor
    context: int
    steps: int
    on_step: OnStep | None

    def decode(self, cache: SparseCache, number: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Log-probabilities [B, V] of each step, and the audit [3, L] of some."""
        for step in range(self.steps):
            at = self.context + step
            logits = self.model(self.ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
            if self.on_step is not None:
                self.on_step(number, step)
            audited = None
            if number > 0 and step % AUDIT_EVERY == 0:
                found = [audit(layer) for layer in cache.sparse_layers]
                audited = torch.tensor([[one.error, one.mass, math.nan if one.recall is None else one.recall]
                                        for one in found]).T  # fmt: skip
            yield logits.float().log_softmax(-1), audited


def _disagreement(dense: Tensor, sparse: Tensor, target: Tensor) -> Tensor:
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    same = (dense.argmax(-1) == sparse.argmax(-1)).double()
    ce_dense = -dense.gather(-1, target[:, None]).squeeze(-1)
    ce_sparse = -sparse.gather(-1, target[:, None]).squeeze(-1)
    return torch.stack([kl.double(), same, ce_dense.double(), (ce_sparse - ce_dense).double()])


def _outcome(config: AttentionConfig, cache: SparseCache, tokens: Tensor, audits: list[Tensor]) -> Outcome:
    reads = cache.reads
    if reads.sparse_steps == 0 and config.policy != "dense":
        raise InputError(
            f"{config.policy} read everything: dense would be compared with dense; the context must exceed the "
            f"budget of {config.budget_tokens} tokens and dense_below={config.dense_below}"
        )
    near = config.sink_tokens + config.attention_window
    heads = sum(layer.state.buffer.keys.shape[0] * layer.state.buffer.keys.shape[1] for layer in cache.sparse_layers)
    per_head = reads.tokens_read * len(cache.sparse_layers) / (reads.steps * heads)
    error, mass, recall = torch.stack(audits).nanmean(0).tolist()
    return Outcome(
        config=config,
        tokens=tokens,
        share_read=reads.share_read,
        index_share=reads.index_bytes / reads.bytes_dense,
        retrieved=per_head - near,
        missing_mass=reads.missing_mass / max(1, reads.sparse_steps),
        sparse_share=reads.sparse_steps / reads.steps,
        error=tuple(error),
        mass=tuple(mass),
        recall=tuple(value for value in recall if not math.isnan(value)),
    )
