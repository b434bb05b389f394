"""What verifies a draft: several queries and several rows of a matrix, each as if it were alone, to the last bit."""

import pytest
import torch
from cases import FLOATS, REFERENCE, assert_error_within, randn, skewed_keys
from torch import Tensor
from torch.nn import functional

from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.attention import LayerState, attend_densely
from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.cpu import CpuKernels
from sparse_attention_decoder.models.verifying import RowsAlone, attend_causally, linear
from sparse_attention_decoder.selection import Rows

CPU = CpuKernels()
# around tiles of 64 and pieces of 512, and where all queries are the whole cache
LENGTHS = ((1, 1), (5, 5), (63, 16), (64, 2), (66, 3), (511, 4), (513, 7), (520, 16), (1025, 3), (1039, 16))

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_length = pytest.mark.parametrize(("tokens", "count"), LENGTHS)


def newest(seed: int, group: int, tokens: int, count: int, dim: int, dtype: torch.dtype, rows: int = 1) -> list[Tensor]:
    """Queries [B, 2 * group, count, dim] as models make them, token first; keys and values [B, 2, tokens, dim]."""
    query = randn(seed, rows, count, 2 * group, dim, dtype=dtype).transpose(1, 2)
    keys, values = (skewed_keys(seed + n, rows, 2, tokens, dim, dtype=dtype) for n in (7, 14))
    return [query, keys, values]


def alone(kernels: CpuKernels, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each query over itself and what is before it, by the kernel for one."""
    past = keys.shape[2] - query.shape[2]
    seen = [slice(0, past + n + 1) for n in range(query.shape[2])]
    return torch.stack(
        [kernels.attend_all(query[:, :, n], keys[:, :, s], values[:, :, s], None, 0.2) for n, s in enumerate(seen)], 2
    )


@pytest.mark.usefixtures("isa", "poison")
@each_length
@each_dtype
def test_every_query_gets_the_bits_that_it_gets_alone(dtype, tokens, count):
    for group, dim in ((1, 64), (3, 64), (7, 24), (2, 136)):
        query, keys, values = newest(tokens, group, tokens, count, dim, dtype, rows=2)
        assert torch.equal(CPU.attend_causal(query, keys, values, 0.2), alone(CPU, query, keys, values))


@pytest.mark.usefixtures("isa")
def test_more_heads_than_a_kernel_takes_are_served_query_by_query():
    query, keys, values = newest(0, 32, 200, 9, 16, torch.float32)
    assert torch.equal(CPU.attend_causal(query, keys, values, 0.2), alone(CPU, query, keys, values))


@pytest.mark.usefixtures("isa", "poison")
@each_dtype
def test_error_against_float64_is_at_most_twice_pytorchs(dtype):
    query, keys, values = newest(3, 3, 600, 9, 64, dtype)
    exact = REFERENCE.attend_causal(query.double(), keys.double(), values.double(), 0.2)
    plain = REFERENCE.attend_causal(query, keys, values, 0.2)
    limit = 2 * float((plain.double() - exact).abs().max()) + 1e-6
    assert_error_within(CPU.attend_causal(query, keys, values, 0.2), exact, limit)


@pytest.mark.usefixtures("isa")
def test_the_future_is_invisible():
    query, keys, values = newest(1, 3, 700, 8, 64, torch.float32)
    before = CPU.attend_causal(query, keys, values, 0.2)
    keys[:, :, -3:], values[:, :, -3:] = torch.nan, torch.nan
    after = CPU.attend_causal(query, keys, values, 0.2)
    assert torch.equal(after[:, :, :5], before[:, :, :5])
    assert after[:, :, 5:].isnan().all()


@pytest.mark.usefixtures("isa")
def test_queries_that_do_not_fit_are_refused():
    query, keys, values = newest(1, 3, 8, 8, 64, torch.float32)
    for wrong in (query[:, :5], query[..., :32], query[:, :, :0]):
        with pytest.raises(ShapeError):
            CPU.attend_causal(wrong, keys, values, 0.2)
    with pytest.raises(ShapeError, match="N tokens"):
        CPU.attend_causal(query, keys[:, :, :7], values[:, :, :7], 0.2)


@pytest.mark.parametrize("tokens", [20, 30, 33, 40, 90])
def test_several_tokens_get_what_dense_steps_give_within_the_budget_and_beyond(tokens):
    # the budget is 32: up to there dense steps are PyTorch's
    layer = LayerState(AttentionConfig(top_k=8, attention_window=20, sink_tokens=4))
    query, keys, values = newest(tokens, 3, tokens, 6, 64, torch.float32)
    layer.buffer.append(keys, values)
    together = attend_causally(query, layer, 0.2)
    for n in range(6):
        layer.buffer.truncate(0)
        held = tokens - 5 + n
        layer.buffer.append(keys[:, :, :held], values[:, :, :held])
        assert torch.equal(together[:, :, n], attend_densely(query[:, :, n], layer, Rows.full(1, held), 0.2))


@pytest.mark.usefixtures("poison")
@each_dtype
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(64, 64), (577, 576), (128, 896), (1000, 72), (576, 1536), (2000, 576), (1, 8)]
)
def test_a_matrix_multiplies_every_row_as_it_does_alone(rows, columns, biased, dtype):
    weight, bias = randn(rows, rows, columns, dtype=dtype), randn(1, rows, dtype=dtype) if biased else None
    for count in (2, 5, 16):
        x = randn(count, 1, count, columns, dtype=dtype)
        one_by_one = torch.cat([functional.linear(row, weight, bias) for row in x.split(1, 1)], 1)
        assert torch.equal(linear(x, weight, bias), one_by_one)
        with RowsAlone():
            assert torch.equal(functional.linear(x, weight, bias), one_by_one)
            assert torch.equal(functional.linear(x, weight, bias=bias), one_by_one)
