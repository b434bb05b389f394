"""llama.cpp through llama-cpp-python, as a worker: see serve.py. Options: kv "f16" or "q8_0", flash (attention)."""

from pathlib import Path
from typing import Any

import numpy as np
from serve import serve


class LlamaCpp:
    """A GGUF file, run as it is."""

    feeds = True
    packages = ("llama-cpp-python",)

    def __init__(self, model: str, threads: int, context: int, options: dict[str, Any]) -> None:
        import llama_cpp

        self._library = llama_cpp
        self.what = f"weights as in {Path(model).name}, {options['kv']} keys and values"
        kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[options["kv"]]
        self._llama = llama_cpp.Llama(
            model,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=kind,
            type_v=kind,
            flash_attn=options["flash"],
            verbose=False,
        )

    def read(self, ids: list[int]) -> int:
        """Whatever is in the cache is dropped first."""
        self._llama.reset()
        return self._feed(ids)

    def step(self, token: int) -> int:
        """Feeds the token."""
        return self._feed([token])

    def kv_bytes(self) -> int:
        """What saving the sequence would take: its keys and values, and some bytes for each token."""
        return int(self._library.llama_state_seq_get_size(self._llama.ctx, 0))

    def _feed(self, ids: list[int]) -> int:
        self._llama.eval(ids)
        logits = self._library.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
