"""Several tokens read as if each had come alone: how a draft is verified on the cache that it was made on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparse_attention_decoder.attention import LayerState
from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.kernels.reference import REFERENCE
from sparse_attention_decoder.selection import Rows

if TYPE_CHECKING:
    from sparse_attention_decoder.models.cache import SparseCache

# tokens that are verified in one pass at most: a draft and the token before it
MOST_VERIFIED = 16
# of a matrix that is multiplied with one token after another while it is in the processor's cache
_BLOCK_BYTES = 512 << 10
# rows of a matrix that libraries compute together: in blocks that cut them apart, bits change
_TOGETHER = 64


def takes_steps(state: LayerState, count: int) -> bool:
    """Whether so many new tokens are decode steps: one, or a few to be verified, and no prompt."""
    return count == 1 or (state.reads_all and count <= MOST_VERIFIED)


def attend_causally(queries: Tensor, state: LayerState, scaling: float) -> Tensor:
    """Attention [B, Hq, N, Dv] of queries [B, Hq, N, D] of the newest N tokens: as in N dense steps, bit for bit."""
    keys, values, count = state.buffer.keys, state.buffer.values, queries.shape[2]
    past, config = keys.shape[2] - count, state.config
    # one pass over the cache, however many queries share it
    state.ledger.note(state.buffer, (keys.shape[2],) * queries.shape[0], [True] * queries.shape[0])
    # as `attend_densely` reads contexts within the budget
    short = 0 if state.buffer.kv_dtype is not None else min(count, max(0, config.budget_tokens - past))
    first, kernels = past + short, state.kernels
    if short == 0:
        return kernels.attend_causal(queries, keys, values, scaling)
    within = REFERENCE.attend_causal(queries[:, :, :short], keys[:, :, :first], values[:, :, :first], scaling)
    if short == count:
        return within
    return torch.cat([within, kernels.attend_causal(queries[:, :, short:], keys, values, scaling)], 2)


@contextmanager
def reading_all(cache: "SparseCache") -> Iterator[None]:
    """While it is entered every step reads all tokens, and up to MOST_VERIFIED new ones are read as so many steps."""
    for layer in cache.sparse_layers:
        layer.state.reads_all = True
    try:
        yield
    finally:
        for layer in cache.sparse_layers:
            layer.state.reads_all = False


def is_read_whole(cache: "SparseCache") -> bool:
    """Whether `reading_all` is entered."""
    return any(layer.state.reads_all for layer in cache.sparse_layers)


def index_at(cache: "SparseCache", length: int) -> tuple[int, list[bool]]:
    """What changes where a step at this length has to make the index, or make it anew."""
    rows = Rows.full(1, length)
    return fit_length(length), [layer.state.dense_rows(rows)[0] for layer in cache.sparse_layers[:1]]


class RowsAlone(TorchFunctionMode):
    """While it is entered, each of several tokens is multiplied, and attends in layers that are not ours, as if alone.

    One product of several rows adds up in another order than one of a single row, which is enough to turn a near tie.
    Packed weights need no help, ATen's kernels multiply row by row, nor do matrices that `models.linears` multiplies.

    count: how many calls it has taken over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`linear` and `attend_shown` in place of PyTorch's, everything else as it is."""
        own = _ALONE.get(func)
        self.count += own is not None
        return (own or func)(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `functional.linear` gives for each row of x [..., K] alone; the matrix [N, K] is read from memory once."""
    rows = x.reshape(-1, x.shape[-1])[:, None]
    count = len(rows)
    size = max(1, _BLOCK_BYTES // (weight.shape[1] * weight.element_size() * _TOGETHER)) * _TOGETHER
    output = rows.new_empty(count, 1, len(weight))
    for start in range(0, len(weight), size):
        block = slice(start, start + size)
        matrix, into = weight[block].T.expand(count, -1, -1), output[:, :, block]
        if bias is None:
            torch.bmm(rows, matrix, out=into)
        else:
            # a product that starts from the bias is rounded otherwise than one to which it is added
            torch.baddbmm(bias[block].expand(count, 1, -1), rows, matrix, out=into)
    return output.view(*x.shape[:-1], len(weight))


def attend_shown(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """PyTorch's attention, each query of [1, H, N, D] alone over what its mask shows it, from first to last.

    Layers with a window or chunks: a step of one token gets just these, and no mask.
    """
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)
    outputs = []
    for row, shown in zip(query.split(1, 2), attn_mask[0, 0], strict=True):
        places = shown.nonzero()
        own = slice(int(places[0]), int(places[-1]) + 1)
        outputs.append(functional.scaled_dot_product_attention(row, key[:, :, own], value[:, :, own], **kwargs))
    return torch.cat(outputs, 2)


_ALONE: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: linear,
    functional.scaled_dot_product_attention: attend_shown,
}
