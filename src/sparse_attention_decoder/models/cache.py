"""SparseCache: a transformers cache whose full-attention layers are ours."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparse_attention_decoder.attention import Decoded, LayerState, decode_step
from sparse_attention_decoder.cache import Account, KVBuffer
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.dial import Dial
from sparse_attention_decoder.errors import ConfigError, ShapeError, UnsupportedError
from sparse_attention_decoder.kernels.packed import numbers_or_nan
from sparse_attention_decoder.models.verifying import takes_steps
from sparse_attention_decoder.policies import resolve
from sparse_attention_decoder.ready import Ready
from sparse_attention_decoder.selection import Held, Reads, Rows

# how the attention function finds the layer behind a key tensor: no globals, safe with many caches and threads
LAYER_TAG = "_sparse_layer"
# marks keys of a sliding or chunked layer
STOCK_TAG = "_stock_layer"


class SparseLayer(DynamicLayer):
    """One full-attention layer: hands transformers plain views of keys and values.

    The views are the whole history, so any attention implementation works on this cache; ours
    finds the layer through a tag on the key view. A packed layer unpacks what is behind several new tokens, which come
    as they are; for a single one it hands out NaN in its shape: ours reads the packed cache itself, its own token
    included, and what cannot do that shows at once.
    """

    def __init__(self, config: AttentionConfig, account: Account | None = None, dial: Dial | None = None) -> None:
        super().__init__()
        self.state = LayerState(config, account, dial)
        # with a cap a rollback may come after what it would need has been evicted
        self.is_croppable = not config.is_capped
        # whether the newest views are NaN in place of the history
        self.hides = False
        # what a compiled step has prepared for the next one
        self.ready: Ready | None = None
        # the newest decode step, for traces, unless it was compiled: query [B, Hq, D], rows, scaling and the result
        self.last: tuple[Tensor, Rows, float, Decoded] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype and device; the buffer allocates at the first append."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # other code reads these; made when asked for, as views that are kept would keep the memory of a buffer that grew
    @property
    def keys(self) -> Tensor | None:
        """View [B, Hkv, T, D] of the keys held, NaN where they are packed; None before the first."""
        return numbers_or_nan(self.state.buffer.keys) if self.is_initialized else None

    @keys.setter
    def keys(self, none: None) -> None:
        """Transformers sets None where a layer begins."""

    @property
    def values(self) -> Tensor | None:
        """View [B, Hkv, T, Dv] of the values held, as `keys`."""
        return numbers_or_nan(self.state.buffer.values) if self.is_initialized else None

    @values.setter
    def values(self, none: None) -> None:
        """Transformers sets None where a layer begins."""

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Add keys and values [B, Hkv, N, D] behind those held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.ready = None
        self.state.append(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, N, D]; return views [B, Hkv, T, D] of all held."""
        past, under_autograd = self.state.buffer.length, key_states.requires_grad or value_states.requires_grad
        self.append(key_states, value_states)
        buffer = self.state.buffer
        steps = takes_steps(self.state, key_states.shape[2])
        self.hides = buffer.kv_dtype is not None and steps and not under_autograd
        if self.hides:
            keys, values = numbers_or_nan(buffer.keys), numbers_or_nan(buffer.values)
        else:
            keys, values = self.plain()
        if under_autograd:
            # the buffer keeps numbers, not graphs: under autograd the new tokens are handed on as they came
            keys = torch.cat([keys[:, :, :past], key_states], dim=2)
            values = torch.cat([values[:, :, :past], value_states], dim=2)
        elif buffer.kv_dtype is not None and not self.hides:
            # a prompt attends to its own newest tokens as they are: rounded, errors would add up from layer to layer
            keys[:, :, past:], values[:, :, past:] = key_states, value_states
        # views of their own: a buffer would hold its layer through those that it keeps
        keys, values = keys.view_as(keys), values.view_as(values)
        for view in (keys, values):
            setattr(view, LAYER_TAG, self)
        return keys, values

    def plain(self) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] in the model's dtype: views, or unpacked for who asks."""
        return self.state.buffer.plain_keys, self.state.buffer.plain_values

    def get_seq_length(self) -> int:
        """Tokens seen, padding and what a cap has evicted included: positions go on counting."""
        return self.state.buffer.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens held when so many more have come, and how many positions a mask leaves out before them."""
        return self.state.buffer.length + query_length, self.state.buffer.evicted

    def decode(self, query: Tensor, rows: Rows, scaling: float) -> Tensor:
        """One decode step: attention [B, Hq, Dv] of queries [B, Hq, D] of the newest token, which is held already."""
        decoded = decode_step(query, self.state, rows, scaling)
        self.last = (query, rows, scaling, decoded)
        self.fit(query.unsqueeze(2), rows, scaling)
        return decoded.output

    def fit(self, queries: Tensor, rows: Rows, scaling: float) -> None:
        """Queries [B, Hq, N, D] of the newest N tokens were attended: make room if a cap is reached."""
        if self.state.cap is not None:
            self.state.fit(queries, rows, scaling)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the count is negative or 0, as transformers asks since 5.15."""
        if tokens_to_remove > 0:
            raise ShapeError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove")
        if self.is_initialized:
            self.state.truncate(self.state.buffer.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.state.reset()
        self.last, self.ready, self.hides = None, None, False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i hold what row `beam_idx[i]` held."""
        if self.get_seq_length() > 0:
            self.state.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.get_seq_length() > 0:
            self.reorder_cache(torch.arange(self.state.buffer.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `indices` (int64 or bool mask) names."""
        if self.get_seq_length() > 0:
            self.reorder_cache(torch.arange(self.state.buffer.shape[0])[indices.cpu()])

    def offload(self) -> None:
        """Not supported: a decode step reads scattered tokens, so the cache has to be where it is used."""
        raise UnsupportedError(
            'cache offloading does not work with sparse attention; use cache_implementation="dynamic"'
        )

    prefetch = offload

    def reconfigured(
        self, config: AttentionConfig, account: Account | None = None, dial: Dial | None = None
    ) -> "SparseLayer":
        """A layer over the same buffer that reads it as `config` says, with what the prompt's witness saw.

        Raises:
            ConfigError: another kv_dtype, which would be another buffer.
        """
        if config.kv_dtype != self.state.config.kv_dtype:
            raise ConfigError(
                f"kv_dtype {config.kv_dtype!r} cannot read a cache of kv_dtype {self.state.config.kv_dtype!r}; "
                "read the prompt anew under that config"
            )
        other = SparseLayer(config, account, dial)
        if self.state.witness is not None:
            # shallow: from here on each sees its own steps
            other.state.witness = copy.copy(self.state.witness)
            other.state.watch(other.state.policy)
        if self.is_initialized:
            other.dtype, other.device, other.is_initialized = self.dtype, self.device, True
            other.state.buffer = self.state.buffer
        return other

    def convert(self, kv_dtype: str) -> None:
        """Keep keys and values in fewer bits from now on, see `KVBuffer.convert`."""
        self.state.convert(kv_dtype)


class SparseCache(DynamicCache):
    """The KV cache of a model under sparse attention. Give it to `generate` or `forward` as `past_key_values`.

    Args:
        model_config: the transformers config of the model; its sliding, linear or chunked layers
            keep transformers' own cache layers.
        config: what a decode step reads.
    Everything a transformers cache does works and keeps the sketch in step: crop, reorder_cache,
    batch_repeat_interleave, batch_select_indices, reset. `reads` says what was read, `held` what is held.
    A ConfigError says that layer_scales are of another number of layers.
    """

    def __init__(self, model_config: PreTrainedConfig, config: AttentionConfig) -> None:
        super().__init__(config=model_config)
        ours = [type(layer) is DynamicLayer for layer in self.layers]
        self._account, dial = Account(sum(ours)), Dial.of(config)
        of_layers = iter(config.of_layers(sum(ours)))
        self.layers: list[Any] = [
            SparseLayer(next(of_layers), self._account, dial) if own else layer
            for own, layer in zip(ours, self.layers, strict=True)
        ]
        self.config = config

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to one layer; keys of transformers' own layers are marked, for they are dense on purpose."""
        held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not isinstance(self.layers[layer_idx], SparseLayer):
            setattr(held[0], STOCK_TAG, True)
        return held

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all: a prompt whose length is known is then never copied as it grows."""
        for layer in self.sparse_layers:
            layer.state.buffer.reserve(tokens)

    def watch(self, policies: Iterable[str]) -> None:
        """Before a prompt is read: keep of its queries what these policies choose by, so that one prefill serves all.

        `reconfigured` then takes it along. Costs nothing for policies that choose by the newest query
        alone; h2o adds up the attention of all queries, which is a second pass over the prompt.

        Args:
            policies: names in `tables.POLICIES`.
        Raises:
            ConfigError: no such policy.
        """
        for name in policies:
            policy = resolve(AttentionConfig(policy=name).policy)
            for layer in self.sparse_layers:
                layer.state.watch(policy)

    def reconfigured(self, config: AttentionConfig) -> "SparseCache":
        """The same keys and values read another way. Shares memory with this cache: use one at a time.

        Counters start at zero and the index is built anew when first needed. What was seen of the
        prompt's queries comes along, see `watch`.

        Raises:
            ConfigError: another kv_dtype, or layer_scales of another number of layers.
        """
        other = copy.copy(self)
        other.config = config
        other._account, dial = Account(len(self.sparse_layers)), Dial.of(config)
        of_layers = iter(config.of_layers(len(self.sparse_layers)))
        other.layers = [
            layer.reconfigured(next(of_layers), other._account, dial) if isinstance(layer, SparseLayer) else layer
            for layer in self.layers
        ]
        return other

    def to_stock(self, model_config: PreTrainedConfig) -> DynamicCache:
        """A copy as the dynamic cache that transformers makes by itself, for baselines.

        Raises:
            UnsupportedError: tokens were evicted, which that cache could not tell from tokens never seen.
        """
        if self.held.tokens_evicted:
            raise UnsupportedError("tokens were evicted from this cache; a stock cache holds all it has seen or none")
        stock = DynamicCache(config=model_config)
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, SparseLayer):
                stock.layers[number] = copy.deepcopy(layer)
            elif layer.is_initialized:
                keys, values = layer.plain()
                stock.layers[number].update(keys.clone(), values.clone())
        return stock

    @property
    def sparse_layers(self) -> list[SparseLayer]:
        """The layers that are ours, in order."""
        return [layer for layer in self.layers if isinstance(layer, SparseLayer)]

    @property
    def reads(self) -> Reads:
        """What the decode steps read so far, summed over layers."""
        total = Reads()
        for layer in self.sparse_layers:
            total.add(layer.state.reads)
        return total

    @property
    def held(self) -> Held:
        """What is held now, and what a cap has cost so far."""
        states = [layer.state for layer in self.sparse_layers]
        first = states[0].buffer if states else KVBuffer()
        now = sum(state.nbytes for state in states)
        kept_as = tuple(state.buffer.kept_as for state in states)
        return Held(first.seen, first.length, first.demoted, first.evicted, now, max(now, self._account.most), kept_as)
