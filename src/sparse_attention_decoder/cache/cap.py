"""A hard cap on what is held: precision goes first, then the tokens that the newest queries attend to least."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention_decoder.cache.buffer import KVBuffer
from sparse_attention_decoder.cache.index import Index
from sparse_attention_decoder.cache.sketch import Sketch
from sparse_attention_decoder.cache.witness import OBSERVED, Observation
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.kernels import BLOCK
from sparse_attention_decoder.selection import Rows

logger = logging.getLogger(__name__)


class Account:
    """What the layers of one cache hold together.

    layers: how many share max_cache_bytes.
    now, most: bytes held by layers with a cap, now and at most since the last reset.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.now = self.most = 0
        self.warned = False
        self._of: dict[Cap, int] = {}
        self._agreed: dict[tuple[int, str], int] = {}

    def note(self, layer: "Cap", held: int) -> None:
        """This layer holds so many bytes now."""
        self.now += held - self._of.get(layer, 0)
        self._of[layer] = held
        self.most = max(self.most, self.now) if self.now else 0

    def agree(self, rows: int, kv_dtype: str, tokens: int) -> None:
        """Every layer must have the same cap in tokens: one mask serves them all."""
        agreed = self._agreed.setdefault((rows, kv_dtype), tokens)
        if agreed != tokens:
            raise UnsupportedError(
                f"layers of different sizes: max_cache_bytes is {agreed} tokens for one and {tokens} for another; "
                "use max_cache_tokens"
            )


@dataclass(frozen=True)
class _Sizes:
    """What a layer's tokens take: rows, KV heads, bytes of a token's key and value, channels of a key."""

    rows: int
    heads: int
    token_bytes: int
    dim: int
    work_bytes: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "_Sizes":
        rows, heads, _, dim = keys.shape
        token = (dim + values.shape[-1]) * keys.element_size()
        return cls(rows, heads, token, dim, max(4, keys.element_size()))


