"""OpenVINO GenAI, as a worker: see serve.py. Options: evict, to at most 1,024 tokens.

Its streamers are no way to take turns: generation runs ahead while a callback waits. The engine beneath is stepped.
"""

from pathlib import Path
from typing import Any

import numpy as np
from serve import serve


class OpenVino:
    """A GGUF file, in OpenVINO's own form of its quantisation."""

    feeds = False
    packages = ("openvino-genai", "openvino")

    def __init__(self, model: str, threads: int, context: int, options: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai, self._context = openvino, openvino_genai, context
        self.what = f"weights from {Path(model).name}, keys and values in OpenVINO's default, 8 bits"
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        # the prompt in one pass, as LLMPipeline reads it
        scheduler.max_num_batched_tokens = context
        if options["evict"]:
            self.what += ", evicted to 1,024 tokens"
            scheduler.use_cache_eviction = True
            # kept always: 32 tokens at the start, 128 at the end
            scheduler.cache_eviction_config = openvino_genai.CacheEvictionConfig(
                32, 128, 1024, openvino_genai.AggregationMode.NORM_SUM
            )
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler_config=scheduler, device="CPU", properties={"INFERENCE_NUM_THREADS": threads}
        )
        self._request: Any = None
        self._requests = 0

    def read(self, ids: list[int]) -> int:
        """The request before is cancelled first."""
        self._drop()
        config = self._genai.GenerationConfig()
        config.do_sample = False
        config.ignore_eos = True
        config.max_new_tokens = self._context - len(ids)
        self._requests += 1
        tensor = self._openvino.Tensor(np.array([ids], dtype=np.int64))
        self._request = self._pipeline.add_request(self._requests, tensor, config)
        return self._next()

    def step(self, token: int) -> int:
        """Goes on with its own token."""
        return self._next()

    def kv_bytes(self) -> int:
        """Of the blocks in use. Drops the request: one that is alive at exit makes the library complain."""
        metrics = self._pipeline.get_metrics()
        held = int(metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100)
        self._drop()
        return held

    def _drop(self) -> None:
        if self._request is not None:
            self._request.cancel()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def _next(self) -> int:
        self._pipeline.step()
        if not self._request.can_read():
            raise RuntimeError(f"no token came: {self._request.get_status()}, with {self._context} tokens of context")
        (output,) = self._request.read().values()
        (token,) = output.generated_ids
        return int(token)


if __name__ == "__main__":
    serve(OpenVino)
