"""StaticSparseCache, for captured and compiled decode steps: its memory never moves, the device counts its tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import StaticCache, StaticLayer

from sparse_attention_decoder.cache.static import Shared, StaticTokens
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.models.cache import LAYER_TAG, STOCK_TAG
from sparse_attention_decoder.selection import Reads


class StaticSparseLayer(StaticLayer):
    """One full-attention layer of fixed capacity. A single new token is a decode step, several are a prompt.

    Transformers gets the whole of keys and values, capacity and all, with a tag by which our attention finds the layer.
    """

    def __init__(self, config: AttentionConfig, capacity: int, shared: Shared, is_first: bool) -> None:
        super().__init__(max_cache_len=capacity)
        self._config, self._shared, self._is_first = config, shared, is_first
        self.state: StaticTokens | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, for rows, heads and channels like these."""
        self.state = StaticTokens(self._config, key_states, value_states, self.max_cache_len, self._shared)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self.state.keys, self.state.values
        # what transformers makes positions of: counted by a plain addition in the first layer, for a compiler may read
        # it again behind an op of ours that has counted on
        self.cumulative_length = self._shared.get(
            ("seen", self.device), lambda: torch.zeros((), dtype=torch.int64, device=self.device)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, N, D]; return those of the whole capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.state is not None
        if key_states.shape[2] == 1:
            self.state.append(key_states[:, :, 0], value_states[:, :, 0])
        else:
            self.state.write(key_states, value_states)
        if self._is_first:
            self.cumulative_length.add_(key_states.shape[2])
        keys, values = self.state.keys.view_as(self.state.keys), self.state.values.view_as(self.state.values)
        for view in (keys, values):
            setattr(view, LAYER_TAG, self)
        return keys, values

    def code_prompt(self) -> None:
        """Code the keys of a prompt that was given to `update`; our attention does so when it has attended to them."""
        assert self.state is not None
        self.state.code()

    def attend_prompt(
        self, query: Tensor, mask: Tensor | None, attend: Callable[[Tensor, Tensor, Tensor | None], Any]
    ) -> Any:
        """Attention of a prompt's queries [B, Hq, N, D], by `attend(keys, values, mask)` on what is held.

        Raises:
            UnsupportedError: a mask with holes, or not of bools.
        """
        assert self.state is not None
        held, count = int(self.state.length), query.shape[2]
        seen = None if mask is None else mask[..., :held]
        if seen is not None:
            if seen.dtype != torch.bool:
                raise UnsupportedError(f"a static cache takes bool masks; this one is {seen.dtype}")
            real = seen[:, 0, -1].int()
            starts = real.shape[1] - real.sum(-1)
            if bool((real.cummax(-1).values != real).any()):
                raise UnsupportedError("a static cache takes rows padded on the left; this mask has holes")
            self.state.starts.copy_(starts.expand(query.shape[0]))
            # plain causal attention is faster without a mask
            if count == held and bool((seen == torch.ones_like(seen[:1, :1]).tril()).all()):
                seen = None
        output = attend(self.state.keys[:, :, :held], self.state.values[:, :, :held], seen)
        self.state.code()
        # now, while memory may be allocated
        self.state.scratch(query[:, :, 0])
        return output

    def reset(self) -> None:
        """Forget what is held; the memory stays where it is."""
        if self.state is not None:
            self.state.reset()
            self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not supported: rows keep their place."""
        raise UnsupportedError("a static cache does not reorder rows; decode beams with the cache that grows")

    def offload(self) -> None:
        """Not supported: a captured step finds its memory where it was."""
        raise UnsupportedError("a static cache is not offloaded; use the cache that grows")

    prefetch = offload


class StaticSparseCache(StaticCache):
    """A KV cache of fixed capacity under sparse attention, for `torch.compile` and CUDA graphs.

        cache = StaticSparseCache(model.config, AttentionConfig(), capacity=131072)
        model.generate(**inputs, past_key_values=cache)     # on CUDA transformers compiles the decode step by itself

    Args:
        model_config: the transformers config of a model that `enable` was called on.
        config: what a decode step reads; policy "sketch" or "dense".
        capacity: tokens it can hold, prompt and answer together.
    The prompt's mask says which tokens on the left are padding; masks of decode steps are not looked at.
    A token more than it can hold has no place: its output is NaN. `reads` says what was read.

    Raises:
        ConfigError: a config with a cap of its own, or with layer_scales of another number of layers.
    """

    def __init__(self, model_config: PreTrainedConfig, config: AttentionConfig, capacity: int) -> None:
        if config.is_capped:
            raise ConfigError(
                "max_cache_tokens and max_cache_bytes do not work with a static cache, which moves nothing it holds; "
                f"its capacity of {capacity} tokens is its cap. Use SparseCache, or no compile=True"
            )
        super().__init__(config=model_config, max_cache_len=capacity)
        shared, ours = Shared(), [type(layer) is StaticLayer for layer in self.layers]
        of_layers = iter(config.of_layers(sum(ours)))
        self.layers: list[Any] = [
            StaticSparseLayer(next(of_layers), capacity, shared, number == ours.index(True)) if ours[number] else layer
            for number, layer in enumerate(self.layers)
        ]
        self.config = config

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to one layer; keys of transformers' own layers are marked, for they are dense on purpose."""
        held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not isinstance(self.layers[layer_idx], StaticSparseLayer):
            setattr(held[0], STOCK_TAG, True)
        return held

    @property
    def reads(self) -> Reads:
        """What the decode steps read so far, summed over layers; waits for the device."""
        total = Reads()
        for layer in self.layers:
            if isinstance(layer, StaticSparseLayer) and layer.state is not None:
                total.add(layer.state.reads)
        return total
