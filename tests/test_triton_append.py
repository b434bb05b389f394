"""One token at a time onto memory that never moves: what the growing cache and its sketch hold after the same."""

import pytest
import torch
from cases import REFERENCE, token_codes
from test_cpu_kernels import each_dtype
from triton_cases import home, laws_of_kernels, on
from triton_tokens import Tokens

from sparse_attention_decoder.cache import KVBuffer
from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.kernels.reference import STEP
from sparse_attention_decoder.kernels.rotation import rotate
from sparse_attention_decoder.selection import Rows

pytestmark = laws_of_kernels


# --- keys, values and codes


def assert_coded_with_its_statistics(layer: Tokens, sketch: Coded, tokens: int) -> None:
    """Codes bit for bit those of the definition, factors to the last place, and nothing behind them."""
    expected = Coded.room(layer.room, Statistics(sketch.statistics.mean, sketch.statistics.deviation))
    REFERENCE.encode(layer.text[1][:, :, :tokens], expected, 0)
    ours, theirs = token_codes(sketch, layer.room), token_codes(expected, layer.room)
    places = sketch.factors.view(torch.int16).int() - expected.factors.view(torch.int16).int()
    for row, start in enumerate(layer.first):
        assert torch.equal(ours[row, :, start:tokens], theirs[row, :, start:tokens])
        assert places[row, :, start:tokens].abs().max() <= 1
    assert ours[:, :, tokens:].eq(0xA5).all()
    assert sketch.factors[:, :, tokens:].isnan().all()


