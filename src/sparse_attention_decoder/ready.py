"""A layer's decode steps in a row: what the first has checked and looked up serves those that follow."""

from torch import Tensor

from sparse_attention_decoder.attention import LayerState
from sparse_attention_decoder.cache import Sketch
from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.kernels.cpu import CpuKernels
from sparse_attention_decoder.kernels.cpu.prepared import PreparedStep
from sparse_attention_decoder.ledger import Dialled
from sparse_attention_decoder.policies.dense import DensePolicy
from sparse_attention_decoder.policies.sketch import SketchPolicy
from sparse_attention_decoder.selection import Rows, Selection


class Ready:
    """The steps of a layer that append one token a row, without padding, and attend as the step before did.

    `step` does what `LayerState.append` and `decode_step` do, with some microseconds of Python; or it does nothing and
    returns None, where anything else is due: a buffer that must grow, a sketch that must catch up or be fitted anew,
    the crossover from dense to sparse, a cache that was changed from elsewhere.
    """

    def __init__(self, state: LayerState, query: Tensor, scaling: float, is_dense: bool) -> None:
        buffer, config = state.buffer, state.config
        self._state, self._changes, self._last = state, buffer.changes, buffer.steady_tokens
        self._reads_all = state.reads_all
        self._dense, self._dialled = [is_dense] * query.shape[0], Dialled(config.threshold or 0.0)
        self._sketch: Sketch | None = None
        if is_dense:
            if not (state.policy.reads_everything or state.reads_all):
                below = config.dense_below
                self._last = min(self._last, (state.kernels.crossover_tokens if below is None else below) - 1)
            self._call = PreparedStep(query, buffer.keys, buffer.values, scaling)
        else:
            assert isinstance(state.index, Sketch)
            self._sketch, self._coded = state.index, state.index.coded
            near = config.sink_tokens + config.attention_window
            self._call = PreparedStep(
                query, buffer.keys, buffer.values, scaling, self._coded, config.sink_tokens, near, config.top_k
            )
            self._bytes = self._coded.bytes_per_token * query.shape[0] * buffer.shape[1]

    @classmethod
    def after(cls, state: LayerState, query: Tensor, scaling: float) -> "Ready | None":
        """Ready for what follows a step of queries [B, Hq, 1, D] that `state` has taken; None if it can serve none."""
        length, kernels = state.buffer.length, state.kernels
        plain = state.cap is None and state.witness is None and state.dial is None and not state.config.sample_tail
        plain = plain and isinstance(kernels, CpuKernels)
        # within the budget PyTorch's attention serves, bit for bit
        exact = state.buffer.kv_dtype is None and length <= state.config.budget_tokens
        if not plain or exact or query.stride(-1) != 1 or state.policy not in (DensePolicy, SketchPolicy):
            return None
        return cls(state, query, scaling, state.dense_rows(Rows.full(1, length))[0])

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a cache lies elsewhere, and this holds addresses: the copy has None in its place."""
        return type(None), ()

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Append keys and values [B, Hkv, 1, D] and attend with queries [B, Hq, 1, D]: [B, 1, Hq, Dv], or None."""
        state, buffer = self._state, self._state.buffer
        length = buffer.length + 1
        if length > self._last or buffer.changes != self._changes or state.reads_all != self._reads_all:
            return None
        if not self._call.takes(query):
            return None
        rows = Rows.full(query.shape[0], length)
        if self._sketch is None:
            output, selection = self._call.attend(query, key, value, length), None
        else:
            config, sketch = state.config, self._sketch
            regions = rows.regions(config.sink_tokens, config.attention_window, query.device)
            is_same = state.index is sketch and sketch.coded is self._coded
            if not is_same or not sketch.covers(regions.high, fit_length(length)):
                return None
            output, counts, missing = self._call.step(
                query, key, value, length, regions.near, regions.high, config.threshold or 0.0
            )
            scored = (regions.high - regions.low) * self._bytes
            selection = Selection(counts, counts, missing, scored)
        buffer.advance()
        if state.far is not None and selection is not None:
            far = state.far.add(output[:, 0], self._call.head_missing, buffer.values, rows)
            output = far.unsqueeze(1)
        state.ledger.note(buffer, rows.counts, self._dense, selection, self._dialled)
        return output
