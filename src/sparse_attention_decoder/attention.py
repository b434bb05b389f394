"""One decode step. Scores choose tokens, attention reads only those; the rest is bookkeeping.

Read this page first, then policies/sketch.py, then kernels/reference.py.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_attention_decoder.cache import Account, Cap, FarField, Index, KVBuffer, Sketch, Witness
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.dial import Dial, LayerDial, unread_of_sample
from sparse_attention_decoder.errors import BackendError, ShapeError
from sparse_attention_decoder.kernels import Kernels, Request, resolve
from sparse_attention_decoder.kernels.reference import REFERENCE
from sparse_attention_decoder.ledger import Dialled, Ledger
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
    """The mutable state of one layer: KV buffer, the policy's index, what the prompt attended to, what was read.

    cap: keeps all that within the config's limits; None where there are none. Layers of one cache share an `account`.
    dial: moves the threshold; None where the config sets no missing_mass. Layers of one cache share that, too.
    """

    def __init__(self, config: AttentionConfig, account: Account | None = None, dial: Dial | None = None) -> None:
        self.config = config
        self.policy: type[Policy] = resolve_policy(config.policy)
        self.buffer = KVBuffer(config.kv_dtype, config.backend)
        self.cap = Cap(config, account or Account(1)) if config.is_capped else None
        self.ledger = Ledger(config)
        # a layer that is read whole has nothing to move
        shared = None if config.missing_mass is None else dial or Dial.of(config)
        self.dial = None if shared is None else LayerDial(shared, config.threshold or 0.0)
        self.index: Index | None = None
        self.witness: Witness | None = None
        self.far = FarField(config.sink_tokens, config.far_field) if config.far_field else None
        self.watch(self.policy)
        self._kernels: Kernels | None = None
        # while it is set, every step reads everything, and several tokens are attended as if each came alone
        self.reads_all = False

    def watch(self, policy: type[Policy]) -> None:
        """See of the queries to come what this policy will need, whichever policy reads now."""
        if policy.needs_witness:
            self.witness = self.witness or Witness()
            self.witness.adds_up |= policy.needs_sums

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] behind those held."""
        if self.cap is not None:
            self.cap.admit(self.buffer, keys, values)
        self.buffer.append(keys, values)
        if self.cap is not None:
            self.cap.note(self.buffer, self.index)

    def fit(self, queries: Tensor, rows: Rows, scaling: float) -> None:
        """Queries [B, Hq, N, D] of the newest N tokens were attended: make room if the cap is reached."""
        if self.cap is None:
            return
        self.cap.see(self.buffer, queries, rows, scaling)
        demoted = self.cap.demotion(self.buffer)
        if demoted is not None:
            self.convert(demoted)
            self.cap.limit(self.buffer)
        keep = self.cap.eviction(self.buffer, rows, scaling)
        if keep is not None:
            self.buffer.take_tokens(keep, self.cap.most)
            # what is left is summed up anew when next needed
            if self.witness is not None:
                self.witness.reset()
            for summary in self._summaries:
                summary.truncate(0)
        self.cap.note(self.buffer, self.index)

    def see(self, queries: Tensor, rows: Rows, scaling: float) -> None:
        """Queries [B, Hq, N, D] of the newest N tokens were attended densely; tell the witness, if there is one."""
        if self.witness is not None:
            self.witness.see(queries, self.buffer.keys, rows, scaling)

    @property
    def kernels(self) -> Kernels:
        """The backend that serves this layer's dtype, device and head size."""
        if self._kernels is None:
            keys, values = self.buffer.keys, self.buffer.values
            kv_dtype = self.buffer.kv_dtype
            sampled = self.config.sample_tail and self.config.policy == "sketch"
            request = Request(keys.device, keys.dtype, keys.shape[-1], values.shape[-1], kv_dtype, sampled)
            self._kernels = resolve(self.config.backend, request)
        return self._kernels

    @property
    def _summaries(self) -> list[Witness | Index | FarField]:
        return [summary for summary in (self.witness, self.index, self.far) if summary is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and sketch, room for tokens to come included."""
        return self.buffer.nbytes + (self.index.nbytes if isinstance(self.index, Sketch) else 0)

    @property
    def reads(self) -> Reads:
        """What the decode steps read so far."""
        return self.ledger.reads(self.buffer)

    def convert(self, kv_dtype: str) -> None:
        """Keep keys and values in fewer bits from now on, see `KVBuffer.convert`.

        An index that is a function of the keys is built anew when next needed, of the keys as they are now.
        """
        self.ledger.reads(self.buffer)
        self.buffer.convert(kv_dtype)
        self._kernels = None
        if self.far is not None:
            self.far.reset()
        if not self.policy.evicts:
            self.index = None

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, in buffer, index and witness."""
        self.buffer.truncate(length)
        if self.cap is not None:
            self.cap.truncate()
        for summary in self._summaries:
            summary.truncate(length)

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held."""
        if self.cap is not None:
            self.cap.take_rows(rows)
        self.buffer.take_rows(rows)
        for summary in self._summaries:
            summary.take_rows(rows)

    def reset(self) -> None:
        """Forget everything."""
        self.buffer.reset()
        self.buffer.kv_dtype = self.config.kv_dtype
        if self.cap is not None:
            self.cap.reset()
        if self.witness is not None:
            self.witness.reset()
        self.ledger.reset()
        if self.dial is not None:
            self.dial.reset()
        self.index = None
        if self.far is not None:
            self.far.reset()
        self._kernels = None

    def dense_rows(self, rows: Rows) -> list[bool]:
        """Which rows are read whole: those within the budget or, if the policy evicts nothing, below the crossover."""
        if self.policy.reads_everything or self.reads_all:
            return [True] * len(rows.counts)
        if self.policy.evicts:
            return [count <= self.config.budget_tokens for count in rows.counts]
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
        Decoded; rows within the budget equal dense attention over what is held.
    Raises:
        ShapeError: query and cache do not fit together.
        NonFiniteError: cached keys hold NaN or infinity.
    """
    _check(query, layer, rows)
    dense = layer.dense_rows(rows)
    if all(dense):
        layer.ledger.note(layer.buffer, rows.counts, dense)
        if layer.policy.needs_witness:
            layer.see(query.unsqueeze(2), rows, scaling)
        return Decoded(attend_densely(query, layer, rows, scaling), None, None)

    step = _prepare(query, layer, rows, scaling)
    if step.regions.high <= step.regions.low:
        nothing = Selection.empty(query.shape[0], layer.buffer.keys.shape[1], query.device)
        output, lse, selection = step.read(nothing)
    else:
        output, lse, selection = layer.policy.attend(step)
        if layer.far is not None:
            output = layer.far.add(output, _of_heads(selection, layer), layer.buffer.values, rows)
        if selection.log_weights is not None and (layer.dial is not None or layer.ledger.log is not None):
            # for who asks: it reads the chosen keys once more, out of the processor's cache
            selection = replace(selection, missing_mass=unread_of_sample(step, selection, lse))
    dialled = _dialled(layer, step, selection, dense)
    layer.ledger.note(layer.buffer, rows.counts, dense, selection, dialled)
    if any(dense):
        # a mixed batch: short rows get what they would get alone
        whole = torch.tensor(dense, device=query.device)[:, None, None]
        return Decoded(torch.where(whole, attend_densely(query, layer, rows, scaling), output), None, selection)
    return Decoded(output, lse, selection)


def attend_densely(query: Tensor, layer: LayerState, rows: Rows, scaling: float) -> Tensor:
    """Attention [B, Hq, Dv] of queries [B, Hq, D] over the whole cache; within the budget PyTorch's, bit for bit.

    A packed cache is read as it is, by the backend's kernel, however short.
    """
    exact = layer.buffer.kv_dtype is None and max(rows.counts) <= layer.config.budget_tokens
    kernels = REFERENCE if exact else layer.kernels
    return kernels.attend_all(query, layer.buffer.keys, layer.buffer.values, rows.valid, scaling)


def _prepare(query: Tensor, layer: LayerState, rows: Rows, scaling: float) -> Step:
    config = layer.config
    regions = rows.regions(config.sink_tokens, config.attention_window, query.device)
    if layer.index is None:
        layer.index = layer.policy.new_index(layer.kernels, config)
        if layer.cap is not None:
            layer.cap.note(layer.buffer, layer.index)
    threshold = (config.threshold or 0.0) if layer.dial is None else layer.dial.begin()
    return Step(
        query, layer.buffer, layer.index, rows, regions, scaling, layer.kernels, config, layer.witness, threshold
    )


def _dialled(layer: LayerState, step: Step, selection: Selection, dense: list[bool]) -> Dialled:
    if layer.dial is None or selection.missing_mass is None:
        return Dialled(step.threshold)
    return layer.dial.follow(step, selection, dense)


def _of_heads(selection: Selection, layer: LayerState) -> Tensor:
    if selection.head_missing is None:
        raise BackendError(
            f"backend {layer.kernels.name} does not say what each query head leaves unread, which far_field needs; "
            "use far_field=0, or the backend cpu or reference"
        )
    return selection.head_missing


def _check(query: Tensor, layer: LayerState, rows: Rows) -> None:
    batch, kv_heads, length, dim = layer.buffer.shape
    if query.ndim != 3 or query.shape[0] != batch or query.shape[2] != dim or query.shape[1] % kv_heads:
        raise ShapeError(
            f"query has shape {tuple(query.shape)}; the cache expects [{batch}, a multiple of {kv_heads}, {dim}]"
        )
    if rows.length != length or len(rows.counts) != batch:
        raise ShapeError(
            f"rows describe {len(rows.counts)} rows of {rows.length} tokens; the cache holds {batch} of {length}"
        )
