import pytest
import torch
from cases import masks, near_and_middle, real_tokens
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.selection import Reads, Regions, Rows, Selection

CPU = torch.device("cpu")
SINKS = st.integers(0, 8)
WINDOWS = st.integers(1, 45)


def near_ids(regions: Regions) -> list[list[int]]:
    valid = torch.ones_like(regions.near, dtype=torch.bool) if regions.near_valid is None else regions.near_valid
    return [near[mask].tolist() for near, mask in zip(regions.near, valid, strict=True)]


def middle_ids(regions: Regions) -> list[list[int]]:
    if regions.middle is None:
        return [list(range(regions.low, regions.high)) for _ in regions.near]
    return [(row.nonzero().flatten() + regions.low).tolist() for row in regions.middle]


@given(masks(), SINKS, WINDOWS)
def test_sinks_window_and_middle_partition_the_real_tokens_of_each_row(mask, sinks, window):
    rows = Rows.from_mask(mask)
    regions = rows.regions(sinks, window, CPU)
    expected = [near_and_middle(real, sinks, window) for real in real_tokens(rows)]
    assert near_ids(regions) == [near for near, _ in expected]
    assert middle_ids(regions) == [middle for _, middle in expected]
    assert regions.middle_counts == tuple(len(middle) for _, middle in expected)


@given(masks(), SINKS, WINDOWS)
def test_a_padded_row_has_the_near_tokens_it_would_have_alone(mask, sinks, window):
    near = near_ids(Rows.from_mask(mask).regions(sinks, window, CPU))
    for row, real in enumerate(real_tokens(Rows(mask.shape[1], (0,), mask))):
        alone = near_ids(Rows.full(1, len(real)).regions(sinks, window, CPU))[0]
        assert near[row] == [real[token] for token in alone]


@given(masks(), SINKS, WINDOWS)
def test_near_entries_are_positions_of_the_cache_even_where_they_do_not_count(mask, sinks, window):
    near = Rows.from_mask(mask).regions(sinks, window, CPU).near
    assert near.dtype == torch.int64
    assert ((near >= 0) & (near < mask.shape[1])).all()


@given(st.integers(1, 3), st.integers(1, 40), SINKS, WINDOWS)
def test_rows_without_padding_equal_a_mask_that_is_true_everywhere(batch, length, sinks, window):
    full, masked = Rows.full(batch, length), Rows.from_mask(torch.ones(batch, length, dtype=torch.bool))
    assert masked == full
    assert masked.valid is None
    alike = Rows(length, full.counts, torch.ones(batch, length, dtype=torch.bool)).regions(sinks, window, CPU)
    assert near_ids(alike) == near_ids(full.regions(sinks, window, CPU))
    assert middle_ids(alike) == middle_ids(full.regions(sinks, window, CPU))


def test_a_row_of_padding_alone_has_no_tokens():
    regions = Rows.from_mask(torch.tensor([[False] * 5, [True] * 5])).regions(1, 2, CPU)
    assert near_ids(regions) == [[], [0, 3, 4]]
    assert middle_ids(regions) == [[], [1, 2]]


def test_the_same_rows_answer_for_every_sinks_and_window():
    for rows in (Rows.full(2, 9), Rows.from_mask(torch.arange(9).expand(2, -1) > 0)):
        first, second = rows.regions(1, 2, CPU), rows.regions(3, 1, CPU)
        assert near_ids(first) != near_ids(second)
        assert near_ids(rows.regions(1, 2, CPU)) == near_ids(first)


@given(masks(), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_rows_taken_equal_rows_of_the_mask_taken(mask, order):
    order = torch.tensor(order) % len(mask)
    taken, expected = Rows.from_mask(mask).take(order), Rows.from_mask(mask[order])
    assert (taken.length, taken.counts) == (expected.length, expected.counts)
    assert real_tokens(taken) == real_tokens(expected)


@given(masks(), st.data())
def test_the_past_is_the_same_until_the_first_token_that_was_masked_since(mask, data):
    later = torch.cat([mask, torch.ones(len(mask), 3, dtype=torch.bool)], 1)
    place = data.draw(st.tuples(*(st.integers(0, size - 1) for size in mask.shape)))
    later[place] ^= True
    for length in range(mask.shape[1] + 1):
        assert Rows.from_mask(later).same_past(Rows.from_mask(mask), length) == (length <= place[1])


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), torch.ones(1, 2, 3) > 0],
    ids=["float", "int", "1-D", "3-D"],
)
def test_a_mask_that_is_not_bool_of_two_axes_is_refused(mask):
    with pytest.raises(ShapeError, match=r"expected bool \[B, T\]"):
        Rows.from_mask(mask)


def test_the_first_counts_entries_of_a_selection_are_chosen():
    selection = Selection(torch.zeros(1, 3, 4, dtype=torch.int64), torch.tensor([[0, 2, 4]]))
    assert selection.chosen.tolist() == [[[False] * 4, [True, True, False, False], [True] * 4]]


def test_an_empty_selection_chooses_nothing():
    empty = Selection.empty(2, 3, CPU)
    assert empty.tokens.shape == empty.chosen.shape == (2, 3, 0)
    assert empty.counts.tolist() == [[0] * 3] * 2


def test_reads_add_up_field_by_field():
    total = Reads(1, 2, 3, 4, 5, 6, 7, 0.5)
    total.add(Reads(10, 20, 30, 40, 50, 60, 70, 0.25))
    assert total == Reads(11, 22, 33, 44, 55, 66, 77, 0.75)


def test_the_share_read_counts_the_index_and_is_whole_before_any_step():
    assert Reads().share_read == 1.0
    assert Reads(bytes_read=30, index_bytes=20, bytes_dense=200).share_read == 0.25
