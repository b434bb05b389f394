"""A place in a cache to come back to."""

import copy

from sparse_attention_decoder.models.cache import SparseCache, SparseLayer


class Bookmark:
    """Remembers where a cache stands; `go_back` leaves it as it stood there.

    Whatever was appended meanwhile is dropped, also by a forward that broke off between two layers. Keys, values
    and sketch are cut, which copies nothing. What cannot be cut is kept as a copy: a sliding window of
    transformers' own, what a policy saw of the prompt's queries, where a dial stood, and the newest tokens of a packed
    cache, which may be packed meanwhile.
    """

    def __init__(self, cache: SparseCache) -> None:
        self._cache = cache
        self._length = cache.get_seq_length()
        self._kept = [
            copy.copy(layer.state.witness) if isinstance(layer, SparseLayer) else copy.deepcopy(layer)
            for layer in cache.layers
        ]
        self._newest = {
            number: copy.deepcopy(layer.state.buffer.newest)
            for number, layer in enumerate(cache.layers)
            if isinstance(layer, SparseLayer)
        }
        # in one copy: they share a loop
        self._dials = copy.deepcopy([layer.state.dial for layer in cache.sparse_layers])

    def go_back(self) -> None:
        """Leave the cache as it was when this bookmark was made; may be called any number of times."""
        for layer, dial in zip(self._cache.sparse_layers, copy.deepcopy(self._dials), strict=True):
            layer.state.dial = dial
        for number, kept in enumerate(self._kept):
            layer = self._cache.layers[number]
            if not isinstance(layer, SparseLayer):
                self._cache.layers[number] = copy.deepcopy(kept)
                continue
            layer.crop(self._length - layer.get_seq_length())
            if self._newest[number] is not None:
                layer.state.buffer.newest = copy.deepcopy(self._newest[number])
            layer.last = None
            layer.state.witness = copy.copy(kept)
            if layer.state.policy.evicts:
                # cutting brings back no token that was thrown away: the next step chooses among all of them
                layer.state.index = None
