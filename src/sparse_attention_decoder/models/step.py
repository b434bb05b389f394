"""A decode step as a compiler sees it: what a layer's cache does is one opaque op, so one graph serves all lengths."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels.cpu import NAMESPACE
from sparse_attention_decoder.models.cache import SparseCache
from sparse_attention_decoder.models.siblings import Siblings, lay_side_by_side
from sparse_attention_decoder.models.verifying import attend_causally
from sparse_attention_decoder.ready import Ready
from sparse_attention_decoder.selection import Rows

# how the attention function finds out, while a graph is traced, which layer it is in
STEP_TAG = "_sparse_step"

# the cache of the step that runs on this thread: a graph takes tensors only
_running = threading.local()

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# it appends to the cache of the running step; nothing else reads or writes that, so the graph need not know
_library.define("decode(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor")
_library.define("verify(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor")


def _decode(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    own = _running.cache.layers[layer]
    if own.is_initialized and query.dtype != own.dtype:
        # a drafter's weights are coarser than the cache on which it drafts
        return _decode(query.to(own.dtype), key.to(own.dtype), value.to(own.dtype), layer, scaling).to(query.dtype)
    output: Tensor | None = None if own.ready is None else own.ready.step(query, key, value)
    if output is None:
        own.append(key, value)
        rows = Rows.full(query.shape[0], own.state.buffer.length)
        output = own.decode(query[:, :, 0], rows, scaling).unsqueeze(1)
        own.ready = Ready.after(own.state, query, scaling)
    # compiled code may use the query's memory for something else by the time that anyone asks
    own.last = None
    return output


def _verify(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    own = _running.cache.layers[layer]
    if not own.is_initialized:
        own.lazy_initialization(key, value)
    # the layer's own append would drop what is ready for the steps of the next draft
    own.state.append(key, value)
    own.last = None
    # what follows takes the layout of `_fake` for granted
    return attend_causally(query, own.state, scaling).transpose(1, 2).contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


for _name, _real in (("decode", _decode), ("verify", _verify)):
    _library.impl(_name, _real, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)


class TracedCache(DynamicCache):
    """Stands for a SparseCache while a decode step is traced: keys and values go to the op as they come.

    It says it holds nothing, so that no length gets into the graph: positions are an input, one query needs no mask.
    """

    def __init__(self, model_config: PreTrainedConfig) -> None:
        super().__init__(config=model_config)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The new key and value [B, Hkv, 1, D], tagged with their layer."""
        key, value = key_states.view_as(key_states), value_states.view_as(value_states)
        for view in (key, value):
            setattr(view, STEP_TAG, layer_idx)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The new token alone."""
        return query_length, 0


def attend_traced(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention [B, N, Hq, Dv] of a traced step's queries [B, Hq, N, D]: the op, by the tag on the key."""
    ops = torch.ops.sparse_attention_decoder
    operation = ops.decode if query.shape[2] == 1 else ops.verify
    output: Tensor = operation(query, key, value, getattr(key, STEP_TAG), scaling)
    return output


class TracedStep(nn.Module):
    """The module that is compiled: ids and positions [B, 1] int64 in, logits [B, 1, V] out.

    Lays the model's packed matrices with one input side by side.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        first = torch.zeros(1, 1, dtype=torch.int64)
        with torch.no_grad(), running_on(SparseCache(model.config, AttentionConfig())):
            self.siblings = nn.ModuleList(lay_side_by_side(model, lambda: self._logits(first, first)))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, 1, V] of the token behind those that the running cache holds."""
        with ExitStack() as stack:
            for group in self.siblings:
                stack.enter_context(cast(Siblings, group).in_one_product())
            return self._logits(ids, positions)

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        cache = TracedCache(self.model.config)
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
        return logits


@contextmanager
def running_on(cache: SparseCache) -> Iterator[None]:
    """While it is entered, steps of this thread append to and read this cache."""
    _running.cache = cache
    try:
        yield
    finally:
        del _running.cache
