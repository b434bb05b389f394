import pytest
import torch
from cases import FLOATS, assert_error_within, attention_over, chosen_sets, layer_with, left_padded, randn, show_prompt
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attention_decoder.attention import LayerState, decode_step
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import BackendError, NonFiniteError, ShapeError
from sparse_attention_decoder.kernels.reference import ReferenceKernels
from sparse_attention_decoder.policies import resolve
from sparse_attention_decoder.selection import Reads, Rows
from sparse_attention_decoder.tables import POLICIES

pytestmark = pytest.mark.usefixtures("poison")


def tensors(batch: int = 2, tokens: int = 100, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query of 6 heads, keys of 2 heads and 16 channels, values of 20."""
    return (
        randn(0, batch, 6, 16, dtype=dtype),
        randn(1, batch, 2, tokens, 16, dtype=dtype),
        randn(2, batch, 2, tokens, 20, dtype=dtype),
    )


# --- what is read, counted by hand: 16 tokens of 100 per head, (16 + 20) numbers of 4 bytes a token

TOKEN = 144
HAND_COUNTS = {
    # the middle's 92 tokens: 4 bytes of codes and 2 of factor
    "sketch": Reads(1, 1, 64, 400, 64 * TOKEN, 4 * 92 * 6, 400 * TOKEN),
    # the middle's 92 keys
    "oracle": Reads(1, 1, 64, 400, 64 * TOKEN, 4 * 92 * 16 * 4, 400 * TOKEN),
    "window": Reads(1, 1, 32, 400, 32 * TOKEN, 0, 400 * TOKEN),
    "streaming": Reads(1, 1, 32, 400, 32 * TOKEN, 0, 400 * TOKEN),
    # what is kept was chosen once
    "snapkv": Reads(1, 1, 64, 400, 64 * TOKEN, 0, 400 * TOKEN),
    # a score of 4 bytes for each of the 8 tokens kept
    "h2o": Reads(1, 1, 64, 400, 64 * TOKEN, 4 * 8 * 4, 400 * TOKEN),
    "dense": Reads(1, 0, 400, 400, 400 * TOKEN, 0, 400 * TOKEN),
    # the bounds of the 6 pages that hold a token of the middle; how many are read depends on which
    "quest": Reads(1, 1, 0, 400, 0, 4 * 6 * 2 * 16 * 4, 400 * TOKEN),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_reads_equal_a_count_by_hand(policy):
    query, keys, values = tensors()
    layer, expected = layer_with(keys, values, policy=policy), HAND_COUNTS[policy]
    decoded = decode_step(query, layer, Rows.full(2, 100), 0.25)
    if policy == "quest":
        expected.tokens_read = 4 * 8 + sum(len(head) for row in chosen_sets(decoded.selection) for head in row)
        expected.bytes_read = expected.tokens_read * TOKEN
    if policy in ("sketch", "oracle"):
        # added up as the layer does: by row first
        expected.missing_mass = float(decoded.selection.missing_mass.mean(-1).mean())
        assert 0 < expected.missing_mass < 1
    assert layer.reads == expected
    assert layer.reads.share_read == (expected.bytes_read + expected.index_bytes) / (400 * TOKEN)
    decode_step(query, layer, Rows.full(2, 100), 0.25)
    expected.add(layer.reads)
    assert layer.reads.tokens_read == 2 * expected.tokens_read / 3
    assert layer.reads.steps == 2


def test_the_bytes_of_half_precision_are_half():
    reads = []
    for dtype in (torch.float32, torch.bfloat16):
        query, keys, values = tensors(dtype=dtype)
        layer = layer_with(keys, values)
        decode_step(query, layer, Rows.full(2, 100), 0.25)
        reads.append(layer.reads)
    assert reads[1].tokens_read == reads[0].tokens_read
    assert (2 * reads[1].bytes_read, 2 * reads[1].bytes_dense) == (reads[0].bytes_read, reads[0].bytes_dense)
    assert reads[1].index_bytes == reads[0].index_bytes


def test_padding_is_neither_read_nor_cached():
    query, keys, values = tensors()
    layer = layer_with(keys, values)
    decode_step(query, layer, Rows.from_mask(left_padded(100, 60)), 0.25)
    assert layer.reads.tokens_cached == 2 * (100 + 60)
    assert layer.reads.tokens_read == 2 * (16 + 16)
    assert layer.reads.index_bytes == 2 * (92 + 52) * 6


# --- which rows are dense


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "dense"])
def test_a_short_row_in_a_mixed_batch_equals_its_dense_result_and_the_long_one_its_sparse_result(policy):
    query, keys, values = tensors(dtype=torch.float64)
    mask = left_padded(100, 7)
    layer = layer_with(keys, values, Rows.from_mask(mask), policy=policy)
    decoded = decode_step(query, layer, Rows.from_mask(mask), 0.25)
    whole, _ = attention_over(query, keys, values, [[set(range(100))] * 2, [set(range(93, 100))] * 2], 0.25)
    alone = decode_step(query[:1], layer_with(keys[:1], values[:1], policy=policy), Rows.full(1, 100), 0.25)
    assert_error_within(decoded.output[1], whole[1], 1e-12)
    assert_error_within(decoded.output[0], alone.output[0], 1e-12)
    assert decoded.lse is None
    assert layer.reads.tokens_cached == 2 * 107
    if policy in ("sketch", "oracle"):
        assert layer.reads.tokens_read == 2 * (16 + 7)


def test_a_row_that_is_read_whole_misses_nothing():
    query, keys, values = tensors()
    layer = layer_with(keys, values, dense_below=80)
    decoded = decode_step(query, layer, Rows.from_mask(left_padded(100, 60)), 0.25)
    of_the_long_row = float(decoded.selection.missing_mass[0].mean())
    assert layer.reads.tokens_read == 2 * (16 + 60)
    # whether the mean is taken over all rows or over the sparse ones
    assert layer.reads.missing_mass in (pytest.approx(of_the_long_row / 2), pytest.approx(of_the_long_row))


@pytest.mark.parametrize(("dense_below", "is_dense"), [(0, False), (100, False), (101, True), (None, True)])
def test_contexts_below_the_crossover_are_dense(dense_below, is_dense):
    query, keys, values = tensors()
    layer = layer_with(keys, values, dense_below=dense_below)
    decoded = decode_step(query, layer, Rows.full(2, 100), 0.25)
    assert (decoded.selection is None) is is_dense
    assert (decoded.lse is None) is is_dense


def test_without_a_crossover_of_its_own_the_config_takes_that_of_the_backend(monkeypatch):
    monkeypatch.setattr(ReferenceKernels, "crossover_tokens", 100)
    query, keys, values = tensors()
    assert decode_step(query, layer_with(keys, values, dense_below=None), Rows.full(2, 100), 0.25).selection is not None


@pytest.mark.parametrize(("tokens", "is_dense"), [(16, True), (17, False)])
def test_contexts_within_the_budget_are_dense(tokens, is_dense):
    query, keys, values = tensors(tokens=tokens)
    decoded = decode_step(query, layer_with(keys, values), Rows.full(2, tokens), 0.25)
    assert (decoded.selection is None) is is_dense


# --- precision


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_dtype_is_as_accurate_as_pytorch_on_the_tokens_read(policy, dtype):
    query, keys, values = tensors(batch=1, dtype=dtype)
    decoded = decode_step(query, layer_with(keys, values, policy=policy), Rows.full(1, 100), 0.25)
    chosen = [set()] * 2 if decoded.selection is None else chosen_sets(decoded.selection)[0]
    near = range(100) if policy == "dense" else [0, 1, *range(94, 100)]
    read = [sorted(own | set(near)) for own in chosen]
    outputs = []
    for head, ids in enumerate(read):
        picked = keys[:, head, None, ids], values[:, head, None, ids]
        outputs.append(scaled_dot_product_attention(query[:, None, 3 * head : 3 * head + 3], *picked, scale=0.25))
    plain = torch.cat(outputs, dim=2)[:, 0]
    exact, _ = attention_over(query, keys, values, [[set(ids) for ids in read]], 0.25)
    worst = float((plain.double() - exact).abs().max())
    assert decoded.output.dtype == dtype
    assert_error_within(decoded.output, exact, 2 * worst + torch.finfo(dtype).eps / 8)


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (16, 20), (260, 260)])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("mask", [left_padded(30, 30), left_padded(30, 9)], ids=["whole", "padded"])
def test_dense_attention_is_softmax_over_every_real_token(dim, value_dim, group, mask):
    query, keys = (randn(n, 2, 2 * group, size, dim, dtype=torch.float64) for n, size in ((0, 1), (1, 30)))
    keys, values = keys[:, :2], randn(2, 2, 2, 30, value_dim, dtype=torch.float64)
    decoded = decode_step(query[:, :, 0], layer_with(keys, values, policy="dense"), Rows.from_mask(mask), 0.1)
    real = [[set(row.nonzero().flatten().tolist())] * 2 for row in mask]
    assert_error_within(decoded.output, attention_over(query[:, :, 0], keys, values, real, 0.1)[0], 1e-12)


# --- refusals


@pytest.mark.parametrize(
    "shape", [(2, 6, 15), (2, 5, 16), (3, 6, 16), (2, 6, 1, 16), (6, 16)], ids=["dim", "heads", "rows", "4-D", "2-D"]
)
def test_a_query_that_does_not_fit_the_cache_is_refused(shape):
    _, keys, values = tensors()
    with pytest.raises(ShapeError, match=r"cache expects \[2, a multiple of 2, 16\]"):
        decode_step(torch.zeros(shape), layer_with(keys, values), Rows.full(2, 100), 0.25)


@pytest.mark.parametrize(("batch", "length"), [(2, 99), (2, 101), (1, 100), (3, 100)])
def test_rows_that_do_not_describe_the_cache_are_refused(batch, length):
    query, keys, values = tensors()
    with pytest.raises(ShapeError, match=f"{batch} rows of {length} tokens; the cache holds 2 of 100"):
        decode_step(query, layer_with(keys, values), Rows.full(batch, length), 0.25)


def test_a_step_before_any_token_is_refused():
    with pytest.raises(ShapeError, match="the cache is empty"):
        decode_step(torch.zeros(1, 2, 4), LayerState(AttentionConfig()), Rows.full(1, 1), 0.25)


def test_keys_that_are_not_finite_are_refused():
    query, keys, values = tensors()
    keys[1, 1, 50, 3] = torch.nan
    with pytest.raises(NonFiniteError):
        decode_step(query, layer_with(keys, values), Rows.full(2, 100), 0.25)


def test_keys_of_an_integer_dtype_are_refused():
    layer = layer_with(torch.zeros(1, 1, 100, 4, dtype=torch.int32), torch.zeros(1, 1, 100, 4, dtype=torch.int32))
    with pytest.raises(BackendError, match="not floating point"):
        decode_step(torch.zeros(1, 1, 4), layer, Rows.full(1, 100), 0.25)


# --- the state of a layer


@pytest.mark.parametrize("policy", POLICIES)
def test_a_reset_layer_is_a_new_one(policy):
    query, keys, values = tensors()
    layer = layer_with(keys, values, policy=policy)
    decode_step(query, layer, Rows.full(2, 100), 0.25)
    layer.reset()
    assert not layer.buffer.is_allocated
    assert layer.reads == Reads()
    query, keys, values = tensors(batch=3, tokens=50)
    layer.buffer.append(keys[..., :12], values)
    show_prompt(layer)
    again = decode_step(query[..., :12], layer, Rows.full(3, 50), 0.25)
    fresh = decode_step(query[..., :12], layer_with(keys[..., :12], values, policy=policy), Rows.full(3, 50), 0.25)
    assert torch.equal(again.output, fresh.output)


def test_a_reset_layer_asks_again_which_backend_serves():
    query, keys, values = tensors()
    layer = layer_with(keys, values)
    decode_step(query, layer, Rows.full(2, 100), 0.25)
    layer.reset()
    layer.buffer.append(keys.int(), values.int())
    with pytest.raises(BackendError, match="not floating point"):
        decode_step(query, layer, Rows.full(2, 100), 0.25)


# tests/test_eviction.py has this of policies whose choice depends on when they made it
@pytest.mark.parametrize("policy", [name for name in POLICIES if not resolve(name).needs_witness])
def test_a_layer_begun_under_inference_mode_goes_on_outside_it(policy):
    query, keys, values = tensors()
    with torch.inference_mode():
        layer = layer_with(keys[:, :, :90], values[:, :, :90], policy=policy)
        decode_step(query, layer, Rows.full(2, 90), 0.25)
        layer.take_rows(torch.tensor([0, 1]))
    layer.buffer.append(keys[:, :, 90:], values[:, :, 90:])
    outside = decode_step(query, layer, Rows.full(2, 100), 0.25)
    plain = decode_step(query, layer_with(keys, values, policy=policy), Rows.full(2, 100), 0.25)
    assert torch.equal(outside.output, plain.output)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_needs_no_graph_and_leaves_none(policy):
    query, keys, values = (tensor.requires_grad_() for tensor in tensors())
    decoded = decode_step(query, layer_with(keys, values, policy=policy), Rows.full(2, 100), 0.25)
    assert not decoded.output.requires_grad
