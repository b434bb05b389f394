"""One layer's tokens in memory that never moves: what a captured or compiled decode step reads and writes."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import BackendError, ConfigError, NonFiniteError, ShapeError
from sparse_attention_decoder.kernels import Coded, Request, Statistics, resolve
from sparse_attention_decoder.kernels.triton.ops import append_token, read_tokens
from sparse_attention_decoder.kernels.triton.shapes import Plan, Scratch, Shape
from sparse_attention_decoder.selection import Reads

# what counts one step of a row and KV head, see `add_to_tally` of the attend kernel
TALLIED = 6


class Shared:
    """What the layers of one cache work in: one after the other, so those that are alike share it."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Tensor] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        """The buffer of this key, made if there is none."""
        if key not in self._held:
            self._held[key] = fixed(make())
        return self._held[key]


def fixed(tensor: Tensor) -> Tensor:
    """The tensor, marked as one that never moves: without it `torch.compile` copies what a step writes to."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


class StaticTokens:
    """Keys, values and sketch of one layer, with room for `capacity` tokens, and a length that the device counts.

    A decode step is `append` and `read`: two torch ops whose sizes and addresses never change. Prompts are written by
    `write`, attended to by whoever wrote them, and coded by `code`; that waits for the device, a step does not.

    Args:
        config: policy "sketch", or "dense" for the baseline; backend triton, which leaves the length to the device.
        keys, values: [B, Hkv, N, D] and [B, Hkv, N, Dv] like those to come.
    Raises:
        ConfigError: a policy that needs the host at every step, or a kv_dtype.
        BackendError: no backend for it here.
    """

    def __init__(
        self, config: AttentionConfig, keys: Tensor, values: Tensor, capacity: int, shared: Shared | None = None
    ) -> None:
        if config.kv_dtype is not None:
            raise ConfigError(
                f"kv_dtype {config.kv_dtype!r} is not for a static cache: Triton's kernels do not unpack; "
                "use kv_dtype=None or the cache that grows"
            )
        if config.far_field:
            raise ConfigError("far_field is not for a static cache; use far_field=0 or the cache that grows")
        if config.policy not in ("sketch", "dense"):
            raise ConfigError(
                f'policy {config.policy!r} asks the host at every step, which a captured step cannot; use "sketch" or '
                '"dense" with a static cache, or the cache that grows'
            )
        if config.missing_mass is not None:
            raise ConfigError(
                f"missing_mass {config.missing_mass} moves the threshold from step to step, and a captured step keeps "
                "the one it was captured with; use missing_mass=None or the cache that grows"
            )
        if config.sample_tail:
            raise ConfigError(
                "sample_tail is not for a static cache: Triton's kernels read no sample; use sample_tail=False or the "
                "cache that grows"
            )
        self._kernels = resolve(config.backend, Request(keys.device, keys.dtype, keys.shape[-1], values.shape[-1]))
        if self._kernels.name != "triton":
            raise BackendError(
                f"backend {self._kernels.name} does not decode with a length on the device; a static cache needs "
                "triton and a CUDA device, elsewhere use the cache that grows"
            )
        self.config, self.capacity = config, capacity
        # the first token of prompts that are written and not coded yet
        self._uncoded: int | None = None
        batch, heads, _, dim = keys.shape
        device, near = keys.device, config.sink_tokens + config.attention_window
        self.keys = fixed(keys.new_zeros(batch, heads, capacity, dim))
        self.values = fixed(values.new_zeros(batch, heads, capacity, values.shape[-1]))
        mean = torch.zeros(batch, heads, dim, device=device)
        room = Coded.room(capacity, Statistics(fixed(mean), fixed(torch.ones_like(mean))))
        self.coded = Coded(fixed(room.codes), fixed(room.factors), room.statistics)
        self.length = fixed(torch.zeros((), dtype=torch.int64, device=device))
        self.starts = fixed(torch.zeros(batch, dtype=torch.int32, device=device))
        self.tally = fixed(torch.zeros(batch * heads, TALLIED, dtype=torch.float64, device=device))
        self._shared = Shared() if shared is None else shared
        self._plan = self._shared.get(("plan", batch, near, device), lambda: Plan.empty(batch, near, device))

    @property
    def dense_tokens(self) -> int:
        """Contexts of at most this many tokens are read whole."""
        if self.config.policy == "dense":
            return self.capacity
        below = self.config.dense_below
        crossover = self._kernels.crossover_tokens if below is None else below
        return max(self.config.budget_tokens, crossover - 1)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Put keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] of a prompt behind what is held; waits for the device.

        Raises:
            ShapeError: there is no room for them, or they are of other rows than those held.
        """
        if keys.shape[0] != self.keys.shape[0]:
            raise ShapeError(
                f"keys of {keys.shape[0]} rows for a static cache of {self.keys.shape[0]}; beams and several answers a "
                "prompt need the cache that grows"
            )
        held, count = int(self.length), keys.shape[2]
        if held + count > self.capacity:
            raise ShapeError(f"{held + count} tokens do not fit a static cache of {self.capacity}; make a larger one")
        self.keys[:, :, held : held + count] = keys
        self.values[:, :, held : held + count] = values
        self.length.fill_(held + count)
        if self._uncoded is None:
            self._uncoded = held

    def code(self) -> None:
        """Code what was written, as the cache that grows would: statistics of each row's first `fit_length` tokens.

        All that is held is coded anew if those have become more since the newest token coded, here or by `append`.

        Raises:
            NonFiniteError: a key holds NaN or infinity.
        """
        held, first, starts = int(self.length), self._uncoded or 0, self.starts.tolist()
        if first == 0 or any(fit_length(held - start) != fit_length(first - start) for start in starts):
            first = 0
            for row, start in enumerate(starts):
                fitted = slice(start + self.config.sink_tokens, start + fit_length(held - start))
                mean, deviation = self._kernels.fit(self.keys[row, :, fitted])
                self.coded.statistics.mean[row], self.coded.statistics.deviation[row] = mean, deviation
        self._kernels.encode(self.keys[:, :, first:held], self.coded, first)
        self._uncoded = None
        factors = self.coded.factors[:, :, first:held]
        real = torch.arange(first, held, device=factors.device) >= self.starts[:, None, None]
        if not bool((factors.isfinite() | ~real).all()):
            raise NonFiniteError("cached keys hold NaN or infinity; check the model's weights and its dtype")

    def append(self, key: Tensor, value: Tensor) -> None:
        """Append key [B, Hkv, D] and value [B, Hkv, Dv] of one token per row."""
        statistics, config = self.coded.statistics, self.config
        append_token(
            key, value, self.keys, self.values, self.coded.codes, self.coded.factors, statistics.mean,
            statistics.deviation, self.length, self.starts, self._plan, config.sink_tokens, config.attention_window,
            self.dense_tokens,
        )  # fmt: skip

    def read(self, query: Tensor, scaling: float) -> Tensor:
        """Attention [B, Hq, Dv] of queries [B, Hq, D] to what is held, the newest token of each row being its own."""
        statistics, config = self.coded.statistics, self.config
        output: Tensor = read_tokens(
            query, self.keys, self.values, self.coded.codes, self.coded.factors, statistics.mean, statistics.deviation,
            self._plan, self.scratch(query), self.tally, config.sink_tokens + config.attention_window, config.top_k,
            config.threshold or 0.0, scaling,
        )  # fmt: skip
        return output

    def scratch(self, query: Tensor) -> Tensor:
        """What the kernels of a step of queries [B, Hq, D] leave for each other."""
        shape = Shape.of(query, self.keys.shape[1], self.values.shape[3])
        near = self.config.sink_tokens + self.config.attention_window
        return self._shared.get(
            ("scratch", shape, self.capacity, near), lambda: Scratch(shape, self.capacity, near).memory
        )

    def reset(self) -> None:
        """Forget what is held; the memory stays."""
        self._uncoded = None
        self.length.zero_()
        self.starts.zero_()
        self.tally.zero_()

    @property
    def reads(self) -> Reads:
        """What the decode steps read so far; waits for the device."""
        rows = self.tally.shape[0]
        steps, sparse, read, cached, scored, missing = self.tally.sum(0).tolist()
        token_bytes = (self.keys.shape[-1] + self.values.shape[-1]) * self.keys.element_size()
        return Reads(
            steps=round(steps / rows),
            sparse_steps=round(sparse / rows),
            tokens_read=int(read),
            tokens_cached=int(cached),
            bytes_read=int(read) * token_bytes,
            index_bytes=int(scored) * self.coded.bytes_per_token,
            bytes_dense=int(cached) * token_bytes,
            missing_mass=missing / rows,
        )
