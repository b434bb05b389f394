"""Triton's choice of tokens: that of the definition, whatever the logits and however many programs share a row."""

import math

import pytest
import torch
from cases import REFERENCE, SEEDS, coded, fit, randn, skewed_keys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import GROUPS
from test_cpu_select import assert_filler_is_a_position, assert_same_selection
from torch import Tensor
from triton_cases import TRITON, home, laws_of_kernels, on

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.triton.score import launch_score
from sparse_attention_decoder.kernels.triton.select import launch_select
from sparse_attention_decoder.kernels.triton.shapes import Scratch, Shape
from sparse_attention_decoder.selection import Selection

# wide enough for several programs of one row
WIDE = 9300

pytestmark = laws_of_kernels


def assert_selects_as_defined(device: torch.device, *arguments: object) -> Selection:
    before = on(device, arguments)
    ours, theirs = home(TRITON.select(*before)), REFERENCE.select(*arguments)
    assert_same_selection(ours, theirs)
    logits, _, low, *_ = arguments
    assert_filler_is_a_position(ours, low, low + logits.shape[-1])
    assert torch.equal(home(before[0]), logits)
    return ours


@settings(max_examples=40)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
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
def test_the_selection_is_that_of_the_definition(
    device, batch, heads, group, width, low, floor, tau, cap, ragged, seed
):
    logits, near = 2 * randn(seed, batch, heads, group, width), randn(seed + 1, batch, heads, group)
    middle = randn(seed + 2, batch, width) < 0.7 if ragged else None
    assert_selects_as_defined(device, logits, near, low, middle, floor, tau, cap)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=250), st.integers(1, 60), st.none() | st.integers(1, 40), SEEDS)
@example([0] * 250, 60, None, 0)
def test_of_equal_logits_the_first_in_the_text_are_taken(device, levels, floor, cap, seed):
    logits = torch.tensor(levels, dtype=torch.float32).expand(1, 1, 3, -1)
    middle = randn(seed, 1, len(levels)) < 1.5
    selection = home(TRITON.select(*on(device, (logits, torch.zeros(1, 1, 3), 3, middle, floor, 0.0, cap))))
    best = sorted(middle[0].nonzero().flatten().tolist(), key=lambda token: -levels[token])
    expected = sorted(best[: floor if cap is None else min(floor, cap)])
    assert (selection.tokens[0, 0, : selection.counts[0, 0]] - 3).tolist() == expected


@pytest.mark.parametrize("width", [257, WIDE])
@pytest.mark.parametrize("place", [0, 255, 256, -1])
def test_of_equal_logits_far_apart_the_first_in_the_text_are_taken(device, width, place):
    logits = torch.full((1, 1, 1, width), 0.3)
    logits[..., place] = 3.7
    assert_selects_as_defined(device, logits, torch.full((1, 1, 1), 1.1), 0, None, 40, 0.0)


@pytest.mark.parametrize("floor", [1, 32, 1024, WIDE])
@pytest.mark.parametrize("tau", [0.0, 1e-4])
def test_a_row_that_several_programs_share_is_chosen_from_as_a_whole(device, floor, tau):
    logits = 3 * randn(floor, 1, 1, 2, WIDE)
    # the best of the row are neither the best of their programs' parts nor evenly spread over them
    logits[..., 5000:5200] += 6
    assert_selects_as_defined(device, logits, torch.zeros(1, 1, 2), 4, None, floor, tau)


@pytest.mark.parametrize(
    ("floor", "tau", "cap"), [(700, 0.0, 100), (32, 1e-5, 3000), (1, 0.0, 0), (WIDE, 0.0, WIDE - 1), (32, 0.9, 1)]
)
def test_a_cap_holds_over_all_programs_of_a_row(device, floor, tau, cap):
    arguments = (3 * randn(0, 1, 1, 3, WIDE), torch.zeros(1, 1, 3), 0, randn(1, 1, WIDE) < 1, floor, tau, cap)
    if cap:
        assert_selects_as_defined(device, *arguments)
    else:
        assert home(TRITON.select(*on(device, arguments))).counts.tolist() == [[0]]


