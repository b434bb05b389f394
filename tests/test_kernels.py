import logging
import math

import numpy as np
import pytest
import torch
from cases import (
    FLOATS,
    REFERENCE,
    SEEDS,
    assert_error_within,
    attention_over,
    coded,
    fit,
    levels_of,
    masks,
    randn,
    skewed_keys,
    token_codes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_attention_decoder import kernels
from sparse_attention_decoder.errors import BackendError, ShapeError
from sparse_attention_decoder.kernels import BLOCK, Coded, Request, Statistics, resolve
from sparse_attention_decoder.kernels.reference import STEP
from sparse_attention_decoder.kernels.rotation import rotate, rotation_parts
from sparse_attention_decoder.selection import Rows, Selection

CPU = torch.device("cpu")
DIMS = (1, 2, 3, 48, 64, 66, 80, 96, 128, 256)

pytestmark = pytest.mark.usefixtures("poison")


def rotation(dim: int) -> np.ndarray:
    """The matrix that `rotate` multiplies columns by."""
    return rotate(torch.eye(dim, dtype=torch.float64)).T.numpy()


def standardised(keys: Tensor, statistics: Statistics) -> np.ndarray:
    rotated = keys.double().numpy() @ rotation(keys.shape[-1]).T
    return (rotated - statistics.mean.double().numpy()[:, :, None]) / statistics.deviation.double().numpy()[:, :, None]


# --- rotation


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_orthogonal(dim):
    np.testing.assert_allclose(rotation(dim) @ rotation(dim).T, np.eye(dim), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dim", [dim for dim in DIMS if dim > 3])
def test_the_rotation_spreads_every_channel(dim):
    # a channel that stayed alone would keep its outliers
    assert np.abs(rotation(dim)).max() < 0.95


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_vector_rotates_alone_as_in_a_batch_bit_for_bit(dim, dtype):
    keys = randn(dim, 2, 2, 60, dim, dtype=dtype)
    together = rotate(keys)
    assert together.dtype == torch.float32
    # a step appends one token of every row and head, or, with one row and one KV head, a single vector
    assert torch.equal(torch.cat([rotate(token) for token in keys.split(1, dim=2)], dim=2), together)
    assert torch.equal(torch.stack([rotate(vector) for vector in keys[1, 0]]), together[1, 0])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_rotating_keeps_lengths_and_products(dtype):
    first, second = randn(0, 50, 64, dtype=dtype), randn(1, 50, 64, dtype=dtype)
    products = (rotate(first).double() * rotate(second).double()).sum(-1)
    assert_error_within(products, (first.double() * second.double()).sum(-1), 1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dim", DIMS)
def test_the_parts_of_the_rotation_make_up_its_matrix(dim):
    scale, signs, cosine = rotation_parts(dim).double().split([1, dim, (dim // (dim & -dim)) ** 2])
    odd = dim // (dim & -dim)
    hadamard = np.array([[1.0]])
    while len(hadamard) < dim & -dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    made = float(scale) * np.kron(cosine.view(odd, odd).numpy(), hadamard) * signs.numpy()
    np.testing.assert_allclose(made, rotation(dim), rtol=0, atol=1e-6)


# --- statistics and codes


@pytest.mark.parametrize("dim", DIMS)
def test_statistics_are_the_mean_and_deviation_of_the_rotated_keys(dim):
    keys = skewed_keys(dim, 2, 33, dim, dtype=torch.float64)
    rotated = keys.numpy() @ rotation(dim).T
    mean, deviation = REFERENCE.fit(keys)
    np.testing.assert_allclose(mean.numpy(), rotated.mean(1), rtol=0, atol=1e-12 * np.abs(rotated).max())
    np.testing.assert_allclose(deviation.numpy(), rotated.std(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_statistics_of_no_keys_leave_keys_as_they_are(dtype):
    mean, deviation = REFERENCE.fit(randn(0, 2, 0, 8, dtype=dtype))
    assert mean.dtype == deviation.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mean.eq(0).all()
    assert deviation.eq(1).all()


@pytest.mark.parametrize("dim", DIMS)
def test_a_code_is_the_nearest_level_of_each_channel(dim):
    keys = skewed_keys(dim, 2, 2, 17, dim, dtype=torch.float64)
    statistics = fit(keys)
    sketch = coded(keys, statistics)
    assert (sketch.codes.dtype, sketch.codes.shape) == (torch.uint8, (2, 2, 2, math.ceil(dim / 16), 16, 4))
    assert (sketch.factors.dtype, sketch.factors.shape) == (torch.float16, (2, 2, 32))
    assert sketch.bytes_per_token == 4 * math.ceil(dim / 16) + 2
    distance = np.abs(standardised(keys, statistics)[..., None] - STEP * np.array([-1.5, -0.5, 0.5, 1.5]))
    np.testing.assert_array_equal(levels_of(sketch, dim, 17), distance.argmin(-1) - 1.5)


def test_the_step_is_the_best_for_a_normal_channel():
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)

    def error(step: float) -> float:
        nearest = step * ((z / step).floor().clamp(-2, 1) + 0.5)
        return float(((z - nearest).square() * (-z.square() / 2).exp()).sum())

    assert error(STEP) < min(error(0.99 * STEP), error(1.01 * STEP))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_keys_coded_one_by_one_equal_keys_coded_in_bulk_bit_for_bit(dim, dtype):
    keys = skewed_keys(dim, 2, 2, 20, dim, dtype=dtype)
    statistics = fit(keys)
    bulk = coded(keys, statistics)
    one = Statistics(statistics.mean[:1, :1], statistics.deviation[:1, :1])
    for rows, stats in ((slice(None), statistics), (slice(1), one)):
        piecewise = Coded.room(20, stats)
        for token in range(20):
            REFERENCE.encode(keys[rows, rows, token : token + 1], piecewise, token)
        assert torch.equal(piecewise.codes, bulk.codes[rows, rows])
        assert torch.equal(piecewise.factors, bulk.factors[rows, rows])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_the_factor_makes_the_product_of_a_code_with_its_own_key_exact(dim, scale):
    keys = scale * skewed_keys(dim, 2, 2, 25, dim, dtype=torch.float64)
    statistics = fit(keys)
    sketch = coded(keys, statistics)
    z = standardised(keys, statistics)
    product = (z * levels_of(sketch, dim, 25)).sum(-1) * sketch.factors[:, :, :25].double().numpy()
    # half a unit in the last place of a float16 factor, and as much again below its smallest normal number
    np.testing.assert_allclose(product, (z * z).sum(-1), rtol=2.0**-11, atol=2.0**-24 * 1.5 * np.abs(z).sum(-1).max())


def test_a_key_that_is_the_mean_scores_the_mean():
    keys = torch.ones(1, 1, 3, 8) * randn(0, 8)
    sketch = coded(keys, fit(keys))
    assert sketch.factors.eq(0).all()
    query = randn(1, 1, 2, 8)
    estimate = REFERENCE.score(query, sketch, 0, 3, 1.0)
    assert_error_within(estimate, query[:, None] @ keys[:, 0, :, :, None].squeeze(-1).transpose(-1, -2), 1e-5)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_keys_that_never_varied_do_not_blind_the_codes_of_later_keys(dtype):
    # a prompt of one repeated token, in a layer without positions; the next key is another one
    constant, later = randn(0, 1, 1, 1, 64, dtype=dtype), randn(1, 1, 1, 1, 64, dtype=dtype)
    statistics = fit(constant.expand(1, 1, 37, 64))
    query = (later - constant)[:, :, 0]
    estimate = REFERENCE.score(query, coded(later, statistics), 0, 1, 1.0)
    exact = (query.double() * later[:, :, 0].double()).sum(-1)[..., None, None]
    assert_error_within(estimate, exact, 0.01 * float(query.double().square().sum()))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 20), SEEDS)
def test_coding_writes_the_tokens_it_is_given_and_no_others(pieces, start, seed):
    keys = skewed_keys(seed, 2, 2, sum(pieces), 24)
    statistics = fit(keys)
    whole, sketch = coded(keys, statistics), Coded.room(start + sum(pieces) + 5, statistics)
    sketch.codes.fill_(0xA5)
    sketch.factors.fill_(7.0)
    at = start
    for piece in keys.split(pieces, 2):
        REFERENCE.encode(piece, sketch, at)
        at += piece.shape[2]
    room = sketch.factors.shape[2]
    assert room % BLOCK == 0
    codes = token_codes(sketch, room)
    assert torch.equal(codes[:, :, start:at], token_codes(whole, at - start))
    assert torch.equal(sketch.factors[:, :, start:at], whole.factors[:, :, : at - start])
    assert torch.cat([codes[:, :, :start], codes[:, :, at:]], 2).eq(0xA5).all()
    assert torch.cat([sketch.factors[:, :, :start], sketch.factors[:, :, at:]], 2).eq(7).all()


# --- scores


@pytest.mark.parametrize("dim", DIMS)
@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 8), st.integers(1, 4), SEEDS)
def test_scores_equal_a_loop_over_heads_and_tokens(dim, batch, heads, group, tokens, seed):
    keys = skewed_keys(seed, batch, heads, tokens, dim, dtype=torch.float64)
    query = randn(seed, batch, heads * group, dim, dtype=torch.float64)
    statistics = fit(skewed_keys(seed, batch, heads, 9, dim, dtype=torch.float64))
    sketch = coded(keys, statistics)
    scores = REFERENCE.score(query, sketch, 0, tokens, 0.25)
    assert (scores.dtype, scores.shape) == (torch.float64, (batch, heads, group, tokens))

    rotated = query.numpy() @ rotation(dim).T
    mean, deviation, level = statistics.mean.numpy(), statistics.deviation.numpy(), levels_of(sketch, dim, tokens)
    for row, head, token in np.ndindex(batch, heads, tokens):
        for member in range(group):
            q = rotated[row, head * group + member]
            weights = q * deviation[row, head]
            # eight bits a weight, symmetric: the largest becomes 127
            step = np.abs(weights).max() / 127
            product = (np.round(weights / step) * level[row, head, token]).sum() * step
            expected = 0.25 * (product * float(sketch.factors[row, head, token]) + q @ mean[row, head])
            assert float(scores[row, head, member, token]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_of_every_dtype_are_float32_and_near_those_of_float64(dtype):
    keys, query = skewed_keys(0, 2, 2, 40, 64, dtype=dtype), randn(1, 2, 6, 64, dtype=dtype)
    statistics = fit(keys)
    sketch = coded(keys, statistics)
    scores = REFERENCE.score(query, sketch, 0, 40, 0.125)
    wide = Coded(sketch.codes, sketch.factors, Statistics(statistics.mean.double(), statistics.deviation.double()))
    assert scores.dtype == torch.float32
    exact = REFERENCE.score(query.double(), wide, 0, 40, 0.125)
    assert_error_within(scores, exact, 1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("dim", [48, 64, 128, 256])
def test_scores_follow_the_exact_logits(dim):
    keys, query = randn(dim, 2, 2, 512, dim), randn(dim + 1, 2, 4, dim)
    estimate = REFERENCE.score(query, coded(keys, fit(keys)), 0, 512, dim**-0.5)
    tokens = torch.arange(512).expand(2, 2, -1)
    exact = REFERENCE.exact_logits(query, keys, tokens, dim**-0.5)
    for ours, true in zip(estimate.flatten(0, 2), exact.flatten(0, 2), strict=True):
        assert torch.corrcoef(torch.stack([ours, true]))[0, 1] > 0.9


def test_exact_logits_are_scaled_products_with_the_listed_keys():
    keys, query = randn(0, 2, 3, 10, 5, dtype=torch.float64), randn(1, 2, 6, 5, dtype=torch.float64)
    tokens = torch.tensor([[[9, 0, 0, 4]] * 3, [[1, 2, 3, 8]] * 3])
    logits = REFERENCE.exact_logits(query, keys, tokens, 0.5)
    for row, head, member, n in np.ndindex(2, 3, 2, 4):
        expected = 0.5 * query[row, 2 * head + member] @ keys[row, head, tokens[row, head, n]]
        assert float(logits[row, head, member, n]) == pytest.approx(float(expected), rel=1e-12)


def test_query_heads_that_do_not_share_kv_heads_evenly_are_refused():
    query, keys, tokens = randn(0, 1, 3, 4), randn(0, 1, 2, 5, 4), torch.zeros(1, 2, 1, dtype=torch.int64)
    sketch = coded(keys, fit(keys))
    calls = [
        lambda: REFERENCE.score(query, sketch, 0, 5, 1.0),
        lambda: REFERENCE.exact_logits(query, keys, tokens, 1.0),
        lambda: REFERENCE.attend(query, keys, keys, tokens, None, 1.0),
    ]
    for call in calls:
        with pytest.raises(ShapeError, match="expected a multiple of 2"):
            call()


# --- attend


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_attention_over_all_tokens_is_as_accurate_as_pytorch(dtype, group, tokens):
    keys, values = randn(0, 2, 2, tokens, 48, dtype=dtype), randn(1, 2, 2, tokens, 20, dtype=dtype)
    query = randn(2, 2, 2 * group, 48, dtype=dtype)
    everything = torch.arange(tokens).expand(2, 2, -1)
    output, lse = REFERENCE.attend(query, keys, values, everything, None, 0.2)
    assert output.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, exact_lse = attention_over(query, keys, values, [[set(range(tokens))] * 2] * 2, 0.2)
    plain = scaled_dot_product_attention(query.unflatten(1, (2, -1)), keys, values, scale=0.2).flatten(1, 2)
    worst = (plain.double() - exact).abs().max().item()
    assert_error_within(output, exact, 1e-12 if dtype == torch.float64 else 2 * worst + torch.finfo(dtype).eps / 8)
    assert_error_within(lse, exact_lse, 8 * torch.finfo(lse.dtype).eps * max(1.0, float(exact_lse.abs().max())))


@pytest.mark.parametrize("listed", [0, 3])
def test_attention_over_no_valid_token_is_zero_with_a_log_sum_exp_of_minus_infinity(listed):
    keys = randn(0, 2, 2, 5, 8)
    tokens, none = torch.zeros(2, 2, listed, dtype=torch.int64), torch.zeros(2, 2, listed, dtype=torch.bool)
    for valid in (none, None) if listed == 0 else (none,):
        output, lse = REFERENCE.attend(randn(1, 2, 4, 8), keys, keys, tokens, valid, 1.0)
        assert output.eq(0).all()
        assert lse.eq(-torch.inf).all()


LISTS = st.lists(st.integers(0, 29), min_size=1, max_size=30, unique=True)


@given(LISTS, st.randoms(), SEEDS)
def test_the_order_of_the_tokens_is_irrelevant(tokens, shuffler, seed):
    keys, values, query = (randn(seed + n, 1, 2, 30, 8, dtype=torch.float64) for n in range(3))
    other = shuffler.sample(tokens, len(tokens))
    results = [
        REFERENCE.attend(query[:, :, 0], keys, values, torch.tensor(order).expand(1, 2, -1), None, 1.0)
        for order in (tokens, other)
    ]
    assert_error_within(results[0][0], results[1][0], 1e-12)
    assert_error_within(results[0][1], results[1][1], 1e-12)


@given(LISTS, st.integers(0, 30), SEEDS)
def test_merging_two_disjoint_halves_by_log_sum_exp_equals_the_union(tokens, cut, seed):
    keys, values, query = (randn(seed + n, 1, 2, 30, 8, dtype=torch.float64) for n in range(3))

    def attend(ids: list[int]) -> tuple[Tensor, Tensor]:
        listed = torch.tensor(ids, dtype=torch.int64).expand(1, 2, -1)
        return REFERENCE.attend(query[:, :, 0], keys, values, listed, None, 1.0)

    (union, lse), halves = attend(tokens), [attend(tokens[:cut]), attend(tokens[cut:])]
    merged = torch.logaddexp(halves[0][1], halves[1][1])
    assert_error_within(merged, lse, 1e-12)
    assert_error_within(sum(out * (part - merged).exp().unsqueeze(-1) for out, part in halves), union, 1e-12)


@given(LISTS, SEEDS)
def test_tokens_that_are_not_valid_count_as_if_they_were_not_listed(tokens, seed):
    keys, values, query = (randn(seed + n, 1, 1, 30, 8, dtype=torch.float64) for n in range(3))
    listed, valid = torch.arange(30).expand(1, 1, -1), torch.zeros(1, 1, 30, dtype=torch.bool)
    valid[..., tokens] = True
    output, lse = REFERENCE.attend(query[:, :, 0], keys, values, listed, valid, 1.0)
    exact, exact_lse = attention_over(query[:, :, 0], keys, values, [[set(tokens)]], 1.0)
    assert_error_within(output, exact, 1e-12)
    assert_error_within(lse, exact_lse, 1e-12)


def test_large_logits_do_not_overflow():
    keys = 100 * randn(0, 1, 1, 20, 8)
    output, lse = REFERENCE.attend(100 * randn(1, 1, 2, 8), keys, keys, torch.arange(20).expand(1, 1, -1), None, 1.0)
    assert output.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_views_with_any_strides_give_what_contiguous_tensors_give(dtype):
    room = torch.full((2, 2, 50, 24), torch.nan, dtype=dtype)
    room[:, :, :33] = randn(0, 2, 2, 33, 24, dtype=dtype)
    grown, transposed = room[:, :, :33], randn(1, 2, 33, 2, 24, dtype=dtype).transpose(1, 2)
    query = randn(2, 2, 24, 6, dtype=dtype).transpose(1, 2)
    tokens = torch.arange(66).view(33, 2).T.flip(-1).expand(2, 2, 33) % 33
    for keys, values in ((grown, transposed), (transposed, grown)):
        assert not any(x.is_contiguous() for x in (keys, values, query, tokens))
        statistics, plain = fit(keys), fit(keys.contiguous())
        assert torch.equal(statistics.mean, plain.mean)
        sketch, same = coded(keys, statistics), coded(keys.contiguous(), statistics)
        assert torch.equal(sketch.codes, same.codes)
        assert torch.equal(sketch.factors, same.factors)
        tensors = (query, keys, values, tokens)
        strided = REFERENCE.attend(*tensors, None, 0.2)
        for ours, theirs in zip(strided, REFERENCE.attend(*(x.contiguous() for x in tensors), None, 0.2), strict=True):
            assert torch.equal(ours, theirs)
        # codes within a larger room, cut to the middle
        wide = Coded(torch.stack([sketch.codes] * 2, 1)[:, 1], torch.stack([sketch.factors] * 2, 1)[:, 1], statistics)
        assert not wide.codes.is_contiguous()
        scores = REFERENCE.score(query, wide, 4, 20, 0.2)
        whole = REFERENCE.score(query.contiguous(), sketch, 0, 33, 0.2)[..., 4:20]
        assert_error_within(scores, whole, 1e-5)


# --- attend to all, and the step


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_attending_to_all_is_what_transformers_computes_bit_for_bit(dtype, group, padded):
    keys, values, query = (randn(seed, 2, heads, n, 32, dtype=dtype) for seed, heads, n in
                           ((0, 2, 41), (1, 2, 41), (2, 2 * group, 1)))  # fmt: skip
    valid = (torch.arange(41) > torch.tensor([[5], [-1]])) if padded else None
    module = torch.nn.Module()
    module.num_key_value_groups = group
    mask = None if valid is None else valid[:, None, None]
    expected, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=0.2, is_causal=False)
    assert torch.equal(REFERENCE.attend_all(query[:, :, 0], keys, values, valid, 0.2), expected[:, 0])


@given(masks(min_tokens=30, max_tokens=50), st.integers(1, 12), st.sampled_from([0.0, 0.01]), SEEDS)
def test_a_step_is_score_and_select_and_attend(mask, floor, threshold, seed):
    # one row has a middle; others may be shorter than sinks and window
    mask[0, -20:] = True
    rows, length = Rows.from_mask(mask), mask.shape[1]
    keys, values = (randn(seed + n, len(mask), 2, length, 8, dtype=torch.float64) for n in range(2))
    query, regions = randn(seed + 2, len(mask), 6, 8, dtype=torch.float64), rows.regions(2, 5, CPU)
    sketch = coded(keys, fit(keys))
    output, lse, selection = REFERENCE.step(query, keys, values, sketch, regions, floor, threshold, 0.3)

    near_valid = None if regions.near_valid is None else regions.near_valid[:, None].expand(-1, 2, -1)
    near = regions.near[:, None].expand(-1, 2, -1)
    near_lse = REFERENCE.attend(query, keys, values, near, near_valid, 0.3)[1].unflatten(1, (2, -1))
    scores = REFERENCE.score(query, sketch, regions.low, regions.high, 0.3)
    expected = REFERENCE.select(scores, near_lse, regions.low, regions.middle, floor, threshold)
    assert torch.equal(selection.counts, expected.counts)
    assert torch.equal(selection.tokens, expected.tokens)
    read = [
        [set(own_near[ok].tolist()) | set(tokens[:count].tolist()) for tokens, count in zip(heads, counts, strict=True)]
        for heads, counts, own_near, ok in zip(
            selection.tokens,
            selection.counts.tolist(),
            regions.near,
            torch.ones_like(regions.near, dtype=torch.bool) if near_valid is None else regions.near_valid,
            strict=True,
        )
    ]
    exact, exact_lse = attention_over(query, keys, values, read, 0.3)
    assert_error_within(output, exact, 1e-12)
    assert_error_within(lse, exact_lse, 1e-12)


# --- select


@st.composite
def choices(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of `select`, some tokens masked, some logits of -inf."""
    batch, heads, group, size = (draw(st.integers(1, most)) for most in (3, 3, 4, 30))
    seed = draw(SEEDS)
    logits = 2 * randn(seed, batch, heads, group, size, dtype=torch.float64)
    if draw(st.booleans()):
        logits[randn(seed + 1, batch, heads, 1, size).expand_as(logits) > 1.5] = -torch.inf
    return {
        "logits": logits,
        "near_lse": randn(seed + 2, batch, heads, group, dtype=torch.float64),
        "low": draw(st.integers(0, 20)),
        "middle": randn(seed + 3, batch, size) < 0.5 if draw(st.booleans()) else None,
        "floor": draw(st.integers(1, 40)),
        "threshold": draw(st.sampled_from([0.0, 0.003, 0.03, 0.3])),
        "cap": draw(st.sampled_from([None, None, 0, 1, 3, 50])),
    }


def shares_of(case: dict[str, object]) -> Tensor:
    """[B, H, M] by definition: each head's probability with its own normaliser, mean over the heads; -1 if masked."""
    shares = torch.zeros_like(case["logits"][:, :, 0])
    masked = torch.zeros(shares.shape[::2], dtype=torch.bool) if case["middle"] is None else ~case["middle"]
    for row, head, member in np.ndindex(*case["near_lse"].shape):
        weights = case["logits"][row, head, member].exp().masked_fill(masked[row], 0)
        total = weights.sum() + case["near_lse"][row, head, member].exp()
        shares[row, head] += weights / total / case["near_lse"].shape[2]
    return shares.masked_fill(masked[:, None], -1)


def chosen_columns(selection: Selection, row: int, head: int, low: int) -> list[int]:
    return (selection.tokens[row, head, : selection.counts[row, head]] - low).tolist()


@settings(max_examples=100)
@given(choices())
def test_select_takes_the_best_up_to_the_floor_and_all_above_the_threshold_but_no_more_than_the_cap(case):
    selection, shares = REFERENCE.select(**case), shares_of(case)
    # what lies behind the counts may be gathered, so it has to be a position
    assert ((selection.tokens >= case["low"]) & (selection.tokens < case["low"] + shares.shape[-1])).all()
    for row, head in np.ndindex(shares.shape[:2]):
        own = shares[row, head]
        chosen = chosen_columns(selection, row, head, case["low"])
        assert sorted(set(chosen)) == chosen, "not in the order of the text, or a token twice"
        assert set(chosen) <= set((own >= 0).nonzero().flatten().tolist()), "a masked token or one out of range"
        above = int((own > case["threshold"]).sum()) if case["threshold"] else 0
        wanted = max(min(case["floor"], int((own >= 0).sum())), above)
        assert len(chosen) == (wanted if case["cap"] is None else min(wanted, case["cap"]))
        # by value: two ways to a share may round two equal ones apart
        best = own.sort(descending=True).values[: len(chosen)]
        assert sorted(own[chosen].tolist(), reverse=True) == pytest.approx(best.tolist(), abs=1e-12)
        missing = own.clamp_min(0).sum() - own[chosen].sum()
        assert float(selection.missing_mass[row, head]) == pytest.approx(float(missing), abs=1e-9)


def test_floor_alone_takes_exactly_the_best():
    selection = REFERENCE.select(torch.tensor([[[[0.0, 3.0, 1.0, 2.0]]]]), torch.zeros(1, 1, 1), 10, None, 2, 0.0)
    assert selection.tokens[..., :2].tolist() == [[[11, 13]]]
    assert selection.counts.tolist() == [[2]]


def test_the_threshold_counts_where_it_asks_for_more_than_the_floor():
    # shares .4, .3, .2 and .1 of sinks and window
    logits, near = torch.tensor([[[[0.2, 0.4, 0.3]]]]).log(), torch.tensor([[[0.1]]]).log()
    counts = {tau: int(REFERENCE.select(logits, near, 0, None, 1, tau).counts) for tau in (0.0, 0.45, 0.25, 0.15)}
    assert counts == {0.0: 1, 0.45: 1, 0.25: 2, 0.15: 3}


def test_each_row_and_head_gets_its_own_number_of_tokens():
    logits = torch.tensor([[[[0.0, 0.0, 0.0]], [[9.0, 0.0, 0.0]]]])
    selection = REFERENCE.select(logits, torch.full((1, 2, 1), -5.0), 0, None, 1, 0.1)
    assert selection.counts.tolist() == [[3, 1]]
    assert selection.tokens[0, 1, 0] == 0


def test_of_equal_shares_the_first_in_the_text_are_taken():
    selection = REFERENCE.select(torch.zeros(2, 2, 3, 20), torch.zeros(2, 2, 3), 5, None, 7, 0.0)
    for row, head in np.ndindex(2, 2):
        assert chosen_columns(selection, row, head, 5) == list(range(7))
    assert selection.missing_mass.flatten().tolist() == pytest.approx([13 / 21] * 4, abs=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40), st.none() | st.integers(1, 5), SEEDS)
def test_tokens_tied_with_the_last_one_are_taken_in_the_order_of_the_text(levels, floor, cap, seed):
    middle = randn(seed, 1, len(levels)) < 1
    logits = torch.tensor(levels, dtype=torch.float32).expand(1, 1, 2, -1)
    selection = REFERENCE.select(logits, torch.zeros(1, 1, 2), 3, middle, floor, 0.0, cap)
    real = middle[0].nonzero().flatten().tolist()
    best = sorted(real, key=lambda token: -levels[token])[: floor if cap is None else min(floor, cap)]
    assert chosen_columns(selection, 0, 0, 3) == sorted(best)


def test_one_token_can_be_chosen_from():
    selection = REFERENCE.select(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2), 3, None, 5, 0.0)
    assert (selection.tokens.tolist(), selection.counts.tolist()) == ([[[3]]], [[1]])
    assert selection.missing_mass.eq(0).all()


def test_logits_of_minus_infinity_are_chosen_last_and_weigh_nothing():
    logits = torch.tensor([[[[-torch.inf, 1.0, -torch.inf, 0.0]]]])
    selection = REFERENCE.select(logits, torch.zeros(1, 1, 1), 0, None, 2, 1e-6)
    assert selection.tokens[..., :2].tolist() == [[[1, 3]]]
    assert (selection.counts.tolist(), selection.missing_mass.tolist()) == ([[2]], [[0.0]])


def test_select_leaves_its_logits_as_they_were():
    logits = randn(0, 1, 1, 2, 9)
    before = logits.clone()
    REFERENCE.select(logits, torch.zeros(1, 1, 2), 0, torch.arange(9).unsqueeze(0) > 2, 2, 0.1)
    REFERENCE.select(logits, torch.zeros(1, 1, 2), 0, None, 2, 0.1)
    assert torch.equal(logits, before)


# --- backends


class Refusing:
    name = "refusing"
    crossover_tokens = 0

    def refuses(self, request: Request) -> str | None:
        return f"head_dim {request.head_dim} has no tile"


class Serving(Refusing):
    name = "serving"

    def refuses(self, request: Request) -> str | None:
        return None


@pytest.fixture
def backends(monkeypatch):
    rows = {
        "refusing": f"{__name__}:Refusing",
        "serving": f"{__name__}:Serving",
        "reference": kernels.BACKENDS["reference"],
    }
    monkeypatch.setattr(kernels, "BACKENDS", rows)
    return rows


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 64, 66, 4096])
def test_the_reference_serves_every_floating_dtype_and_head_size(dtype, dim):
    assert resolve("reference", Request(CPU, dtype, dim)).name == "reference"


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 64), (torch.float32, 66)], ids=str)
def test_auto_takes_the_reference_where_no_other_backend_serves(dtype, dim):
    assert resolve("auto", Request(CPU, dtype, dim)).name == "reference"


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_an_integer_dtype_is_refused_with_the_reason(name):
    with pytest.raises(BackendError, match=r"reference: dtype torch\.int32 is not floating point"):
        resolve(name, Request(CPU, torch.int32, 64))


