import math
from itertools import pairwise

import pytest
import torch
from cases import FLOATS, REFERENCE, SEEDS, left_padded, masks, randn, token_codes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_attention_decoder.cache import KVBuffer, Sketch
from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.errors import NonFiniteError, ShapeError
from sparse_attention_decoder.kernels import Kernels
from sparse_attention_decoder.kernels.reference import ReferenceKernels
from sparse_attention_decoder.policies.quest import PAGE, PageBounds, page_of
from sparse_attention_decoder.selection import Rows

SINKS = 2

pytestmark = pytest.mark.usefixtures("poison")


# --- keys and values


def buffer_with(keys: Tensor, values: Tensor) -> KVBuffer:
    buffer = KVBuffer()
    buffer.append(keys, values)
    return buffer


def pair(tokens: int, *, rows: int = 2, heads: int = 2, dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of as many tokens; values are wider, as they may be."""
    return randn(seed, rows, heads, tokens, dim), randn(seed + 1, rows, heads, tokens, dim + 2)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@settings(max_examples=10)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_tokens_appended_in_pieces_equal_tokens_appended_at_once(dtype, pieces):
    keys, values = (both.to(dtype) for both in pair(sum(pieces)))
    buffer = KVBuffer()
    for key_piece, value_piece in zip(keys.split(pieces, 2), values.split(pieces, 2), strict=True):
        buffer.append(key_piece, value_piece)
    assert buffer.length == sum(pieces)
    assert torch.equal(buffer.keys, keys)
    assert torch.equal(buffer.values, values)


def test_the_buffer_grows_by_half_and_not_per_token():
    token, buffer, capacities = pair(1), KVBuffer(), [0]
    for _ in range(2000):
        buffer.append(*token)
        if buffer.capacity != capacities[-1]:
            capacities.append(buffer.capacity)
    assert buffer.capacity < 1.5 * 2000 + 1
    for small, large in pairwise(capacities[3:]):
        assert large == small + small // 2
    assert len(capacities) < 4 + math.log(2000, 1.5)


def test_a_prompt_leaves_room_to_decode_in_place():
    buffer = buffer_with(*pair(100))
    place = buffer.keys.data_ptr()
    for _ in range(50):
        buffer.append(*pair(1))
    assert buffer.keys.data_ptr() == place


def test_keys_and_values_are_views_and_not_copies():
    buffer = buffer_with(*pair(3))
    buffer.keys[0, 0, 0, 0] = 7.0
    buffer.values[0, 0, 0, 0] = 8.0
    assert (float(buffer.keys[0, 0, 0, 0]), float(buffer.values[0, 0, 0, 0])) == (7.0, 8.0)


def test_the_buffer_keeps_its_own_copy_of_what_is_appended():
    keys, values = pair(3)
    buffer = buffer_with(keys, values)
    kept = buffer.keys.clone()
    keys.zero_()
    assert torch.equal(buffer.keys, kept)


@given(st.integers(1, 20), st.data())
def test_truncating_and_appending_equals_never_having_had_the_tokens(length, data):
    kept = data.draw(st.integers(0, length))
    past, gone, fresh = pair(kept), pair(length - kept, seed=5), pair(3, seed=9)
    buffer = buffer_with(*past)
    buffer.append(*gone)
    buffer.truncate(kept)
    buffer.append(*fresh)
    assert torch.equal(buffer.keys, torch.cat([past[0], fresh[0]], 2))
    assert torch.equal(buffer.values, torch.cat([past[1], fresh[1]], 2))


@pytest.mark.parametrize("rows", [[2, 0, 1], [0, 0, 0], [1], [2, 1, 0, 0, 1, 2, 2], []], ids=str)
def test_rows_can_be_reordered_repeated_and_selected_and_then_appended_to(rows):
    keys, values = pair(5, rows=3)
    more = pair(4, rows=len(rows), seed=7)
    buffer = buffer_with(keys, values)
    buffer.take_rows(torch.tensor(rows, dtype=torch.int64))
    buffer.append(*more)
    assert torch.equal(buffer.keys, torch.cat([keys[rows], more[0]], 2))
    assert torch.equal(buffer.values, torch.cat([values[rows], more[1]], 2))


def test_an_empty_buffer_ignores_taking_rows_and_a_reset_one_is_empty():
    buffer = KVBuffer()
    buffer.take_rows(torch.tensor([0]))
    assert not buffer.is_allocated
    buffer.append(*pair(3))
    assert buffer.is_allocated
    buffer.reset()
    assert (buffer.is_allocated, buffer.length, buffer.capacity) == (False, 0, 0)
    buffer.append(*pair(2, heads=1, dim=8))
    assert buffer.keys.shape == (2, 1, 2, 8)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_reading_an_empty_buffer_is_refused(name):
    with pytest.raises(ShapeError, match="the cache is empty; append keys and values"):
        getattr(KVBuffer(), name)


KEYS, VALUES = pair(2)
MISFITS = {
    "other rows": pair(2, rows=3),
    "other heads": pair(2, heads=1),
    "other key dim": (KEYS[..., :3], VALUES),
    "other value dim": (KEYS, VALUES[..., :3]),
    "other key dtype": (KEYS.double(), VALUES),
    "other value dtype": (KEYS, VALUES.half()),
    "three axes": (KEYS[0], VALUES[0]),
    "five axes": (KEYS[None], VALUES[None]),
    "fewer keys than values": (KEYS[:, :, :1], VALUES),
    "fewer values than keys": (KEYS, VALUES[:, :, :1]),
    "more values than keys": (KEYS, torch.cat([VALUES, VALUES], 2)),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_what_is_held_are_refused_and_leave_it_alone(misfit):
    keys, values = pair(5)
    buffer = buffer_with(keys, values)
    with pytest.raises(ShapeError, match=r"cache holds|do not match"):
        buffer.append(*MISFITS[misfit])
    assert torch.equal(buffer.keys, keys)
    assert torch.equal(buffer.values, values)


@pytest.mark.parametrize("misfit", [name for name in MISFITS if "axes" in name or "than" in name])
def test_keys_and_values_that_do_not_match_are_refused_at_first_too(misfit):
    with pytest.raises(ShapeError, match="do not match"):
        KVBuffer().append(*MISFITS[misfit])


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_to_less_than_nothing_or_more_than_is_held_is_refused(length):
    with pytest.raises(ShapeError, match=f"truncate to {length} tokens; the cache holds 3"):
        buffer_with(*pair(3)).truncate(length)


# --- an index is a function of the keys alone

OPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 12)),
        st.tuples(st.just("catch up"), st.floats(0, 1)),
        st.tuples(st.just("truncate"), st.floats(0, 1)),
        st.tuples(st.just("take rows"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("mask"), st.floats(0, 1)),
    ),
    max_size=10,
)
# truncated below what the statistics were fitted on, and grown back with other keys before anyone looked
REGROWN = [("append", 24), ("catch up", 1.0), ("truncate", 0.1), ("append", 24)]
# truncated behind what they were fitted on
TRIMMED = [("append", 27), ("catch up", 1.0), ("truncate", 28 / 30), ("append", 2)]
# a row that has ended is masked behind its end only later, when another has grown on
ENDED = [("append", 27), ("catch up", 1.0), ("mask", 0.5), ("append", 1)]


def run_history(index_for, check, ops, mask: Tensor, dim: int, seed: int, dtype: torch.dtype) -> None:
    """Run the operations on an index and on plain tensors; `check(index, keys, rows, needed)` after each catch-up."""
    index, mask, keys = index_for(), mask.clone(), randn(seed, mask.shape[0], 2, mask.shape[1], dim, dtype=dtype)
    for step, (name, how) in enumerate([*ops, ("catch up", 1.0)]):
        if name == "append":
            new = 3 * randn(seed + step + 1, len(keys), 2, how, dim, dtype=dtype) + step
            keys, mask = torch.cat([keys, new], 2), torch.cat([mask, torch.ones(len(keys), how, dtype=torch.bool)], 1)
        elif name == "truncate":
            length = max(1, round(how * keys.shape[2]))
            keys, mask = keys[:, :, :length], mask[:, :length]
            index.truncate(length)
        elif name == "mask":
            mask = mask.clone()
            mask[0, round(how * (mask.shape[1] - 1))] ^= True
        elif name == "take rows":
            rows = torch.tensor(how) % len(keys)
            keys, mask = keys[rows], mask[rows]
            index.take_rows(rows)
        else:
            needed = max(1, round(how * keys.shape[2]))
            index.catch_up(keys, Rows.from_mask(mask), needed)
            check(index, keys, Rows.from_mask(mask), needed)


def new_sketch(kernels: Kernels = REFERENCE) -> Sketch:
    return Sketch(kernels, SINKS)


def sketch_of(keys: Tensor, rows: Rows, kernels: Kernels = REFERENCE) -> Sketch:
    sketch = new_sketch(kernels)
    sketch.catch_up(keys, rows, keys.shape[2])
    return sketch


def check_sketch(sketch: Sketch, keys: Tensor, rows: Rows, needed: int, kernels: Kernels = REFERENCE) -> None:
    fresh = sketch_of(keys, rows, kernels)
    real = torch.ones(keys.shape[0], needed, dtype=torch.bool) if rows.valid is None else rows.valid[:, :needed]
    assert needed <= sketch.length <= keys.shape[2]
    kept, expected = sketch.coded, fresh.coded
    assert torch.equal(kept.statistics.mean, expected.statistics.mean)
    assert torch.equal(kept.statistics.deviation, expected.statistics.deviation)
    codes = token_codes(kept, needed), token_codes(expected, needed)
    factors = kept.factors[:, :, :needed], expected.factors[:, :, :needed]
    for ours, theirs in (codes, factors):
        assert torch.equal(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real])


@settings(max_examples=60)
@given(OPS, masks(max_rows=2, max_tokens=30), st.sampled_from([6, 8]), SEEDS, st.sampled_from([*FLOATS, torch.float64]))
@example(REGROWN, torch.ones(2, 3, dtype=torch.bool), 8, 0, torch.float32)
@example(REGROWN, left_padded(3, 2), 8, 0, torch.float32)
@example(TRIMMED, torch.ones(2, 3, dtype=torch.bool), 8, 0, torch.float32)
@example(ENDED, torch.ones(2, 3, dtype=torch.bool), 8, 0, torch.float32)
def test_a_sketch_is_bit_equal_to_a_fresh_one_whatever_happened_before(ops, mask, dim, seed, dtype):
    run_history(new_sketch, check_sketch, ops, mask, dim, seed, dtype)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=3), SEEDS)
def test_a_padded_row_is_coded_as_it_would_be_alone(counts, seed):
    mask = left_padded(*counts)
    keys = randn(seed, len(counts), 2, max(counts), 8)
    length = max(counts)
    sketch = sketch_of(keys, Rows.from_mask(mask)).coded
    for row, count in enumerate(counts):
        alone = sketch_of(keys[row : row + 1, :, -count:], Rows.full(1, count)).coded
        assert torch.equal(token_codes(sketch, length)[row, :, -count:], token_codes(alone, count)[0])
        assert torch.equal(sketch.factors[row, :, length - count : length], alone.factors[0, :, :count])
        assert torch.equal(sketch.statistics.mean[row], alone.statistics.mean[0])
        assert torch.equal(sketch.statistics.deviation[row], alone.statistics.deviation[0])


def test_sinks_have_no_say_in_the_statistics():
    keys = randn(0, 1, 2, 20, 8)
    plain = sketch_of(keys, Rows.full(1, 20)).coded.statistics
    keys[:, :, :SINKS] += 1000
    assert torch.equal(sketch_of(keys, Rows.full(1, 20)).coded.statistics.mean, plain.mean)


def test_no_key_is_coded_before_it_is_needed_and_then_all_that_are_held():
    class Counting(ReferenceKernels):
        coded = 0

        def encode(self, keys, coded, start):
            Counting.coded += keys.shape[2]
            super().encode(keys, coded, start)

    # 100 to 103 tokens share a fit
    sketch, keys = Sketch(Counting(), SINKS), randn(0, 1, 1, 103, 8)
    assert fit_length(100) == fit_length(103)
    for length, needed, coded in ((100, 90, 100), (101, 91, 100), (102, 100, 100), (103, 101, 103)):
        sketch.catch_up(keys[:, :, :length], Rows.full(1, length), needed)
        assert Counting.coded == coded


def test_a_sketch_says_how_many_bytes_a_token_takes():
    sketches = [sketch_of(randn(0, 1, 1, 9, dim), Rows.full(1, 9)) for dim in (1, 16, 17, 64)]
    # two bits a channel in words of 16 channels, and two bytes of factor
    assert [sketch.coded.bytes_per_token for sketch in sketches] == [6, 6, 10, 18]


def test_a_reset_sketch_can_be_used_for_other_shapes():
    sketch = sketch_of(randn(0, 2, 2, 30, 8), Rows.full(2, 30))
    sketch.reset()
    keys = randn(1, 1, 3, 20, 12)
    sketch.catch_up(keys, Rows.full(1, 20), 20)
    check_sketch(sketch, keys, Rows.full(1, 20), 20)


def test_the_fit_covers_nearly_all_tokens_in_steps_of_a_quarter():
    fits = [fit_length(tokens) for tokens in range(5000)]
    assert fits[:8] == [0] * 8
    assert fits == sorted(fits)
    for tokens, fitted in enumerate(fits[8:], start=8):
        assert 0.75 * tokens < fitted <= tokens
    steps = sorted(set(fits))[1:]
    assert all(after == step + step // 4 for step, after in pairwise(steps))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
# a sink, within the fit, beyond it; and one channel or all of them
@pytest.mark.parametrize("token", [0, 5, 39])
@pytest.mark.parametrize("channels", [slice(3, 4), slice(None)], ids=["one channel", "all"])
def test_a_key_that_is_not_finite_is_refused_every_time(bad, token, channels):
    keys = randn(0, 1, 2, 40, 8)
    keys[0, 1, token, channels] = bad
    sketch = new_sketch()
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            sketch.catch_up(keys, Rows.full(1, 40), 40)


def test_a_key_that_is_not_finite_is_refused_when_it_is_appended_later():
    keys = randn(0, 1, 2, 103, 8)
    sketch = sketch_of(keys[:, :, :100], Rows.full(1, 100))
    keys[0, 1, 102] = math.nan
    with pytest.raises(NonFiniteError):
        sketch.catch_up(keys, Rows.full(1, 103), 103)
    keys[0, 1, 102] = 1.0
    sketch.catch_up(keys, Rows.full(1, 103), 103)
    check_sketch(sketch, keys, Rows.full(1, 103), 103)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_padding_that_is_not_finite_changes_nothing(bad):
    keys, rows = randn(0, 2, 2, 40, 8), Rows.from_mask(left_padded(40, 25))
    clean = sketch_of(keys, rows).coded
    keys[1, :, :15] = bad
    sketch = sketch_of(keys, rows).coded
    assert torch.equal(token_codes(sketch, 40)[1, :, 15:], token_codes(clean, 40)[1, :, 15:])
    assert torch.equal(sketch.factors[1, :, 15:40], clean.factors[1, :, 15:40])
    assert torch.equal(sketch.statistics.mean, clean.statistics.mean)


# --- page bounds


def check_bounds(bounds: PageBounds, keys: Tensor, rows: Rows, needed: int) -> None:
    for row in range(keys.shape[0]):
        own = keys[row] if rows.valid is None else keys[row][:, rows.valid[row]]
        for page, members in enumerate(own.split(PAGE, dim=1) if own.shape[1] else ()):
            assert torch.equal(bounds.low[row, :, page], members.amin(1))
            assert torch.equal(bounds.high[row, :, page], members.amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(OPS, masks(max_rows=2), SEEDS)
@example(REGROWN, torch.ones(2, 3, dtype=torch.bool), 0)
@example(ENDED, torch.ones(2, 3, dtype=torch.bool), 0)
def test_page_bounds_are_the_extremes_of_each_page_whatever_happened_before(dtype, ops, mask, seed):
    run_history(PageBounds, check_bounds, ops, mask, 4, seed, dtype)


@given(masks(max_tokens=60), SEEDS)
def test_a_bound_is_never_below_the_largest_logit_of_its_page(mask, seed):
    keys, query = (randn(seed + n, len(mask), 2, mask.shape[1], 8, dtype=torch.float64) for n in range(2))
    rows, bounds = Rows.from_mask(mask), PageBounds()
    bounds.catch_up(keys, rows, mask.shape[1])
    pages = page_of(rows, len(mask), keys.device)
    for row, token in mask.nonzero().tolist():
        low, high = bounds.low[row, :, pages[row, token]], bounds.high[row, :, pages[row, token]]
        bound = torch.maximum(query[row, :, 0] * low, query[row, :, 0] * high).sum(-1)
        assert (bound >= (query[row, :, 0] * keys[row, :, token]).sum(-1) - 1e-12).all()


@given(masks(max_tokens=60))
def test_pages_hold_sixteen_real_tokens_of_their_row_in_order(mask):
    pages = page_of(Rows.from_mask(mask), len(mask), mask.device)
    for row, real in zip(pages, mask, strict=True):
        assert row[real].tolist() == [rank // 16 for rank in range(int(real.sum()))]
    assert (pages * PAGE < mask.shape[1]).all()
