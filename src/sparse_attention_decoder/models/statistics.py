"""What a generation read, step by step and layer by layer, and what it is estimated to have missed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.errors import UnsupportedError
from sparse_attention_decoder.ledger import StepReads
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.selection import Reads


@dataclass(frozen=True)
class Statistics:
    """Decode steps by layers with full attention: arrays [S, L], on the CPU, summed over rows and KV heads.

    tokens_read, tokens_cached: int64.
    bytes_read: int64, of keys, values, index and audits; bytes_dense: what dense attention would have read.
    audit_bytes: int64, the part of bytes_read that audits took.
    estimated: float64, estimated missing attention mass, mean over rows and KV heads; 0 where all was read, NaN where
        the policy makes no estimate. From the sample with `sample_tail`, else as the sketch gives it, which is too low;
        with `missing_mass` set corrected by audits. An estimate of an average, and no bound for any token or head.
    spread: float64, standard deviation of the same over rows and KV heads.
    audited: float64, true missing mass where the step was audited, else NaN.
    threshold: float64, in force; NaN where all was read.
    target: the missing_mass that was asked for; None for a fixed threshold.
    """

    tokens_read: Tensor
    tokens_cached: Tensor
    bytes_read: Tensor
    bytes_dense: Tensor
    audit_bytes: Tensor
    estimated: Tensor
    spread: Tensor
    audited: Tensor
    threshold: Tensor
    target: float | None = None

    @classmethod
    def of(cls, cache: SparseCache) -> "Statistics":
        """Of the decode steps since `record(cache)`."""
        logs = []
        for layer in cache.sparse_layers:
            state = layer.state
            _ = state.reads
            logs.append(state.ledger.log or [])
        steps = min(map(len, logs), default=0)

        def table(value: Callable[[StepReads], float], dtype: torch.dtype) -> Tensor:
            rows = [[value(log[step]) for log in logs] for step in range(steps)]
            return torch.tensor(rows, dtype=dtype).reshape(steps, len(logs))

        def count(value: Callable[[Reads], int]) -> Tensor:
            return table(lambda step: value(step.reads), torch.int64)

        return cls(
            count(lambda reads: reads.tokens_read),
            count(lambda reads: reads.tokens_cached),
            count(lambda reads: reads.bytes_read + reads.index_bytes + reads.audit_bytes),
            count(lambda reads: reads.bytes_dense),
            count(lambda reads: reads.audit_bytes),
            table(lambda step: step.estimated, torch.float64),
            table(lambda step: step.spread, torch.float64),
            table(lambda step: step.audited, torch.float64),
            table(lambda step: step.threshold, torch.float64),
            cache.config.missing_mass,
        )

    @property
    def share_read(self) -> float:
        """Bytes read, index and audits included, over those of dense attention; 1.0 where there was no step."""
        dense = int(self.bytes_dense.sum())
        return int(self.bytes_read.sum()) / dense if dense else 1.0

    @property
    def by_step(self) -> Tensor:
        """Estimated missing attention mass [S] float64, mean over layers; NaN where the policy makes no estimate."""
        return self.estimated.mean(1)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a step and layer, for JSON: what has no value there is None."""
        names = ("tokens_read", "tokens_cached", "bytes_read", "bytes_dense", "audit_bytes",
                 "estimated", "spread", "audited", "threshold")  # fmt: skip
        columns = {name: getattr(self, name).tolist() for name in names}
        steps, layers = self.estimated.shape
        return [
            {"step": step, "layer": layer, **{name: _or_none(held[step][layer]) for name, held in columns.items()}}
            for step in range(steps)
            for layer in range(layers)
        ]

    def __str__(self) -> str:
        steps, layers = self.estimated.shape
        told = f"{steps} decode steps, {layers} layers: {self.share_read:.1%} of dense attention's bytes read"
        audits = int((~self.audited.isnan()).sum())
        if audits:
            told += f" ({int(self.audit_bytes.sum()) / int(self.bytes_dense.sum()):.1%} for {audits} audits)"
        each = self.by_step
        if not steps or bool(each.isnan().any()):
            return f"{told}; no estimate of what was missed"
        told += f"; estimated missing attention mass {float(each.mean()):.4f} a step"
        if steps > 1:
            told += f" (standard deviation over steps {float(each.std()):.4f})"
        if self.target is not None:
            told += f", target {self.target:g}"
        return f"{told}. {'An estimate' if audits else 'An unaudited estimate'}; no bound"


def record(cache: SparseCache) -> None:
    """Keep the decode steps to come one by one, for `Statistics.of`."""
    for layer in cache.sparse_layers:
        layer.state.ledger.record()


def with_statistics(generate: Callable[..., Any], fresh: Callable[[], SparseCache], **kwargs: Any) -> Any:
    """What `generate` gives for these arguments, and the Statistics of its decode steps.

    Args:
        fresh: makes the cache where none is given.
    Raises:
        UnsupportedError: a static cache, whose steps are counted on the device.
    """
    # an empty cache counts as false
    given = kwargs.pop("past_key_values", None)
    cache = fresh() if given is None else given
    if not isinstance(cache, SparseCache):
        raise UnsupportedError(
            f"return_stats=True needs a SparseCache; a {type(cache).__name__} does not count its steps one by one"
        )
    record(cache)
    output = generate(past_key_values=cache, **kwargs)
    return output, Statistics.of(cache)


def _or_none(value: float) -> float | None:
    return None if isinstance(value, float) and math.isnan(value) else value