def assert_coded_as_the_growing_cache(layer: Tokens, sketch: Coded, tokens: int) -> None:
    """Statistics of the definition but for their last places, and codes but for channels that lie at a cut."""
    expected = layer.defined(tokens)
    for ours, theirs in zip(vars(sketch.statistics).values(), vars(expected.statistics).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    keys, moments = layer.text[1][:, :, :tokens], expected.statistics
    z = (rotate(keys) - moments.mean.unsqueeze(2)) / moments.deviation.unsqueeze(2)
    at_a_cut = (z.abs().unsqueeze(-1) - torch.tensor([0.0, STEP])).abs().amin(-1) < 1e-4
    width = 4 * sketch.codes.shape[3]
    for row, start in enumerate(layer.first):
        apart = token_codes(sketch, tokens)[row, :, start:] ^ token_codes(expected, tokens)[row, :, start:]
        for channel in range(keys.shape[-1]):
            own = (apart[..., channel % width] >> (2 * (channel // width))) & 3
            assert own[~at_a_cut[row, :, start:, channel]].eq(0).all()


@each_dtype
@pytest.mark.parametrize(
    ("before", "starts", "dim"), [(0, (0,), 24), (0, (0,), 64), (20, (0, 7), 80), (36, (3,), 128)], ids=str
)
def test_tokens_appended_one_by_one_are_held_and_coded_as_the_growing_cache_does(device, dtype, before, starts, dim):
    layer, buffer = Tokens(device, dtype, 60, starts, heads=1, dim=dim), KVBuffer()
    if before:
        layer.prefill(before)
        buffer.append(*(x[:, :, :before] for x in layer.text[1:]))
    moments = home(layer.coded.statistics)
    for at in range(before, before + 24):
        layer.append(at)
        buffer.append(*(x[:, :, at : at + 1] for x in layer.text[1:]))
        tokens = at + 1
        assert home(layer.length).item() == buffer.length == tokens
        for ours, theirs in ((layer.keys, buffer.keys), (layer.values, buffer.values)):
            assert torch.equal(home(ours)[:, :, :tokens], theirs)
            assert home(ours)[:, :, tokens:].isnan().all()
        sketch = home(layer.coded)
        assert_coded_with_its_statistics(layer, sketch, tokens)
        assert_coded_as_the_growing_cache(layer, sketch, tokens)
        for row, start in enumerate(starts):
            due = fit_length(tokens - start) != fit_length(at - start)
            for before_it, after_it in zip(vars(moments).values(), vars(sketch.statistics).values(), strict=True):
                assert torch.equal(before_it[row], after_it[row]) is not due, f"{tokens - start} tokens"
        moments = sketch.statistics


def test_the_statistics_of_a_long_row_are_those_of_float64(device):
    # far from zero, where a sum of squares would have no bits left
    layer = Tokens(device, torch.float32, 190, heads=1)
    layer.text = (layer.text[0], layer.text[1] + 300, layer.text[2])
    layer.text_there = on(device, layer.text)
    layer.prefill(187)
    layer.append(187)
    assert fit_length(188) == 188
    exact = REFERENCE.fit(layer.text[1][0, :, 2:188].double())
    for ours, theirs in zip(vars(home(layer.coded.statistics)).values(), exact, strict=True):
        torch.testing.assert_close(ours[0].double(), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sinks", [7, 8, 9, 12])
def test_rows_of_hardly_more_tokens_than_sinks_have_the_statistics_of_the_definition(device, sinks):
    layer = Tokens(device, torch.float32, 16, heads=1, sinks=sinks, dense=30)
    for at in range(15):
        layer.append(at)
        moments, expected = home(layer.coded.statistics), layer.defined(at + 1).statistics
        for ours, theirs in zip(vars(moments).values(), vars(expected).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@each_dtype
def test_a_new_token_may_be_a_view_of_what_the_model_computed(device, dtype):
    ours, theirs = (Tokens(device, dtype, 30, (0, 2)) for _ in range(2))
    # as projections leave them: tokens before heads, keys and values side by side
    queries, keys, values = ours.text_there
    both = torch.cat([keys.transpose(1, 2), values.transpose(1, 2)], -1)
    ours.text_there = (queries, *(x.transpose(1, 2) for x in both.split([24, 32], -1)))
    assert not ours.text_there[1][:, :, 0].is_contiguous()
    for layer in (ours, theirs):
        layer.prefill(9)
        layer.append(9)
    for one, other in zip(home(ours.written), home(theirs.written), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


# --- what attention is to read


def test_what_is_to_be_read_is_what_the_rows_of_the_growing_cache_say(device):
    starts, sinks, window, dense = (0, 9, 14), 3, 6, 20
    layer = Tokens(device, torch.float32, 50, starts, heads=1, sinks=sinks, window=window, dense=dense)
    layer.prefill(16)
    for at in range(16, 40):
        layer.append(at)
        bounds, near, turn = layer.divided
        assert turn.tolist() == [0]
        for row, start in enumerate(starts):
            count = at + 1 - start
            low, high, begin, end = bounds[row].tolist()
            if count <= dense:
                assert (begin, end) == (start, at + 1)
                assert high <= low
                continue
            regions = Rows.full(1, count).regions(sinks, window, torch.device("cpu"))
            assert begin >= end, "the whole row would be read"
            assert (low, high) == (start + regions.low, start + regions.high)
            assert torch.equal(near[row].long(), start + regions.near[0])


# --- no room


@each_dtype
def test_at_capacity_nothing_is_written_and_what_is_read_is_nan_until_there_is_room_again(device, dtype):
    layer = Tokens(device, dtype, 24, (0, 3), heads=1)
    layer.prefill(23)
    layer.append(23)
    assert layer.read(23, 4, 0.01, 0.2).isfinite().all()
    held = home(layer.written)
    for _ in range(2):
        layer.append(24)
        *tensors, length, _ = home(layer.written)
        assert length.item() == 24
        assert layer.divided[2].tolist() == [0]
        for before, after in zip(held, tensors, strict=False):
            assert torch.equal(before.nan_to_num(), after.nan_to_num())
        assert layer.read(24, 4, 0.01, 0.2).isnan().all()
    layer.length.fill_(20)
    layer.append(20)
    assert home(layer.length).item() == 21
    assert layer.read(20, 4, 0.01, 0.2).isfinite().all()
