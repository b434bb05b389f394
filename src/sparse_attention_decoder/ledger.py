"""What the decode steps of one layer read, added up when someone asks, and step by step where someone wants that."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention_decoder.cache import KVBuffer
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import stored_bytes
from sparse_attention_decoder.selection import Reads, Selection

# steps remembered before they are added up
_MOST_NOTES = 256


@dataclass(frozen=True)
class Dialled:
    """What the dial of a layer did in one step.

    threshold: in force in this step.
    factor, offset: what the estimate was multiplied by, and what was added to it.
    audited: true missing attention mass of the rows that were read sparsely, mean over rows and heads, float64;
        None where the step was not audited.
    audit_tokens: tokens whose keys were read for that, over rows and KV heads.
    """

    threshold: float
    factor: float = 1.0
    offset: float = 0.0
    audited: float | None = None
    audit_tokens: int = 0


@dataclass(frozen=True)
class StepReads:
    """What one step of one layer read, and what it is estimated to have missed.

    reads: tokens and bytes.
    threshold: in force; NaN where every row was read whole.
    estimated: estimated missing attention mass, corrected by the audits so far: mean over rows read sparsely and KV
        heads; 0 where every row was read whole, NaN where the policy makes no estimate.
    spread: standard deviation of the same over those rows and heads.
    audited: the true mass where this step was audited, else NaN.
    """

    reads: Reads
    threshold: float
    estimated: float
    spread: float
    audited: float


class Ledger:
    """Takes note of every step. Adding up costs as much as a short step, so it waits.

    log: one entry a step, where `record` asked for it; None otherwise.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self._config = config
        self.log: list[StepReads] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything but whether to log."""
        self._reads, self._notes = Reads(), list[_Note]()
        self.log = None if self.log is None else []

    def record(self) -> None:
        """Keep the steps to come one by one, too."""
        self.log = []

    def note(
        self,
        buffer: KVBuffer,
        counts: tuple[int, ...],
        dense: list[bool],
        selection: Selection | None = None,
        dialled: Dialled | None = None,
    ) -> None:
        """Remember a step: each row's tokens, which rows were read whole, what was chosen in the others."""
        if selection is None:
            self._notes.append(_Note(counts, dense, buffer.whole))
        else:
            chosen, missing, index_bytes = selection.counts, selection.missing_mass, selection.index_bytes
            self._notes.append(_Note(counts, dense, buffer.whole, chosen, missing, index_bytes, dialled))
        if len(self._notes) >= _MOST_NOTES:
            self.reads(buffer)

    def reads(self, buffer: KVBuffer) -> Reads:
        """What the steps read so far; a token's bytes are those of the buffer now."""
        for note in self._notes:
            reads = note.reads(buffer, self._config)
            self._reads.add(reads)
            if self.log is not None:
                self.log.append(note.step(reads))
        self._notes.clear()
        return self._reads


@dataclass(frozen=True)
class _Note:
    """What one step read, as it came.

    whole: newest tokens of a packed cache that were held as they came. Those of the window count with the bytes they
        have so; one that was chosen, as it may be where the window is shorter, counts as packed.
    """

    counts: tuple[int, ...]
    dense: list[bool]
    whole: int
    chosen: Tensor | None = None
    missing: Tensor | None = None
    index_bytes: int = 0
    dialled: Dialled | None = None

    def reads(self, buffer: KVBuffer, config: AttentionConfig) -> Reads:
        heads, near = buffer.shape[1], config.sink_tokens + config.attention_window
        chosen = [0] * len(self.dense) if self.chosen is None else self.chosen.sum(-1).tolist()
        tokens = whole = 0
        for count, is_dense, own in zip(self.counts, self.dense, chosen, strict=True):
            tokens += count * heads if is_dense else min(count, near) * heads + int(own)
            has_packed = count > self.whole and not is_dense
            whole += min(self.whole, config.attention_window if has_packed else near if not is_dense else count) * heads
        missing = 0.0
        if self.missing is not None:
            sparse = torch.tensor(self.dense).logical_not().to(self.missing)
            missing = float((self.missing.mean(-1) * sparse).mean())
        cached = sum(self.counts) * heads
        return Reads(
            steps=1,
            sparse_steps=int(self.chosen is not None),
            tokens_read=tokens,
            tokens_cached=cached,
            bytes_read=(tokens - whole) * buffer.token_bytes(buffer.kv_dtype) + whole * buffer.token_bytes(None),
            index_bytes=self.index_bytes,
            bytes_dense=cached * buffer.token_bytes(None),
            missing_mass=missing,
            audit_bytes=0
            if self.dialled is None
            else self.dialled.audit_tokens * stored_bytes(buffer.shape[3], buffer.kv_dtype, buffer.keys.dtype),
        )

    def step(self, reads: Reads) -> StepReads:
        if self.chosen is None:
            return StepReads(reads, torch.nan, 0.0, 0.0, torch.nan)
        dialled = self.dialled or Dialled(torch.nan)
        audited = torch.nan if dialled.audited is None else dialled.audited
        if self.missing is None:
            return StepReads(reads, dialled.threshold, torch.nan, torch.nan, audited)
        sparse = torch.tensor(self.dense, device=self.missing.device).logical_not()
        estimates = (dialled.factor * self.missing[sparse] + dialled.offset).clamp_min(0)
        spread, mean = torch.std_mean(estimates, correction=0)
        return StepReads(reads, dialled.threshold, float(mean), float(spread), audited)