@pytest.mark.usefixtures("backends")
def test_a_backend_asked_for_by_name_raises_its_reason_and_nothing_falls_back():
    with pytest.raises(BackendError, match=r"'refusing'.*head_dim 64 has no tile"):
        resolve("refusing", Request(CPU, torch.float32, 64))
    assert resolve("reference", Request(CPU, torch.float32, 64)).name == "reference"


@pytest.mark.usefixtures("backends")
def test_auto_takes_the_first_backend_that_does_not_refuse_and_says_so_once(caplog):
    request = Request(CPU, torch.float32, 12345)
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        assert [resolve("auto", request).name for _ in range(3)] == ["serving"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "backend auto took serving for cpu torch.float32, head_dim 12345 (refusing: head_dim 12345 has no tile)"
    ]


def test_auto_gives_every_reason_where_none_serves(backends):
    del backends["serving"]
    with pytest.raises(BackendError, match=r"refusing: head_dim 64 has no tile; reference: dtype torch\.int8"):
        resolve("auto", Request(CPU, torch.int8, 64))


@pytest.mark.usefixtures("backends")
def test_a_backend_that_is_not_in_the_table_is_named():
    with pytest.raises(BackendError, match=r"'flash'.*no such backend"):
        resolve("flash", Request(CPU, torch.float32, 64))
