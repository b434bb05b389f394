"""What a side's process does: load, read the prompt, decode in turns. Run as a program, it obeys its parent.

`Ours` holds one cache that every config reads in its own way; `Stock` is transformers left alone.
"""

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import SparseAttentionError
from sparse_attention_decoder.measure.machine import forget_peak, peak_bytes, resident_bytes
from sparse_attention_decoder.models import identity
from sparse_attention_decoder.models.adapter import disable, enable
from sparse_attention_decoder.models.cache import SparseCache

Answer = dict[str, Any]
# tokens that every side reads before the clock runs: libraries allocate and choose their kernels at the first call
WARM_UP = 128


class Ours:
    """Our cache under any number of configs, one prefill for all.

    In a round every side decodes the same true tokens behind the same densely computed ones: the first
    config is dense and has its turn last, so that what it wrote is what the next round stands on. (An index
    keeps the few newest tokens as its own side computed them.)
    """

    def __init__(self) -> None:
        self.decoder: SparseAttention
        self.cache: SparseCache
        self.configs: list[AttentionConfig] = []
        self.sides: dict[int, SparseCache] = {}
        self.logps: dict[int, Tensor] = {}

    def load(
        self, model: str | None, dtype: str, device: str, threads: int, weights: str | None = None,
        compile: bool = False,
    ) -> Answer:  # fmt: skip
        """Load the model, in this form or else in this dtype; what it weighs and a fingerprint of it."""
        torch.set_num_threads(threads)
        begun = time.perf_counter()
        config, kwargs = AttentionConfig(policy="dense"), {} if weights else {"dtype": getattr(torch, dtype)}
        self.decoder = SparseAttention.from_pretrained(model, config, weights=weights, compile=compile, **kwargs)
        self.decoder.model.to(device)
        seconds = time.perf_counter() - begun
        return {
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "weight_bytes": _weight_bytes(self.decoder.model),
            "fingerprint": identity.weights(self.decoder.model),
        }

    def read(self, ids: list[list[int]], configs: list[dict[str, Any]]) -> Answer:
        """Read all but the last token of the prompt ids [B, T], for these configs, dense first."""
        self.configs = [AttentionConfig(**config) for config in configs]
        self.prompt = torch.tensor(ids, device=self.decoder.model.device)
        # keys and values are kept in one form for all
        self.decoder.config = replace(self.decoder.config, kv_dtype=self.configs[0].kv_dtype)
        enable(self.decoder.model, self.decoder.config)
        self.decoder.prefill(self.prompt[:, :WARM_UP])
        begun = time.perf_counter()
        self.cache = self.decoder.prefill(self.prompt[:, :-1], watched=[config.policy for config in self.configs])
        seconds = time.perf_counter() - begun
        buffers = [layer.state.buffer for layer in self.cache.sparse_layers]
        per_token = sum(b.token_bytes(b.kv_dtype) * b.shape[0] * b.shape[1] for b in buffers)
        self.alone = resident_bytes()
        # rows and KV heads of a layer
        heads = buffers[0].shape[0] * buffers[0].shape[1]
        return {
            "prefill_s": seconds,
            "peak_bytes": peak_bytes(),
            "heads": heads,
            "kv_bytes": per_token * self.prompt.shape[1],
        }

    @torch.inference_mode()
    def begin(self, side: int) -> Answer:
        """Decode the prompt's last token as config `side` does, its index built: the first step, and the peak of it."""
        forget_peak()
        # indexes of the sides before are no part of this one's memory
        others = max(0, resident_bytes() - self.alone)
        cache = self._at(side, self.prompt.shape[1] - 1)
        (seconds,), logits = _decode(self.decoder.model, cache, self.prompt[:, -1:])
        return {"first_step_ms": seconds * 1e3, "peak_bytes": peak_bytes() - others}

    @torch.inference_mode()
    def turn(self, side: int, at: int, ids: list[list[int]]) -> Answer:
        """Decode ids [B, N] behind the first `at` tokens: ms of every step, and what was read."""
        cache = self._at(side, at)
        before = cache.reads
        seconds, logits = _decode(self.decoder.model, cache, torch.tensor(ids, device=self.decoder.model.device))
        after = cache.reads
        self.logps[side] = logits.float().log_softmax(-1)
        read = {name: value - vars(before)[name] for name, value in vars(after).items()}
        return {"ms": [second * 1e3 for second in seconds], "reads": read, "tokens": logits.argmax(-1).tolist()}

    def compare(self) -> Answer:
        """KL divergence of every side's newest turn from dense's, summed over its tokens, by the side's number."""
        dense = self.logps.pop(0)
        found = {str(side): float((dense.exp() * (dense - own)).sum()) for side, own in self.logps.items()}
        self.logps.clear()
        return found

    def _at(self, side: int, length: int) -> SparseCache:
        """The side's cache, cut to `length` tokens, the model set to read it."""
        config = self.configs[side]
        if side not in self.sides:
            self.sides[side] = self.cache.reconfigured(config)
        cache = self.sides[side]
        cache.crop(length - cache.get_seq_length())
        enable(self.decoder.model, config)
        return cache