class Cap:
    """Keeps one layer's buffer and sketch within `max_cache_tokens` and `max_cache_bytes`.

    Once full it gives up an eighth of its tokens at a time, so that the cost of choosing them and of coding the rest
    anew is shared by many steps. Each KV head keeps those that the newest queries attended to most, beside sinks and
    window; all heads keep the same number. docs/experiments.md has the rules that lost.
    """

    def __init__(self, config: AttentionConfig, account: Account) -> None:
        self._config, self.account = config, account
        self.reset()

    def reset(self) -> None:
        """Nothing is held."""
        self._sizes: _Sizes | None = None
        self._most = 0
        self._newest: Tensor | None = None
        self.account.note(self, 0)

    def admit(self, buffer: KVBuffer, keys: Tensor, values: Tensor) -> None:
        """Before keys [B, Hkv, N, D] and values are appended: let the buffer grow to the cap and not further.

        Raises:
            ConfigError: the cap cannot hold sinks, window and top_k. UnsupportedError: nobody made room.
        """
        sizes = _Sizes.of(keys, values)
        if sizes != self._sizes:
            self._sizes = sizes
            self._limit(buffer)
        if buffer.length >= self._most:
            raise UnsupportedError(
                f"{buffer.length} tokens are held and the cap is {self._most}, but what was attended to did not come "
                "through this package, which would have made room; enable() the model, or use no cap"
            )

    def fit(self, buffer: KVBuffer, queries: Tensor, rows: Rows, scaling: float) -> bool:
        """Make room for a token after queries [B, Hq, N, D] of the newest N were attended; True if tokens were evicted.

        Raises:
            UnsupportedError: the rows hold padding, and something would have to go.
        """
        if rows.valid is not None and (buffer.evicted or buffer.length >= self._most):
            raise UnsupportedError(
                f"rows of {min(rows.counts)} to {max(rows.counts)} real tokens in a batch at its cap of {self._most}: "
                "with padding no same number of tokens can go from each; decode prompts of one length, or one at a time"
            )
        if buffer.length + OBSERVED >= self._most:
            self._see(queries)
        if buffer.length < self._most:
            return False
        self._evict(buffer, rows, scaling)
        return True

    def note(self, buffer: KVBuffer, index: Index | None) -> None:
        """Count the bytes held now."""
        held = buffer.nbytes
        if isinstance(index, Sketch):
            index.limit = self._most
            held += index.nbytes
        self.account.note(self, held)

    def truncate(self) -> None:
        """Tokens were taken back, and their queries with them."""
        self._newest = None

    def take_rows(self, rows: Tensor) -> None:
        """Let row i be what row `rows[i]` [B'] int64 was.

        Raises:
            UnsupportedError: more rows than there were, under max_cache_bytes.
        """
        if self._sizes is None:
            return
        if self._config.max_cache_bytes is not None and len(rows) > self._sizes.rows:
            raise UnsupportedError(
                f"{self._sizes.rows} rows cannot become {len(rows)} under max_cache_bytes, for what each may hold is "
                "decided when it is read; read the prompt once a row (generate does), or use max_cache_tokens"
            )
        if self._newest is not None:
            self._newest = self._newest.index_select(0, rows.to(self._newest.device))

    def _limit(self, buffer: KVBuffer) -> None:
        config = self._config
        most = config.max_cache_tokens
        if config.max_cache_bytes is not None:
            tokens = self._tokens_within(config.max_cache_bytes)
            most = tokens if most is None else min(most, tokens)
        assert most is not None and self._sizes is not None
        self.account.agree(self._sizes.rows, "float", most)
        self._most = buffer.limit = most

    def _tokens_within(self, bytes_held: int) -> int:
        """Tokens that a layer's share of the bytes holds."""
        sizes, config = self._sizes, self._config
        assert sizes is not None
        heads, layers = sizes.rows * sizes.heads, self.account.layers
        token, fixed = sizes.token_bytes, 0
        if config.policy == "sketch":
            token += 4 * -(-sizes.dim // 16) + 2
            fixed = 2 * sizes.dim * sizes.work_bytes
        # codes are kept in whole blocks
        tokens = (bytes_held // layers // heads - fixed) // token // BLOCK * BLOCK
        if tokens < config.least_cache_tokens:
            least = -(-config.least_cache_tokens // BLOCK) * BLOCK
            raise ConfigError(
                f"max_cache_bytes is {bytes_held}, which is {max(0, tokens)} tokens for {layers} layers, {sizes.rows} "
                f"rows and {sizes.heads} KV heads; sinks, window and top_k need {least}, which take "
                f"{(least * token + fixed) * heads * layers} bytes"
            )
        return tokens

    def _see(self, queries: Tensor) -> None:
        # of the window's queries alone it is known where they stand once tokens before them have gone
        most = min(OBSERVED, self._config.attention_window)
        earlier = [] if self._newest is None else [self._newest]
        self._newest = torch.cat([*earlier, queries.detach()[:, :, -most:]], 2)[:, :, -most:].clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _evict(self, buffer: KVBuffer, rows: Rows, scaling: float) -> None:
        if not self.account.warned:
            self.account.warned = True
            logger.warning(
                "the cache is full at %d tokens per layer and KV head: from here on tokens are evicted, and what was "
                "evicted cannot be retrieved; raise max_cache_tokens or max_cache_bytes to hold more", self._most
            )  # fmt: skip
        count = self._most - max(1, self._most // 8)
        buffer.take_tokens(self.kept(self.scores(buffer, rows, scaling), count), self._most)

    def kept(self, scores: Tensor, count: int) -> Tensor:
        """Positions [B, Hkv, count], ascending, of sinks, window and the best of scores [B, Hkv, T]."""
        near = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        near[: self._config.sink_tokens] = True
        near[-self._config.attention_window :] = True
        # of equal ones the first in the text
        order = scores.masked_fill(near, torch.inf).argsort(dim=-1, descending=True, stable=True)
        return order[..., :count].sort(-1).values

    def scores(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
        """[B, Hkv, T], the attention that the newest queries pay to what is held, mean over the query heads."""
        assert self._newest is not None
        return attention_of(self._newest, buffer, rows, scaling)


def attention_of(queries: Tensor, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
    """[B, Hkv, T], what queries [B, Hq, N, D] of the newest N tokens pay to each, summed; mean over query heads."""
    positions = torch.arange(buffer.length - queries.shape[2], buffer.length, device=queries.device)
    positions = positions.expand(queries.shape[0], -1)
    seen = Observation(queries, positions, torch.ones_like(positions, dtype=torch.bool), rows, scaling)
    keys = buffer.keys
    paid: Tensor = seen.attention(keys).unflatten(1, (keys.shape[1], -1)).mean(2)
    return paid
