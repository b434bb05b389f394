"""kvpress over transformers, as a worker: see serve.py. SnapKV keeps an eighth of the prompt's keys and values."""

from typing import Any

from serve import serve


class KvPress:
    """A transformers directory in float32."""

    feeds = True
    packages = ("kvpress", "transformers", "torch")
    what = "float32 weights, keys and values; SnapKV drops 87.5 % of the prompt's for good"

    def __init__(self, model: str, threads: int, context: int, options: dict[str, Any]) -> None:
        import torch
        from kvpress import SnapKVPress
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._new_cache = torch, DynamicCache
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
        self._press = SnapKVPress(compression_ratio=0.875)

    def read(self, ids: list[int]) -> int:
        """Into a new cache, which the press shortens."""
        self._cache, self._position = self._new_cache(), 0
        with self._press(self._model):
            return self._feed(ids)

    def step(self, token: int) -> int:
        """Feeds the token."""
        return self._feed([token])

    def kv_bytes(self) -> int:
        """Of the cache."""
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in self._cache.layers)

    def _feed(self, ids: list[int]) -> int:
        # counted here: the shortened cache's length is no longer the next token's position
        end = self._position + len(ids)
        positions = self._torch.arange(self._position, end)[None]
        self._position = end
        tokens = self._torch.tensor([ids])
        output = self._model(tokens, past_key_values=self._cache, position_ids=positions, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


if __name__ == "__main__":
    serve(KvPress)
