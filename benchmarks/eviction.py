"""Which tokens to evict when a cache is full: rules against each other, token by token, on real texts.

    python benchmarks/eviction.py --text novel.txt --text code.txt
    python benchmarks/eviction.py --text novel.txt --needles 4

Every rule reads the same context in chunks under the same cap and then the same continuation one token at a time;
what is held is read densely, so that eviction alone differs from the run without a cap. With --needles a sentence that
gives a number is hidden in the context and asked for at its end: the figure is then of the number's tokens.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder import AttentionConfig, SparseAttention, attention, enable
from sparse_attention_decoder.cache.buffer import KVBuffer
from sparse_attention_decoder.cache.cap import Cap, attention_of
from sparse_attention_decoder.measure.texts import about, passages, texts
from sparse_attention_decoder.selection import Rows


class Unpooled(Cap):
    """The newest 32 queries, each token by itself."""

    def scores(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
        """See `Cap`."""
        assert self._newest is not None
        return attention_of(self._newest, buffer, rows, scaling)


class Single(Cap):
    """TOVA (arXiv:2401.06104): the newest query alone."""

    def scores(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
        """See `Cap`."""
        assert self._newest is not None
        return attention_of(self._newest[:, :, -1:], buffer, rows, scaling)


class Oldest(Cap):
    """StreamingLLM (arXiv:2309.17453): by age."""

    def scores(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
        """See `Cap`."""
        keys = buffer.keys
        return torch.arange(keys.shape[2], dtype=torch.float32).expand(keys.shape[:3])


class Accumulated(Cap):
    """H2O (arXiv:2306.14048): what all queries since paid to a token; exact, where a sketch would estimate."""

    sums: Tensor | None = None

    def see(self, buffer: KVBuffer, queries: Tensor, rows: Rows, scaling: float) -> None:
        """See `Cap`."""
        paid = attention_of(queries, buffer, rows, scaling)
        if self.sums is not None:
            paid[..., : self.sums.shape[-1]] += self.sums
        self.sums = paid
        super().see(buffer, queries, rows, scaling)

    def scores(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
        """See `Cap`."""
        assert self.sums is not None
        return self.sums

    def kept(self, scores: Tensor, count: int) -> Tensor:
        """See `Cap`."""
        keep = super().kept(scores, count)
        assert self.sums is not None
        self.sums = self.sums.gather(-1, keep)
        return keep


class Remembered(Unpooled):
    """The newest queries, and half of what was seen of the tokens still held at the eviction before."""

    earlier: Tensor | None = None

    def scores(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
        """See `Cap`."""
        found = super().scores(buffer, rows, scaling)
        if self.earlier is not None:
            found[..., : self.earlier.shape[-1]] += self.earlier / 2
        return found

    def kept(self, scores: Tensor, count: int) -> Tensor:
        """See `Cap`."""
        keep = super().kept(scores, count)
        self.earlier = scores.gather(-1, keep)
        return keep


RULES: dict[str, type[Cap]] = {
    "newest 32, pooled": Cap,
    "newest 32 queries": Unpooled,
    "newest query": Single,
    "oldest first": Oldest,
    "accumulated": Accumulated,
    "newest 32, remembered": Remembered,
}


@contextmanager
def evicting_by(rule: type[Cap]) -> Iterator[None]:
    """Layers made inside use this rule."""
    attention.Cap = rule  # type: ignore[misc]
    try:
        yield
    finally:
        attention.Cap = Cap  # type: ignore[misc]


@torch.inference_mode()
def continued(decoder: SparseAttention, config: AttentionConfig, ids: Tensor, context: int) -> Tensor:
    """Log-probabilities [B, steps, V] that follow each token of the continuation."""
    enable(decoder.model, config)
    decoder.config = config
    cache = decoder.prefill(ids[:, :context])
    found = [decoder.model(token, past_key_values=cache).logits[:, -1] for token in ids[:, context:-1].split(1, 1)]
    return torch.stack(found, 1).log_softmax(-1)


def compared(dense: Tensor, capped: Tensor, ids: Tensor, context: int) -> dict[str, Any]:
    """KL from the run without a cap, and perplexity of the true tokens, by text."""
    target = ids[:, context + 1 :, None]
    kl = (dense.exp() * (dense - capped)).sum(-1).mean(1)
    loss = -capped.gather(-1, target).mean((1, 2))
    return {"kl": kl.tolist(), "perplexity": loss.exp().tolist()}


def hidden(decoder: SparseAttention, ids: Tensor, context: int, samples: int) -> Iterator[tuple[Tensor, int]]:
    """Ids [1, T] of contexts with a number hidden at some depth, the question and the number; where that starts."""
    tokenizer, rng = decoder.require_tokenizer(), Random(0)
    for sample in range(samples):
        number = str(rng.randrange(1_000_000, 10_000_000))
        needle, question = (
            tokenizer(text, return_tensors="pt").input_ids
            for text in (
                f" One of the special magic numbers for harbor is: {number}. ",
                "\nWhat is the special magic number for harbor in the text? The special magic number for harbor is:",
            )
        )
        answer = tokenizer(f" {number}", return_tensors="pt").input_ids
        text = ids[:1, : context - needle.shape[1] - question.shape[1]]
        at = int(text.shape[1] * (sample + 1) / (samples + 1))
        whole = torch.cat([text[:, :at], needle, text[:, at:], question, answer], 1)
        yield whole, whole.shape[1] - answer.shape[1] - 1


def main() -> None:
    """Print one JSON line a rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, action="append", default=[], help="UTF-8 text; may be repeated")
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--cap", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--needles", type=int, default=0)
    parser.add_argument("--rule", action="append", choices=[*RULES], default=[])
    asked = parser.parse_args()
    decoder = SparseAttention()
    tokenizer = decoder.require_tokenizer()
    found = texts(asked.text)
    ids = passages(found, lambda text: tokenizer(text)["input_ids"], asked.context + asked.steps + 1)
    uncapped = AttentionConfig(policy="dense")
    capped = AttentionConfig(policy="dense", max_cache_tokens=asked.cap)
    runs = [(ids, asked.context)]
    if asked.needles:
        runs = list(hidden(decoder, ids, asked.context, asked.needles))
    dense = [continued(decoder, uncapped, *run) for run in runs]
    about_all = {"context": asked.context, "cap": asked.cap, "needles": asked.needles, "texts": about(found)}
    print(json.dumps({"rule": "no cap", **_mean(dense, dense, runs), **about_all}), flush=True)
    for name in asked.rule or RULES:
        with evicting_by(RULES[name]):
            outcome = _mean(dense, [continued(decoder, capped, *run) for run in runs], runs)
        print(json.dumps({"rule": name, **outcome, **about_all}), flush=True)


def _mean(dense: list[Tensor], capped: list[Tensor], runs: list[tuple[Tensor, int]]) -> dict[str, Any]:
    each = [compared(one, other, *run) for one, other, run in zip(dense, capped, runs, strict=True)]
    kl = [value for one in each for value in one["kl"]]
    perplexity = [value for one in each for value in one["perplexity"]]
    geometric = math.exp(statistics.mean(map(math.log, perplexity)))
    return {"kl": statistics.mean(kl), "perplexity": geometric, "each": {"kl": kl, "perplexity": perplexity}}


if __name__ == "__main__":
    main()
