"""Triton's kernels that code and score, each against its definition."""

import math

import pytest
import torch
from cases import REFERENCE, SEEDS, coded, fit, randn, skewed_keys
from hypothesis import example, given
from hypothesis import strategies as st
from test_cache import new_sketch
from test_cpu_kernels import GROUPS, each_dtype
from test_cpu_tensors import strided
from torch import Tensor
from triton_cases import TRITON, home, laws_of_kernels, on

from sparse_attention_decoder.errors import NonFiniteError, ShapeError
from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.selection import Rows

DIMS = (64, 80, 96, 128, 256)
# the least, one that is padded, one of many odd parts
ODD_DIMS = (16, 24, 248)
SCALING = 0.2

pytestmark = laws_of_kernels

each_dim = pytest.mark.parametrize("dim", DIMS)


# --- coding


def assert_coded_as_defined(keys: Tensor, start: int, statistics: Statistics, device: torch.device) -> None:
    """Codes equal bit for bit, factors to the last place, and what lies before and behind stays as it was."""
    theirs = Coded.room(start + keys.shape[2] + 20, statistics)
    theirs.codes.fill_(0xA5)
    theirs.factors.fill_(7.0)
    ours = on(device, theirs)
    REFERENCE.encode(keys, theirs, start)
    TRITON.encode(on(device, keys), ours, start)
    assert torch.equal(home(ours.codes), theirs.codes)
    places = home(ours.factors).view(torch.int16).int() - theirs.factors.view(torch.int16).int()
    assert places.abs().max() <= 1


@each_dim
@each_dtype
def test_codes_equal_those_of_the_definition_bit_for_bit_and_factors_to_the_last_place(device, dim, dtype):
    for start, tokens in ((0, 1), (5, 12), (15, 18), (16, 33)):
        keys = skewed_keys(dim + start, 2, 2, tokens, dim, dtype=dtype)
        assert_coded_as_defined(keys, start, fit(keys), device)


@pytest.mark.parametrize("dim", ODD_DIMS)
@pytest.mark.parametrize("tokens", [0, 19])
def test_head_sizes_that_are_no_power_of_two_and_no_keys_at_all_are_coded_alike(device, dim, tokens):
    keys = skewed_keys(dim, 2, 1, tokens, dim)
    assert_coded_as_defined(keys, 3, fit(keys), device)


def test_keys_far_out_and_keys_at_the_mean_are_coded_as_the_definition_says(device):
    keys = skewed_keys(0, 1, 1, 5, 64)
    far = torch.cat([keys * 1e-6, keys * 1e6, keys * 1e18, torch.zeros_like(keys)], 2)
    for moments in (fit(keys), Statistics(torch.zeros(1, 1, 64), torch.ones(1, 1, 64))):
        assert_coded_as_defined(far, 0, moments, device)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_key_that_is_not_finite_is_refused_by_the_sketch(device, bad):
    # of 40 tokens the statistics are fitted on 31, so the factor has to tell
    for token in (5, 39):
        keys = randn(0, 1, 2, 40, 16)
        keys[0, 1, token, 3] = bad
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            new_sketch(TRITON).catch_up(on(device, keys), Rows.full(1, 40), 40)


@each_dtype
def test_keys_of_any_strides_are_coded_as_contiguous_ones(device, dtype):
    keys = on(device, skewed_keys(0, 2, 2, 20, 24, dtype=dtype))
    statistics = on(device, fit(home(keys)))
    plain = coded(keys, statistics, TRITON)
    with device:
        views = strided(keys)
    for view in views:
        assert not view.is_contiguous()
        sketch = coded(view, statistics, TRITON)
        assert torch.equal(sketch.codes, plain.codes)
        assert torch.equal(sketch.factors, plain.factors)


def test_a_row_of_a_larger_sketch_serves_as_one_of_its_own_and_some_of_the_heads_are_refused(device):
    keys, query = on(device, (skewed_keys(0, 1, 2, 20, 24), randn(1, 1, 4, 24)))
    own = coded(keys, on(device, fit(home(keys))), TRITON)
    room = on(device, Coded.room(20, Statistics(torch.zeros(3, 2, 24), torch.ones(3, 2, 24))))
    row = Coded(room.codes[1:2], room.factors[1:2], own.statistics)
    TRITON.encode(keys, row, 0)
    assert torch.equal(row.codes, own.codes)
    assert room.codes[[0, 2]].eq(0).all()
    assert torch.equal(TRITON.score(query, row, 3, 20, SCALING), TRITON.score(query, own, 3, 20, SCALING))
    moments = on(device, Statistics(torch.zeros(3, 1, 24), torch.ones(3, 1, 24)))
    heads = Coded(room.codes[:, 1:], room.factors[:, 1:], moments)
    with pytest.raises(ShapeError, match="one KV head after the other"):
        TRITON.encode(keys[:, :1].expand(3, -1, -1, -1), heads, 0)


@pytest.mark.parametrize(
    ("keys", "start", "reason"),
    [
        ((2, 2, 5, 24), 44, "do not fit a sketch of 48"),
        ((2, 2, 5, 24), -1, "do not fit a sketch"),
        ((2, 3, 5, 24), 0, "mean is"),
        ((2, 2, 5, 20), 0, "multiple of 8"),
        ((2, 2, 24), 0, "4 axes"),
    ],
)
def test_keys_that_do_not_fit_a_sketch_are_refused(device, keys, start, reason):
    sketch = on(device, Coded.room(48, Statistics(torch.zeros(2, 2, 24), torch.ones(2, 2, 24))))
    with pytest.raises(ShapeError, match=reason):
        TRITON.encode(torch.zeros(keys, device=device), sketch, start)


