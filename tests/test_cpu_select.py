"""The compiled kernels' choice of tokens, and the whole step."""

import math

import pytest
import torch
from cases import FLOATS, REFERENCE, SEEDS, coded, fit, masks, randn, skewed_keys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import CPU, GROUPS, assert_as_accurate_as_pytorch, assert_lse_is_exact, each_dtype, exact
from torch import Tensor

from sparse_attention_decoder.kernels import Coded
from sparse_attention_decoder.selection import Regions, Rows, Selection

SCALING = 0.2
DEVICE = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("isa", "poison")


# --- select


def assert_same_selection(ours: Selection, theirs: Selection) -> None:
    assert torch.equal(ours.counts, theirs.counts)
    chosen = ours.chosen
    assert ours.tokens.shape[-1] == int(ours.counts.max())
    assert torch.equal(ours.tokens[chosen], theirs.tokens[..., : chosen.shape[-1]][chosen])
    torch.testing.assert_close(ours.missing_mass, theirs.missing_mass, rtol=1e-4, atol=1e-5)


def assert_filler_is_a_position(selection: Selection, low: int, high: int) -> None:
    assert ((selection.tokens >= low) & (selection.tokens < high)).all()


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(GROUPS),
    st.integers(1, 700),
    st.integers(0, 40),
    st.integers(1, 800),
    st.sampled_from([0.0, 3e-5, 1e-3, 0.02, 0.3]),
    st.sampled_from([None, None, 1, 17, 900]),
    st.booleans(),
    SEEDS,
)
@example(1, 1, 1, 1, 0, 1, 0.0, None, True, 0)
@example(2, 2, 4, 513, 15, 40, 1e-3, 64, True, 7)
def test_the_selection_is_that_of_the_definition(batch, heads, group, width, low, floor, tau, cap, ragged, seed):
    logits, near = 2 * randn(seed, batch, heads, group, width), randn(seed + 1, batch, heads, group)
    middle = randn(seed + 2, batch, width) < 0.7 if ragged else None
    arguments = (logits, near, low, middle, floor, tau, cap)
    before = logits.clone()
    ours = CPU.select(*arguments)
    assert_same_selection(ours, REFERENCE.select(*arguments))
    assert_filler_is_a_position(ours, low, low + width)
    assert torch.equal(logits, before)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=250), st.integers(1, 60), st.none() | st.integers(1, 40), SEEDS)
@example([0] * 250, 60, None, 0)
def test_of_equal_logits_the_first_in_the_text_are_taken(levels, floor, cap, seed):
    logits = torch.tensor(levels, dtype=torch.float32).expand(1, 2, 3, -1)
    middle = randn(seed, 1, len(levels)) < 1.5
    selection = CPU.select(logits, torch.zeros(1, 2, 3), 3, middle, floor, 0.0, cap)
    best = sorted(middle[0].nonzero().flatten().tolist(), key=lambda token: -levels[token])
    expected = sorted(best[: floor if cap is None else min(floor, cap)])
    for tokens, count in zip(selection.tokens[0], selection.counts[0].tolist(), strict=True):
        assert (tokens[:count] - 3).tolist() == expected


@pytest.mark.parametrize("width", [257, 600, 5000])
@pytest.mark.parametrize("place", [0, 255, 256, -1])
def test_of_equal_logits_far_apart_the_first_in_the_text_are_taken(width, place):
    logits = torch.full((1, 1, 1, width), 0.3)
    logits[..., place] = 3.7
    arguments = (logits, torch.full((1, 1, 1), 1.1), 0, None, 40, 0.0)
    assert_same_selection(CPU.select(*arguments), REFERENCE.select(*arguments))


def test_selecting_from_far_more_tokens_than_a_sample_holds_is_exact():
    logits = 3 * randn(0, 1, 1, 2, 20000)
    for floor, tau, cap in ((1, 0.0, None), (32, 1e-4, None), (700, 0.0, None), (32, 1e-5, 100), (20000, 0.0, 19000)):
        arguments = (logits, torch.zeros(1, 1, 2), 4, None, floor, tau, cap)
        assert_same_selection(CPU.select(*arguments), REFERENCE.select(*arguments))


def test_no_token_may_be_chosen_where_the_cap_is_nothing():
    assert CPU.select(torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 1), 0, None, 2, 0.1, 0).counts.tolist() == [[0]]


def test_rows_without_a_token_to_choose_choose_none():
    middle = torch.tensor([[False] * 30, [True] * 30])
    selection = CPU.select(randn(0, 2, 1, 2, 30), torch.zeros(2, 1, 2), 5, middle, 4, 0.0)
    assert selection.counts.tolist() == [[0], [4]]
    assert selection.missing_mass[0].eq(0).all()
    assert_filler_is_a_position(selection, 5, 35)