@pytest.mark.parametrize("floor", [1, 2500, 7000])
def test_ties_across_programs_go_to_the_first_in_the_text(device, floor):
    # three levels, so that thousands are tied with the last one taken, in every program's part
    logits = torch.randint(0, 3, (1, 1, 1, WIDE), generator=torch.Generator().manual_seed(floor)).float()
    assert_selects_as_defined(device, logits.expand(-1, -1, 2, -1), torch.zeros(1, 1, 2), 9, None, floor, 0.0)
    assert_selects_as_defined(device, torch.zeros(1, 1, 2, WIDE), torch.zeros(1, 1, 2), 9, None, floor, 0.0)


def test_no_token_may_be_chosen_where_the_cap_is_nothing(device):
    arguments = on(device, (torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 1), 0, None, 2, 0.1, 0))
    assert TRITON.select(*arguments).counts.tolist() == [[0]]


def test_rows_without_a_token_to_choose_choose_none(device):
    middle = torch.tensor([[False] * 30, [True] * 30])
    arguments = on(device, (randn(0, 2, 1, 2, 30), torch.zeros(2, 1, 2), 5, middle, 4, 1e-3))
    selection = home(TRITON.select(*arguments))
    assert_same_selection(selection, REFERENCE.select(*home(arguments)))
    assert selection.counts[0].eq(0).all()
    assert selection.missing_mass[0].eq(0).all()
    assert_filler_is_a_position(selection, 5, 35)


def test_logits_of_minus_infinity_and_sinks_that_weigh_nothing_are_served(device):
    logits = torch.tensor([[[[-torch.inf, 1.0, -torch.inf, 0.0]]]])
    for near in (0.0, -torch.inf, 200.0):
        for floor in (2, 3, 4):
            assert_selects_as_defined(device, logits, torch.full((1, 1, 1), near), 0, None, floor, 0.0)


@pytest.mark.parametrize("shift", [-300.0, 300.0], ids=str)
def test_logits_may_lie_anywhere(device, shift):
    # a share does not depend on where the logits lie, their rounding does: so steps that survive it
    logits = (4 * randn(0, 1, 2, 1, 300)).round() / 4
    shifted = assert_selects_as_defined(device, logits + shift, torch.full((1, 2, 1), shift), 0, None, 40, 1e-3)
    plain = assert_selects_as_defined(device, logits, torch.zeros(1, 2, 1), 0, None, 40, 1e-3)
    assert torch.equal(shifted.tokens, plain.tokens)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("width", [300, WIDE])
def test_logits_that_are_not_finite_do_no_harm(device, bad, width):
    logits, near = randn(0, 1, 2, 3, width), torch.zeros(1, 2, 3)
    logits[0, 0, 1, 7] = bad
    for cap in (None, 5):
        selection = home(TRITON.select(*on(device, (logits, near, 2, None, 40, 1e-3, cap))))
        assert ((selection.counts >= 0) & (selection.counts <= width)).all()
        assert_filler_is_a_position(selection, 2, 2 + width)
        for tokens, count in zip(selection.tokens[0], selection.counts[0].tolist(), strict=True):
            assert tokens[:count].diff().gt(0).all()
        # the other head is as it would be alone
        alone = home(TRITON.select(*on(device, (logits[:, 1:], near[:, 1:], 2, None, 40, 1e-3, cap))))
        assert torch.equal(selection.tokens[0, 1][: alone.counts], alone.tokens[0, 0])


@pytest.mark.parametrize(
    ("near", "middle", "reason"),
    [
        ((1, 2, 2), None, "near_lse is"),
        ((2, 2, 3), None, "near_lse is"),
        ((1, 2, 3), torch.ones(1, 8, dtype=torch.bool), "middle is"),
        ((1, 2, 3), torch.ones(1, 9), "middle is torch.float32"),
    ],
)
def test_what_does_not_fit_the_logits_is_refused(device, near, middle, reason):
    with pytest.raises(ShapeError, match=reason):
        TRITON.select(*on(device, (torch.zeros(1, 2, 3, 9), torch.zeros(near), 0, middle, 2, 0.0)))


# --- the scratch


def chosen_in(scratch: Scratch, shape: Shape, query: Tensor, sketch: object, keys: Tensor, floor: int, tau: float):
    """Score and choose with this scratch: tokens that count, counts and missing mass."""
    near = torch.tensor([[0, 1, keys.shape[2] - 1]], device=keys.device)
    bounds = torch.tensor([[2, keys.shape[2] - 1, 0, 0]], dtype=torch.int32, device=keys.device)
    launch_score(shape, query, sketch, keys, near, None, None, bounds, scratch, 0.2)
    launch_select(shape, bounds, None, scratch, scratch.tokens, scratch.counts, scratch.missing, floor, tau)
    counts = home(scratch.counts)
    return [row[:count] for row, count in zip(home(scratch.tokens), counts.tolist(), strict=True)], home(
        scratch.missing
    )