# --- scores


def assert_scored_as_defined(query: Tensor, sketch: Coded, low: int, high: int, device: torch.device) -> None:
    ours, theirs = (
        TRITON.score(*on(device, (query, sketch)), low, high, SCALING),
        REFERENCE.score(query, sketch, low, high, SCALING),
    )
    assert (ours.shape, ours.dtype) == (theirs.shape, torch.float32)
    if theirs.numel():
        assert (home(ours) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@each_dim
@each_dtype
def test_scores_are_those_of_the_definition(device, dim, dtype):
    for group in GROUPS:
        keys = skewed_keys(group, 2, 1, 50, dim, dtype=dtype)
        query = randn(dim + group, 2, group, dim, dtype=dtype)
        assert_scored_as_defined(query, coded(keys, fit(keys)), 3, 50, device)


@pytest.mark.parametrize("dim", ODD_DIMS)
def test_head_sizes_that_are_no_power_of_two_are_scored_alike(device, dim):
    keys, query = skewed_keys(dim, 2, 2, 40, dim), randn(1, 2, 6, dim)
    assert_scored_as_defined(query, coded(keys, fit(keys)), 1, 39, device)


@given(st.integers(0, 70), st.integers(0, 70), st.sampled_from(GROUPS), SEEDS)
@example(0, 0, 1, 0)
@example(16, 16, 3, 0)
@example(15, 16, 3, 0)
@example(16, 17, 3, 0)
@example(17, 33, 1, 0)
@example(0, 70, 16, 0)
def test_scores_of_every_stretch_are_those_of_the_definition(device, one, other, group, seed):
    keys, query = skewed_keys(seed, 1, 2, 70, 24), randn(seed, 1, 2 * group, 24)
    assert_scored_as_defined(query, coded(keys, fit(keys)), min(one, other), max(one, other), device)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17])
def test_the_last_token_of_a_sketch_is_scored_and_none_behind_it(device, length):
    keys, query = skewed_keys(length, 1, 2, length, 64), randn(1, 1, 6, 64)
    assert_scored_as_defined(query, coded(keys, fit(keys)), 0, length, device)


@pytest.mark.parametrize("dim", [64, 256])
def test_a_stretch_scores_what_it_scores_within_a_longer_one_bit_for_bit(device, dim):
    keys, query = skewed_keys(0, 1, 1, 1100, dim), randn(1, 1, 3, dim)
    sketch = coded(keys, fit(keys))
    assert_scored_as_defined(query, sketch, 0, 1100, device)
    query, sketch = on(device, (query, sketch))
    whole = TRITON.score(query, sketch, 0, 1100, SCALING)
    for low, high in ((4, 1100), (255, 257), (511, 530), (512, 1024), (1090, 1100)):
        assert torch.equal(TRITON.score(query, sketch, low, high, SCALING), whole[..., low:high])


def test_one_program_that_has_several_tiles_scores_them_all(device):
    # with as many rows no two programs share one
    keys, query = skewed_keys(0, 4, 4, 600, 24), randn(1, 4, 4, 24)
    assert_scored_as_defined(query, coded(keys, fit(keys)), 5, 598, device)


def test_a_query_of_zeros_scores_zero_and_one_of_nan_scores_nan(device):
    keys = skewed_keys(0, 1, 1, 20, 64)
    query = torch.stack([torch.zeros(64), randn(0, 64).index_fill(0, torch.tensor([5]), math.nan)])[None]
    scores = TRITON.score(*on(device, (query, coded(keys, fit(keys)))), 0, 20, 1.0)
    assert scores[0, 0, 0].eq(0).all()
    assert scores[0, 0, 1].isnan().all()


def test_a_token_whose_factor_is_not_finite_leaves_the_others_alone(device):
    keys, query = skewed_keys(0, 1, 1, 40, 64), randn(1, 1, 3, 64)
    sketch = coded(keys, fit(keys))
    expected = REFERENCE.score(query, sketch, 0, 40, SCALING)
    sketch.factors[..., 17] = math.nan
    scores = home(TRITON.score(*on(device, (query, sketch)), 0, 40, SCALING))
    assert scores[..., 17].isnan().all()
    others = torch.arange(40) != 17
    assert (scores - expected)[..., others].abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("query", "low", "high", "reason"),
    [
        ((2, 4, 24), 0, 49, "not all within a sketch of 48"),
        ((2, 4, 24), -1, 9, "not all within"),
        ((2, 4, 24), 9, 8, "not all within"),
        ((2, 5, 24), 0, 9, "do not share 2 KV heads evenly"),
        ((3, 4, 24), 0, 9, "mean is"),
        ((2, 4, 32), 0, 9, "mean is"),
        ((2, 24), 0, 9, r"expected \[B, Hq, D\]"),
    ],
)
def test_queries_and_stretches_that_do_not_fit_a_sketch_are_refused(device, query, low, high, reason):
    sketch = on(device, Coded.room(48, Statistics(torch.zeros(2, 2, 24), torch.ones(2, 2, 24))))
    with pytest.raises(ShapeError, match=reason):
        TRITON.score(torch.zeros(query, device=device), sketch, low, high, 1.0)