def test_logits_of_minus_infinity_and_sinks_that_weigh_nothing_are_served():
    logits = torch.tensor([[[[-torch.inf, 1.0, -torch.inf, 0.0]]]])
    for near in (0.0, -torch.inf, 200.0):
        selection = CPU.select(logits, torch.full((1, 1, 1), near), 0, None, 2, 0.0)
        assert_same_selection(selection, REFERENCE.select(logits, torch.full((1, 1, 1), near), 0, None, 2, 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_logits_that_are_not_finite_do_no_harm(bad):
    logits, near = randn(0, 1, 2, 3, 300), torch.zeros(1, 2, 3)
    logits[0, 0, 1, 7] = bad
    for cap in (None, 5):
        selection = CPU.select(logits, near, 2, None, 40, 1e-3, cap)
        assert ((selection.counts >= 0) & (selection.counts <= 300)).all()
        assert_filler_is_a_position(selection, 2, 302)
        # the other head is as it would be alone
        alone = CPU.select(logits[:, 1:], near[:, 1:], 2, None, 40, 1e-3, cap)
        assert torch.equal(selection.tokens[0, 1][: alone.counts], alone.tokens[0, 0])


# --- step


def parts(query: Tensor, keys: Tensor, values: Tensor, sketch: Coded, regions: Regions, floor: int, tau: float):
    """The step as its parts make it: output, log-sum-exp, selection."""
    near = regions.near[:, None].expand(-1, keys.shape[1], -1)
    valid = None if regions.near_valid is None else regions.near_valid[:, None].expand_as(near)
    _, lse = CPU.attend(query, keys, values, near, valid, SCALING)
    logits = CPU.score(query, sketch, regions.low, regions.high, SCALING)
    near_lse = lse.unflatten(1, (keys.shape[1], -1))
    selection = CPU.select(logits, near_lse, regions.low, regions.middle, floor, tau)
    tokens, valid = regions.with_chosen(selection)
    return *CPU.attend(query, keys, values, tokens, valid, SCALING), selection


def assert_step_is_its_parts(
    query: Tensor, keys: Tensor, values: Tensor, sketch: Coded, regions: Regions, floor: int, tau: float
) -> None:
    case = (query, keys, values, sketch, regions, floor, tau)
    output, lse, selection = CPU.step(*case, SCALING)
    expected, expected_lse, expected_selection = parts(*case)
    assert_same_selection(selection, expected_selection)
    # a step takes exponentials span by span, so its sums round differently
    torch.testing.assert_close(selection.missing_mass, expected_selection.missing_mass, rtol=1e-5, atol=1e-6)
    assert_filler_is_a_position(selection, regions.low, regions.high)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    # the same tokens in another order, and no less accurate for it
    tokens, valid = regions.with_chosen(expected_selection)
    own = [x.gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])) for x in (keys, values)]
    counts = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    for found in (output, expected):
        assert_as_accurate_as_pytorch(found, query, *own, counts, SCALING)
    assert_lse_is_exact(lse, exact(query, *own, counts, SCALING)[1], query.shape[-1])


@settings(max_examples=40)
@given(
    masks(min_tokens=40, max_tokens=130),
    st.sampled_from([1, 2]),
    st.sampled_from(GROUPS),
    st.sampled_from(FLOATS),
    st.sampled_from([1, 8, 500]),
    st.sampled_from([0.0, 3e-5, 0.01]),
    SEEDS,
)
@example(torch.ones(1, 130, dtype=torch.bool), 2, 4, torch.bfloat16, 500, 0.0, 3)
def test_a_step_is_score_and_select_and_attend(mask, heads, group, dtype, floor, tau, seed):
    # one row has a middle; others may be shorter than sinks and window
    mask[0, -20:] = True
    rows, (batch, length) = Rows.from_mask(mask), mask.shape
    keys, values = (
        randn(seed, batch, heads, length, 24, dtype=dtype),
        randn(seed + 1, batch, heads, length, 16).to(dtype),
    )
    query = 2 * randn(seed + 2, batch, heads * group, 24, dtype=dtype)
    regions = rows.regions(2, 5, DEVICE)
    assert_step_is_its_parts(query, keys, values, coded(keys, fit(keys), CPU), regions, floor, tau)


@each_dtype
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_a_step_over_a_long_context_is_its_parts_and_that_of_the_definition(dtype, dim):
    keys, values = skewed_keys(0, 1, 2, 5000, dim, dtype=dtype), randn(1, 1, 2, 5000, dim, dtype=dtype)
    query, regions = randn(2, 1, 8, dim, dtype=dtype) * dim**-0.5, Rows.full(1, 5000).regions(4, 256, DEVICE)
    sketch = coded(keys, fit(keys))
    assert_step_is_its_parts(query, keys, values, sketch, regions, 32, 3e-4)
    case = (query, keys, values, sketch, regions, 900, 0.0, SCALING)
    (_, _, ours), (_, _, theirs) = CPU.step(*case), REFERENCE.step(*case)
    assert_same_selection(ours, theirs)
