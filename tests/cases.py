"""What the tests of the sparse step share: random tensors, padded batches and slow definitions to compare with."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_attention_decoder.attention import LayerState
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Coded, Kernels, Statistics
from sparse_attention_decoder.kernels.reference import ReferenceKernels
from sparse_attention_decoder.selection import Rows, Selection

SEEDS = st.integers(0, 2**31 - 1)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE = ReferenceKernels()


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def skewed_keys(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys whose channels differ in mean and spread, as real ones do."""
    spread, mean = randn(seed + 1, shape[-1]).exp(), 3 * randn(seed + 2, shape[-1])
    return (randn(seed, *shape) * spread + mean).to(dtype)


def fit(keys: Tensor, kernels: Kernels = REFERENCE) -> Statistics:
    """Statistics of keys [B, H, N, D], row by row."""
    moments = [kernels.fit(row) for row in keys]
    return Statistics(torch.stack([mean for mean, _ in moments]), torch.stack([spread for _, spread in moments]))


def coded(keys: Tensor, statistics: Statistics, kernels: Kernels = REFERENCE) -> Coded:
    """The sketch of keys [B, H, N, D], with room for no more than the last block takes."""
    sketch = Coded.room(keys.shape[2], statistics)
    kernels.encode(keys, sketch, 0)
    return sketch


def token_codes(sketch: Coded, tokens: int) -> Tensor:
    """[B, H, N, 4 * W] uint8, the bytes of the first N tokens; byte b of token t lies at [t // 16, b // 4, t % 16]."""
    t, b = torch.arange(tokens).unsqueeze(-1), torch.arange(4 * sketch.codes.shape[3])
    return sketch.codes[:, :, t // 16, b // 4, t % 16, b % 4]


def levels_of(sketch: Coded, dim: int, tokens: int) -> np.ndarray:
    """Unpack by the documented layout: channel c sits in byte c % 4W of its token, bits 2*(c // 4W)."""
    packed = token_codes(sketch, tokens).numpy()
    width = packed.shape[-1]
    channels = [(packed[..., c % width].astype(int) >> (2 * (c // width))) & 3 for c in range(dim)]
    return np.stack(channels, axis=-1) - 1.5


@st.composite
def masks(draw: st.DrawFn, max_rows: int = 3, max_tokens: int = 40, min_tokens: int = 1) -> Tensor:
    """[B, T] bool: rows that are whole, padded left or right, holed, or hold a single token."""
    batch, length = draw(st.integers(1, max_rows)), draw(st.integers(min_tokens, max_tokens))
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in mask:
        kind = draw(st.sampled_from(["whole", "left", "right", "holes", "single"]))
        place = draw(st.integers(0, length - 1))
        if kind == "left":
            row[:place] = False
        elif kind == "right":
            row[place + 1 :] = False
        elif kind == "holes":
            row[draw(st.lists(st.integers(0, length - 1), max_size=length))] = False
            row[place] = True
        elif kind == "single":
            row[:] = False
            row[place] = True
    return mask


def left_padded(*counts: int) -> Tensor:
    """[B, T] bool mask of rows with that many tokens, padded on the left to the longest."""
    length = max(counts)
    return torch.arange(length) >= length - torch.tensor(counts).unsqueeze(-1)


def layer_with(keys: Tensor, values: Tensor, rows: Rows | None = None, **settings: object) -> LayerState:
    """A layer that holds these keys and values, with a small budget and no crossover unless told otherwise.

    All of them are the prompt: where the policy chooses by its queries, it has seen some.
    """
    small = {"top_k": 8, "attention_window": 6, "sink_tokens": 2, "threshold": None, "dense_below": 0}
    layer = LayerState(AttentionConfig(**{**small, **settings}))
    layer.buffer.append(keys, values)
    show_prompt(layer, rows)
    return layer


def show_prompt(layer: LayerState, rows: Rows | None = None) -> None:
    """Let the layer see queries of all it holds; a token's query is made of its key, whatever row or batch it is in."""
    keys = layer.buffer.plain_keys
    layer.see(keys.flip(-1), rows or Rows.full(keys.shape[0], keys.shape[2]), 0.25)


def chosen_sets(selection: Selection) -> list[list[set[int]]]:
    """The chosen positions of each row and KV head."""
    return [
        [set(tokens[:count].tolist()) for tokens, count in zip(row, counts, strict=True)]
        for row, counts in zip(selection.tokens, selection.counts.tolist(), strict=True)
    ]


def real_tokens(rows: Rows) -> list[list[int]]:
    """The positions of each row that are not padding."""
    if rows.valid is None:
        return [list(range(rows.length)) for _ in rows.counts]
    return [row.nonzero().flatten().tolist() for row in rows.valid]


def near_and_middle(real: list[int], sinks: int, window: int) -> tuple[list[int], list[int]]:
    """A row's real tokens, split by definition into those always read and those that may be chosen."""
    is_near = [rank < sinks or rank >= len(real) - window for rank in range(len(real))]
    near = [token for token, is_one in zip(real, is_near, strict=True) if is_one]
    return near, [token for token, is_one in zip(real, is_near, strict=True) if not is_one]


def attention_over(
    query: Tensor, keys: Tensor, values: Tensor, tokens: list[list[set[int]]], scaling: float
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Dv] and log-sum-exp [B, Hq] in float64, head by head, over each KV head's set of tokens."""
    query, keys, values = query.double(), keys.double(), values.double()
    group = query.shape[1] // keys.shape[1]
    output = torch.zeros(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    for row, of_heads in enumerate(tokens):
        for head in range(query.shape[1]):
            ids = sorted(of_heads[head // group])
            if ids:
                logits = scaling * keys[row, head // group, ids] @ query[row, head]
                lse[row, head] = logits.logsumexp(0)
                output[row, head] = logits.softmax(0) @ values[row, head // group, ids]
    return output, lse


def true_shares(query: Tensor, keys: Tensor, rows: Rows, scaling: float) -> Tensor:
    """[B, Hkv, T] float64, each token's exact share of the attention, mean over the query heads of its KV head."""
    grouped = query.double().unflatten(1, (keys.shape[1], -1))
    logits = scaling * grouped @ keys.double().transpose(-1, -2)
    if rows.valid is not None:
        logits = logits.masked_fill(~rows.valid[:, None, None], -torch.inf)
    return logits.softmax(-1).mean(2)


def assert_error_within(actual: Tensor, exact: Tensor, limit: float) -> None:
    """Fail with the place of the worst element."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact.double()).abs()
    place = tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= limit, f"error {error[place]:.3g} at {place}, allowed {limit:.3g}"
