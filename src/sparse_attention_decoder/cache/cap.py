"""A hard cap on what is held: precision goes first, then the tokens that the newest queries attend to least."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention_decoder.cache.buffer import KVBuffer
from sparse_attention_decoder.cache.index import Index
from sparse_attention_decoder.cache.newest import newest_bytes
from sparse_attention_decoder.cache.sketch import Sketch
from sparse_attention_decoder.cache.witness import OBSERVED, Observation
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.kernels import BLOCK, Request, resolve, stored_bytes
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import KV_BITS

logger = logging.getLogger(__name__)

# what a cap of bytes turns keys and values into, one after the other
_LADDER = sorted(KV_BITS, key=lambda kv_dtype: -KV_BITS[kv_dtype])
# tokens that share the largest of their scores: a clue keeps its neighbours
POOL = 7


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
    """What a layer holds for each token: rows, KV heads, channels of keys and values, the dtype they come in."""

    rows: int
    heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "_Sizes":
        rows, heads, _, dim = keys.shape
        return cls(rows, heads, dim, values.shape[-1], keys.dtype)

    def bytes_of(self, tokens: int, kv_dtype: str | None, has_sketch: bool) -> int:
        """Bytes of so many tokens in all rows and heads, of the newest ones whole, and of a sketch's statistics."""
        each = stored_bytes(self.dim, kv_dtype, self.dtype) + stored_bytes(self.value_dim, kv_dtype, self.dtype)
        fixed = newest_bytes(self.dim, self.value_dim, self.dtype) if kv_dtype else 0
        if has_sketch:
            each += 4 * -(-self.dim // 16) + 2
            fixed += 2 * self.dim * max(4, self.dtype.itemsize)
        return self.rows * self.heads * (tokens * each + fixed)


class Cap:
    """Says when one layer has to give up what, to stay within `max_cache_tokens` and `max_cache_bytes`.

    Once full a layer gives up an eighth of its tokens at a time, so that the cost of choosing them and of coding the
    rest anew is shared by many steps. Each KV head keeps what the newest queries attended to most, as SnapKV does
    (arXiv:2404.14469), beside sinks and window; all heads keep the same number. docs/experiments.md has what lost.

    most: tokens that fit, in the bits that they are kept in now.
    """

    def __init__(self, config: AttentionConfig, account: Account) -> None:
        self._config, self.account = config, account
        self.reset()

    def reset(self) -> None:
        """Nothing is held."""
        self.most = 0
        self._sizes: _Sizes | None = None
        self._newest: Tensor | None = None
        self.account.note(self, 0)

    def admit(self, buffer: KVBuffer, keys: Tensor, values: Tensor) -> None:
        """Before keys [B, Hkv, N, D] and values are appended: let the buffer grow to the cap and not further.

        Raises:
            ConfigError: the cap cannot hold sinks, window and top_k. UnsupportedError: nobody made room.
            BackendError: the backend does not keep keys in fewer bits, which max_cache_bytes may need.
        """
        sizes = _Sizes.of(keys, values)
        if sizes != self._sizes:
            self._sizes = sizes
            if self._config.max_cache_bytes is not None:
                # now, not in the middle of a text
                resolve(
                    self._config.backend, Request(keys.device, sizes.dtype, sizes.dim, sizes.value_dim, _LADDER[-1])
                )
                self._require_room(buffer.kv_dtype)
            if not buffer.is_allocated:
                for kv_dtype in self._fewer(buffer.kv_dtype):
                    # more bits would not even hold the budget
                    if self._tokens(buffer.kv_dtype) < self._config.least_cache_tokens:
                        buffer.convert(kv_dtype)
            self.limit(buffer)
        if buffer.length >= self.most:
            raise UnsupportedError(
                f"{buffer.length} tokens are held and the cap is {self.most}, but what was attended to did not come "
                "through this package, which would have made room; enable() the model, or use no cap"
            )

    def limit(self, buffer: KVBuffer) -> None:
        """Let the buffer, as it is kept now, grow to the cap and not further."""
        assert self._sizes is not None
        self.most = buffer.limit = self._tokens(buffer.kv_dtype)
        self.account.agree(self._sizes.rows, buffer.kept_as, self.most)

    def see(self, buffer: KVBuffer, queries: Tensor, rows: Rows, scaling: float) -> None:
        """Queries [B, Hq, N, D] of the newest N tokens were attended; the last of them will choose what stays.

        Raises:
            UnsupportedError: the rows hold padding, and something would have to go.
        """
        if rows.valid is not None and (
            buffer.evicted or buffer.length >= self._tokens(self._roomiest(buffer.kv_dtype))
        ):
            raise UnsupportedError(
                f"rows of {min(rows.counts)} to {max(rows.counts)} real tokens in a batch at its cap of {self.most}: "
                "with padding no same number of tokens can go from each; decode prompts of one length, or one at a time"
            )
        if buffer.length + OBSERVED >= self.most:
            # of the window's queries alone it is known where they stand once tokens before them have gone
            most = min(OBSERVED, self._config.attention_window)
            earlier = [] if self._newest is None else [self._newest]
            self._newest = torch.cat([*earlier, queries.detach()[:, :, -most:]], 2)[:, :, -most:].clone()

    def demotion(self, buffer: KVBuffer) -> str | None:
        """The kv_dtype to convert to before another token comes; None where none has to or none is left."""
        if self._config.max_cache_bytes is None or buffer.length < self.most:
            return None
        fewer = self._fewer(buffer.kv_dtype)
        enough = [kv_dtype for kv_dtype in fewer if buffer.length < self._tokens(kv_dtype)]
        # where even the last is not enough, tokens have to go as well
        helps = enough[:1] or fewer[-1:]
        return helps[0] if helps and self._tokens(helps[0]) > self.most else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def eviction(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor | None:
        """Positions [B, Hkv, N] int64 to keep, ascending; None where there is room for another token."""
        if buffer.length < self.most:
            return None
        if not self.account.warned:
            self.account.warned = True
            logger.warning(
                "the cache is full at %d tokens per layer and KV head: from here on tokens are evicted, and what was "
                "evicted cannot be retrieved; raise max_cache_tokens or max_cache_bytes to hold more", self.most
            )  # fmt: skip
        return self.kept(self.scores(buffer, rows, scaling), self.most - max(1, self.most // 8))

    def kept(self, scores: Tensor, count: int) -> Tensor:
        """Positions [B, Hkv, count], ascending, of sinks, window and the best of scores [B, Hkv, T]."""
        near = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        near[: self._config.sink_tokens] = True
        near[-self._config.attention_window :] = True
        # of equal ones the first in the text
        order = scores.masked_fill(near, torch.inf).argsort(dim=-1, descending=True, stable=True)
        return order[..., :count].sort(-1).values

    def scores(self, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
        """[B, Hkv, T], the most that the newest queries pay to a token or its neighbours, mean over the query heads."""
        assert self._newest is not None
        paid = attention_of(self._newest, buffer, rows, scaling)
        return torch.nn.functional.max_pool1d(paid, POOL, stride=1, padding=POOL // 2)

    def note(self, buffer: KVBuffer, index: Index | None) -> None:
        """Count the bytes held now."""
        held = buffer.nbytes
        if isinstance(index, Sketch):
            index.limit = self.most
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

    def _fewer(self, kv_dtype: str | None) -> list[str]:
        """What a cap of bytes may still turn this into."""
        if self._config.max_cache_bytes is None:
            return []
        return list(_LADDER if kv_dtype is None else _LADDER[_LADDER.index(kv_dtype) + 1 :])

    def _tokens(self, kv_dtype: str | None) -> int:
        """Tokens that fit when they are kept so."""
        config, sizes = self._config, self._sizes
        assert sizes is not None
        if config.max_cache_bytes is None:
            assert config.max_cache_tokens is not None
            return config.max_cache_tokens
        share, has_sketch = config.max_cache_bytes // self.account.layers, config.policy == "sketch"
        fixed = sizes.bytes_of(0, kv_dtype, has_sketch)
        # codes are kept in whole blocks
        tokens = (share - fixed) // (sizes.bytes_of(1, kv_dtype, has_sketch) - fixed) // BLOCK * BLOCK
        return tokens if config.max_cache_tokens is None else min(tokens, config.max_cache_tokens)

    def _roomiest(self, kv_dtype: str | None) -> str | None:
        """Of this and what it may be turned into, what holds most: of a few tokens fewer bits save nothing."""
        return max((kv_dtype, *self._fewer(kv_dtype)), key=self._tokens)

    def _require_room(self, kv_dtype: str | None) -> None:
        config, sizes, account = self._config, self._sizes, self.account
        assert sizes is not None
        form = self._roomiest(kv_dtype)
        held = self._tokens(form)
        if held < config.least_cache_tokens:
            least = -(-config.least_cache_tokens // BLOCK) * BLOCK
            enough = account.layers * sizes.bytes_of(least, form, config.policy == "sketch")
            raise ConfigError(
                f"max_cache_bytes is {config.max_cache_bytes}: in {form or sizes.dtype} {max(0, held)} tokens for "
                f"{account.layers} layers, {sizes.rows} rows and {sizes.heads} KV heads; sinks, window and top_k need "
                f"{least}, which take {enough} bytes"
            )


def attention_of(queries: Tensor, buffer: KVBuffer, rows: Rows, scaling: float) -> Tensor:
    """[B, Hkv, T], what queries [B, Hq, N, D] of the newest N tokens pay to each, summed; mean over query heads."""
    positions = torch.arange(buffer.length - queries.shape[2], buffer.length, device=queries.device)
    positions = positions.expand(queries.shape[0], -1)
    seen = Observation(queries, positions, torch.ones_like(positions, dtype=torch.bool), rows, scaling)
    keys = buffer.keys
    paid: Tensor = seen.attention(keys).unflatten(1, (keys.shape[1], -1)).mean(2)
    return paid