def test_histogram_and_turns_are_zero_again_and_a_used_scratch_serves_as_a_new_one(device):
    keys, query = skewed_keys(0, 1, 1, 4500, 24), randn(1, 1, 3, 24)
    query, keys, sketch = on(device, (query, keys, coded(keys, fit(keys))))
    shape = Shape.of(query, 1, 24)
    used, memory = Scratch(shape, 4500, 3), None
    assert used.select_splits > 1
    for floor, tau in ((7, 0.0), (1000, 1e-4)):
        fresh = Scratch(shape, 4500, 3)
        ours, theirs = (chosen_in(scratch, shape, query, sketch, keys, floor, tau) for scratch in (used, fresh))
        for scratch in (used, fresh):
            assert scratch.turn.eq(0).all()
            assert scratch.histogram.eq(0).all()
        assert all(torch.equal(one, other) for one, other in zip(ours[0], theirs[0], strict=True))
        assert torch.equal(ours[1], theirs[1])
        memory = used.memory
    # views of the memory it is given, none of its own
    assert Scratch(shape, 4500, 3, memory).histogram.data_ptr() == used.histogram.data_ptr()


def scratch_with(shape: Shape, below: Tensor, base: Tensor, lse: Tensor) -> Scratch:
    """As the score kernel leaves it: one head's logits as float16 below `base`, and their log-sum-exp, base 2."""
    scratch = Scratch(shape, len(below), 3)
    scratch.logits[0, : len(below), 0] = below.to(shape.device)
    scratch.base.fill_(float(base))
    scratch.peaks.fill_(-math.inf)
    scratch.masses.fill_(0)
    scratch.peaks[0, 0, 0], scratch.masses[0, 0, 0] = float(lse), 1.0
    scratch.tokens.fill_(-1)
    return scratch


def test_every_token_that_counts_is_listed_where_a_share_lies_at_the_threshold(device):
    # a kernel that counts and one that lists may round a share apart, and the threshold may lie between
    shape, width, random, tried = Shape(1, 1, 1, 64, 64, device), 480, torch.Generator().manual_seed(0), 0
    bounds = torch.tensor([[0, width, 0, 0]], dtype=torch.int32, device=device)
    while tried < 6:
        base = torch.rand((), generator=random) * 1.5 + 0.2
        lse = base + 4 + 3.9 * torch.rand((), generator=random)
        below = (-8 * torch.rand(width, generator=random)).half()
        ways = torch.exp2(below.float() - (lse - base)), torch.exp2((below.float() + base) - lse)
        apart = (ways[0] != ways[1]).nonzero().flatten()
        if not len(apart):
            continue
        tried += 1
        tau = float(torch.minimum(*ways)[apart[0]])
        scratch = scratch_with(shape, below, base, lse)
        launch_select(shape, bounds, None, scratch, scratch.tokens, scratch.counts, scratch.missing, 1, tau)
        listed = home(scratch.tokens)[0, : scratch.counts.item()].tolist()
        assert -1 not in listed, "a token was counted and none listed for it"
        assert listed == sorted(set(listed))
        assert set((ways[0] > tau * 1.0001).nonzero().flatten().tolist()) <= set(listed)
        assert set(listed) <= set((ways[0] > tau * 0.9999).nonzero().flatten().tolist())


def test_as_many_as_the_floor_are_listed_where_every_share_lies_at_the_edge_of_a_bin(device):
    # a share just above 1.25 / 32 if its tile's base is taken off the normaliser first, below it if added to the logit
    lse = 600.0
    shape, width, step = Shape(1, 1, 1, 64, 64, device), 480, math.ulp(lse) * 2.0**29
    edge, rest = divmod(math.log2(1.25), step)
    base = torch.tensor(lse - 5 + (edge + 1) * step)
    below = torch.full((width,), 0.97 * (rest - step)).half()
    scratch = scratch_with(shape, below, base, torch.tensor(lse))
    bounds = torch.tensor([[0, width, 0, 0]], dtype=torch.int32, device=device)
    launch_select(shape, bounds, None, scratch, scratch.tokens, scratch.counts, scratch.missing, 30, 0.0)
    assert home(scratch.tokens)[0, : scratch.counts.item()].tolist() == list(range(30))