class Stock:
    """transformers as it is, with its own cache and attention: what a user has before us."""

    def load(self, model: str | None, dtype: str, device: str, threads: int) -> Answer:
        """Load the model; what it weighs and a fingerprint of it."""
        self.ours = Ours()
        answer = self.ours.load(model, dtype, device, threads)
        self.model: Any = disable(self.ours.decoder.model)
        return answer

    @torch.inference_mode()
    def read(self, ids: list[list[int]]) -> Answer:
        """Read the prompt ids [B, T] from scratch and choose the first token."""
        prompt = torch.tensor(ids, device=self.model.device)
        self.model(prompt[:, :WARM_UP], logits_to_keep=1)
        begun = time.perf_counter()
        output = self.model(prompt, use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1].argmax(-1).tolist()
        seconds = time.perf_counter() - begun
        self.cache = output.past_key_values
        return {"ttft_s": seconds, "tokens": tokens}

    @torch.inference_mode()
    def turn(self, ids: list[list[int]]) -> Answer:
        """Feed ids [B, N] one by one: ms of every step."""
        seconds, logits = _decode(self.model, self.cache, torch.tensor(ids, device=self.model.device))
        return {"ms": [second * 1e3 for second in seconds], "tokens": logits.argmax(-1).tolist()}

    def finish(self) -> Answer:
        """The peak of the whole process."""
        return {"peak_bytes": peak_bytes()}


def _decode(model: Any, cache: Any, ids: Tensor) -> tuple[list[float], Tensor]:
    """Seconds of every step, and logits [B, N, V]."""
    seconds, logits = [], []
    for at in range(ids.shape[1]):
        begun = time.perf_counter()
        step = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        # reading the choice waits for a GPU, as writing it would
        step.argmax(-1).tolist()
        seconds.append(time.perf_counter() - begun)
        logits.append(step)
    return seconds, torch.stack(logits, 1)


def _weight_bytes(model: Any) -> int:
    """Bytes of weights that a decode step reads: all but an input embedding of its own, of which it reads a row."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    inputs, outputs = model.get_input_embeddings().state_dict(), model.get_output_embeddings().state_dict()
    only_looked_up = {tensor.data_ptr() for tensor in inputs.values()} - {x.data_ptr() for x in outputs.values()}
    return sum(size for address, size in held.items() if address not in only_looked_up)


def obey(worker: Any) -> None:
    """Answer requests, a JSON object a line, {"do": method, ...arguments}, until stdin closes or "end"."""
    # libraries print to stdout: answers keep the descriptor, the rest goes to stderr
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        method = request.pop("do")
        if method == "end":
            break
        try:
            answer = getattr(worker, method)(**request)
        except (SparseAttentionError, RuntimeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    obey({"ours": Ours, "stock": Stock}[sys.argv[1]]())
