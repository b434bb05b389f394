"""The compiled kernels' choice of tokens, the whole step, and tensors as they come: strided, ragged, damaged, misshapen."""

import math

import pytest
import torch
from cases import FLOATS, REFERENCE, SEEDS, coded, fit, masks, randn, skewed_keys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import CPU, GROUPS, assert_as_accurate_as_pytorch, assert_lse_is_exact, each_dtype, exact
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels import Coded, Statistics
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
    assert torch.equal(selection.missing_mass, expected_selection.missing_mass)
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
    mask[:, -20:] = True
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


# --- tensors as they come


def strided(x: Tensor) -> list[Tensor]:
    """The same numbers as views: within a larger room, with axes swapped, with every second element."""
    room = torch.full((*x.shape[:-2], x.shape[-2] + 7, x.shape[-1]), torch.nan, dtype=x.dtype)
    room[..., : x.shape[-2], :] = x
    swapped = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    sparse = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
    sparse[..., 0] = x
    return [room[..., : x.shape[-2], :], swapped, sparse[..., 0], x.mT.contiguous().mT]


@each_dtype
def test_views_with_any_strides_give_what_contiguous_tensors_give_bit_for_bit(dtype):
    keys, values = skewed_keys(0, 2, 3, 90, 24, dtype=dtype), randn(1, 2, 3, 90, 32, dtype=dtype)
    query, statistics = randn(2, 2, 6, 24, dtype=dtype), fit(keys)
    mask = torch.arange(90) >= torch.tensor([[0], [31]])
    regions, plain = Rows.from_mask(mask).regions(2, 5, DEVICE), coded(keys, statistics, CPU)
    tokens = torch.arange(90).flip(0).expand(2, 3, -1)

    def everything(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> list[Tensor]:
        sketch = coded(k, statistics, CPU)
        output, lse, chosen = CPU.step(q, k, v, plain, regions, 7, 0.01, SCALING)
        dense = CPU.attend_all(q, k, v, valid, SCALING)
        listed = CPU.attend(q, k, v, tokens, valid[:, None].expand(-1, 3, -1), SCALING)
        scores = CPU.score(q, plain, 5, 80, SCALING)
        return [*CPU.fit(k[0]), sketch.codes, sketch.factors, output, lse, chosen.tokens, dense, *listed, scores]

    expected = everything(query, keys, values, mask)
    wide = torch.stack([mask, ~mask], -1)[..., 0]
    for q, k, v in zip(strided(query), strided(keys), reversed(strided(values)), strict=True):
        assert not (k.is_contiguous() or v.is_contiguous() or wide.is_contiguous())
        for ours, theirs in zip(everything(q, k, v, wide), expected, strict=True):
            assert torch.equal(ours, theirs)


@each_dtype
def test_a_sketch_within_a_larger_one_serves_as_one_of_its_own(dtype):
    keys, query = skewed_keys(0, 2, 2, 90, 24, dtype=dtype), randn(1, 2, 4, 24, dtype=dtype)
    own = coded(keys, fit(keys))
    room = Coded.room(90, Statistics(torch.zeros(2, 5, 24), torch.ones(2, 5, 24)))
    part = Coded(room.codes[:, 1:3], room.factors[:, 1:3], own.statistics)
    CPU.encode(keys, part, 0)
    assert torch.equal(part.codes, own.codes)
    assert room.codes[:, [0, 3, 4]].eq(0).all()
    assert torch.equal(CPU.score(query, part, 3, 90, 0.2), CPU.score(query, own, 3, 90, 0.2))


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_damage_shows_in_the_output_as_it_does_densely(dtype, bad, where):
    tensors = {name: randn(n, 1, 2, size, 24, dtype=dtype) for n, (name, size) in
               enumerate({"query": 3, "keys": 70, "values": 70}.items())}  # fmt: skip
    tensors[where][0, 0, 1, 3] = bad
    query, keys, values = tensors["query"].flatten(1, 2), tensors["keys"], tensors["values"]
    everything = torch.ones(1, 2, 70, dtype=torch.bool)
    plain, _ = exact(query, keys, values, everything, SCALING)
    grouped = query.double().unflatten(1, (2, -1))
    dense = ((SCALING * grouped @ keys.double().mT).softmax(-1) @ values.double()).flatten(1, 2)
    found = CPU.attend_all(query, keys, values, None, SCALING)
    listed, _ = CPU.attend(query, keys, values, torch.arange(70).expand(1, 2, -1), None, SCALING)
    for output in (found, listed):
        assert torch.equal(output.isnan(), dense.isnan())
        sound = dense.isfinite()
        torch.testing.assert_close(output[sound].double(), plain[sound], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_step_of_a_damaged_query_or_window_gives_nan_and_leaves_other_heads_alone(bad):
    keys, values, query = randn(0, 1, 2, 90, 8), randn(1, 1, 2, 90, 8), randn(2, 1, 4, 8)
    sketch, regions = coded(keys, fit(keys)), Rows.full(1, 90).regions(2, 5, DEVICE)
    sound, _, _ = CPU.step(query, keys, values, sketch, regions, 8, 1e-3, SCALING)
    for damaged, place in ((query, (0, 0, 0)), (keys, (0, 0, 88, 0))):
        kept = damaged.clone()
        damaged[place] = bad
        output, _, selection = CPU.step(query, keys, values, sketch, regions, 8, 1e-3, SCALING)
        assert output[0, 0].isnan().all()
        assert torch.equal(output[0, 2:], sound[0, 2:])
        assert_filler_is_a_position(selection, regions.low, regions.high)
        damaged.copy_(kept)


KEYS, QUERY = randn(0, 2, 2, 20, 8), randn(1, 2, 4, 8)
SKETCH = coded(KEYS, fit(KEYS))
TOKENS, ALL = torch.zeros(2, 2, 3, dtype=torch.int64), Rows.full(2, 20).regions(2, 5, DEVICE)
DOUBLE = Statistics(SKETCH.statistics.mean.double(), SKETCH.statistics.deviation.double())
MISFITS = {
    "heads that do not share evenly": lambda: CPU.attend_all(QUERY[:, :3], KEYS, KEYS, None, 1.0),
    "another batch": lambda: CPU.attend_all(QUERY[:1], KEYS, KEYS, None, 1.0),
    "another head size": lambda: CPU.attend_all(QUERY[..., :4], KEYS, KEYS, None, 1.0),
    "a query of two axes": lambda: CPU.attend_all(QUERY[0], KEYS, KEYS, None, 1.0),
    "a query of four axes": lambda: CPU.attend_all(QUERY[None], KEYS, KEYS, None, 1.0),
    "keys of three axes": lambda: CPU.attend_all(QUERY, KEYS[0], KEYS[0], None, 1.0),
    "fewer values than keys": lambda: CPU.attend_all(QUERY, KEYS, KEYS[:, :, :9], None, 1.0),
    "values of another dtype": lambda: CPU.attend_all(QUERY, KEYS, KEYS.half(), None, 1.0),
    "a query of another dtype": lambda: CPU.attend_all(QUERY.half(), KEYS, KEYS, None, 1.0),
    "float64 throughout": lambda: CPU.attend_all(QUERY.double(), KEYS.double(), KEYS.double(), None, 1.0),
    "a mask of another length": lambda: CPU.attend_all(QUERY, KEYS, KEYS, torch.ones(2, 9, dtype=torch.bool), 1.0),
    "a mask of numbers": lambda: CPU.attend_all(QUERY, KEYS, KEYS, torch.ones(2, 20), 1.0),
    "a token beyond the last": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS + 20, None, 1.0),
    "a token before the first": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS - 1, None, 1.0),
    "tokens of int32": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS.int(), None, 1.0),
    "tokens of one head": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS[:, :1], None, 1.0),
    "fewer marks than tokens": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS, TOKENS[..., :1] == 0, 1.0),
    "keys beyond the room": lambda: CPU.encode(KEYS, SKETCH, 13),
    "keys before the room": lambda: CPU.encode(KEYS, SKETCH, -1),
    "keys of another head size": lambda: CPU.encode(KEYS.repeat(1, 1, 1, 2), SKETCH, 0),
    "keys of another batch": lambda: CPU.encode(KEYS[:1], SKETCH, 0),
    "keys of float64": lambda: CPU.encode(KEYS.double(), SKETCH, 0),
    "scores beyond the room": lambda: CPU.score(QUERY, SKETCH, 0, 33, 1.0),
    "scores backwards": lambda: CPU.score(QUERY, SKETCH, 9, 8, 1.0),
    "scores of another head size": lambda: CPU.score(QUERY[..., :4], SKETCH, 0, 9, 1.0),
    "scores of float64": lambda: CPU.score(QUERY.double(), SKETCH, 0, 9, 1.0),
    "scores of three heads": lambda: CPU.score(QUERY[:, :3], SKETCH, 0, 9, 1.0),
    "statistics of float64": lambda: CPU.score(QUERY, Coded(SKETCH.codes, SKETCH.factors, DOUBLE), 0, 9, 1.0),
    "codes of another width": lambda: CPU.score(
        QUERY, Coded(SKETCH.codes.repeat(1, 1, 1, 2, 1, 1)[..., :1, :, :2], SKETCH.factors, SKETCH.statistics), 0, 9, 1.0
    ),
    "fewer codes than factors": lambda: CPU.score(
        QUERY, Coded(SKETCH.codes[:, :, :1], SKETCH.factors, SKETCH.statistics), 0, 20, 1.0
    ),
    "factors of float32": lambda: CPU.score(
        QUERY, Coded(SKETCH.codes, SKETCH.factors.float(), SKETCH.statistics), 0, 9, 1.0
    ),
    "a middle of another length": lambda: CPU.select(
        torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 1), 0, torch.ones(1, 8, dtype=torch.bool), 1, 0.0
    ),
    "a near log-sum-exp of another group": lambda: CPU.select(
        torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 2), 0, None, 1, 0.0
    ),
    "a step over fewer keys": lambda: CPU.step(QUERY, KEYS[:, :, :9], KEYS[:, :, :9], SKETCH, ALL, 1, 0.0, 1.0),
    "a step over a sketch of fewer tokens": lambda: CPU.step(
        QUERY, KEYS.repeat(1, 1, 3, 1), KEYS.repeat(1, 1, 3, 1), SKETCH,
        Rows.full(2, 60).regions(2, 5, DEVICE), 1, 0.0, 1.0,
    ),
    "a step of another batch": lambda: CPU.step(QUERY[:1], KEYS[:1], KEYS[:1], SKETCH, ALL, 1, 0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_are_refused(misfit):
    with pytest.raises(ShapeError):
        MISFITS[misfit]()
