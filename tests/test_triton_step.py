"""Triton's sparse step: what the reference chooses and computes, up to the rounding of logits."""

import math
from dataclasses import replace

import pytest
import torch
from cases import FLOATS, REFERENCE, SEEDS, coded, fit, left_padded, masks, randn, skewed_keys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import GROUPS, assert_as_accurate_as_pytorch, assert_lse_is_exact, each_dtype, exact
from torch import Tensor
from triton_cases import TRITON, home, laws_of_kernels, on

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels import Coded
from sparse_attention_decoder.selection import Regions, Rows, Selection

SCALING = 0.2
CPU = torch.device("cpu")
# between kernels logits are float16, below the largest of their tile: a share may be off by this much of itself
SHARE = 0.01

pytestmark = laws_of_kernels


def estimated_shares(query: Tensor, keys: Tensor, sketch: Coded, regions: Regions) -> Tensor:
    """[B, Hkv, M], shares of the middle by the definition, -1 where a token may not be chosen."""
    logits = REFERENCE.score(query, sketch, regions.low, regions.high, SCALING)
    near = REFERENCE.exact_logits(query, keys, regions.near[:, None].expand(-1, keys.shape[1], -1), SCALING)
    if regions.near_valid is not None:
        near = near.masked_fill(~regions.near_valid[:, None, None], -math.inf)
    masked = torch.zeros(logits.shape[0], 1, logits.shape[-1], dtype=torch.bool)
    if regions.middle is not None:
        masked = ~regions.middle[:, None]
        logits = logits.masked_fill(masked.unsqueeze(2), -math.inf)
    total = torch.logaddexp(logits.logsumexp(-1), near.logsumexp(-1)).unsqueeze(-1)
    return (logits - total).exp().mean(2).masked_fill(masked, -1.0)


def assert_same_choice(ours: Selection, theirs: Selection, shares: Tensor, low: int, floor: int, tau: float) -> None:
    """The same tokens, in the order of the text, but for those whose share is within rounding of the last one's."""
    for row, heads in enumerate(shares):
        for head, own in enumerate(heads):
            found, expected = ((x.tokens[row, head, : x.counts[row, head]] - low).tolist() for x in (ours, theirs))
            assert found == sorted(set(found)), "not in the order of the text, or a token twice"
            assert len(found) >= min(floor, int((own >= 0).sum()))
            cuts = [float(own[expected].min()) if expected else 0.0, tau]
            for token in set(found) ^ set(expected):
                share = float(own[token])
                assert any(abs(share - cut) <= SHARE * cut for cut in cuts), (row, head, token, share, cuts)
            if not tau:
                assert len(found) == len(expected)
    torch.testing.assert_close(ours.missing_mass, theirs.missing_mass, rtol=SHARE, atol=1e-4)


def assert_step_as_defined(
    query: Tensor, keys: Tensor, values: Tensor, regions: Regions, floor: int, tau: float, device: torch.device
) -> Selection:
    """Choice and missing mass of the definition, and output as accurate as PyTorch's over what was chosen."""
    case = (query, keys, values, coded(keys, fit(keys)), regions, floor, tau)
    output, lse, selection = home(TRITON.step(*on(device, case), SCALING))
    _, _, expected = REFERENCE.step(*case, SCALING)
    shares = estimated_shares(query, keys, case[3], regions)
    assert_same_choice(selection, expected, shares, regions.low, floor, tau)
    # what lies behind the counts may be gathered, so it has to be a position
    assert ((selection.tokens >= 0) & (selection.tokens < keys.shape[2])).all()
    tokens, valid = regions.with_chosen(selection)
    own = [x.gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])) for x in (keys, values)]
    counts = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    assert_as_accurate_as_pytorch(output, query, *own, counts, SCALING)
    assert_lse_is_exact(lse, exact(query, *own, counts, SCALING)[1], query.shape[-1])
    return selection


# --- the step


@settings(max_examples=25)
@given(
    masks(max_rows=2, min_tokens=40, max_tokens=130),
    st.sampled_from([1, 2]),
    st.sampled_from(GROUPS),
    st.sampled_from(FLOATS),
    st.sampled_from([1, 8, 500]),
    st.sampled_from([0.0, 3e-5, 0.01]),
    SEEDS,
)
@example(torch.ones(1, 130, dtype=torch.bool), 2, 4, torch.bfloat16, 500, 0.0, 3)
def test_a_step_over_whole_padded_and_holed_rows_is_that_of_the_definition(
    device, mask, heads, group, dtype, floor, tau, seed
):
    # one row has a middle; others may be shorter than sinks and window
    mask[0, -20:] = True
    keys, values = (
        randn(seed + n, len(mask), heads, mask.shape[1], size, dtype=dtype) for n, size in ((0, 24), (1, 16))
    )
    query = 2 * randn(seed + 2, len(mask), heads * group, 24, dtype=dtype)
    assert_step_as_defined(query, keys, values, Rows.from_mask(mask).regions(2, 5, CPU), floor, tau, device)


@each_dtype
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_a_step_over_several_tiles_is_that_of_the_definition(device, dim, dtype):
    keys, values = skewed_keys(dim, 1, 1, 700, dim, dtype=dtype), randn(1, 1, 1, 700, dim - 8, dtype=dtype)
    query = 2 * randn(2, 1, 4, dim, dtype=dtype) * dim**-0.5
    # two programs weigh what is near
    regions = Rows.full(1, 700).regions(4, 200, CPU)
    for floor, tau in ((32, 3e-4), (300, 0.0)):
        assert_step_as_defined(query, keys, values, regions, floor, tau, device)


def test_a_row_that_several_programs_choose_from_is_chosen_from_as_a_whole(device):
    keys, values = skewed_keys(5, 1, 1, 5000, 64, dtype=torch.bfloat16), randn(1, 1, 1, 5000, 64, dtype=torch.bfloat16)
    query = randn(2, 1, 4, 64, dtype=torch.bfloat16) / 8
    selection = assert_step_as_defined(query, keys, values, Rows.full(1, 5000).regions(4, 64, CPU), 600, 1e-4, device)
    assert selection.counts.min() >= 600


def test_rows_that_no_two_programs_share_are_served_by_one_with_several_tiles(device):
    keys, values = skewed_keys(3, 4, 4, 600, 24), randn(1, 4, 4, 600, 16)
    query, regions = randn(2, 4, 4, 24) / 4, Rows.from_mask(left_padded(600, 540, 600, 30)).regions(4, 20, CPU)
    assert_step_as_defined(query, keys, values, regions, 100, 1e-3, device)


def test_rows_whose_keys_differ_by_magnitudes_do_not_influence_each_other(device):
    keys, values, query = skewed_keys(0, 3, 2, 150, 24), randn(1, 3, 2, 150, 24), randn(2, 3, 8, 24)
    keys[1] *= 30
    rows, sketch = Rows.full(3, 150), coded(keys, fit(keys))
    together = TRITON.step(*on(device, (query, keys, values, sketch, rows.regions(2, 5, CPU), 9, 0.01)), SCALING)
    for row in range(3):
        part = slice(row, row + 1)
        alone = coded(keys[part], fit(keys[part]))
        case = (query[part], keys[part], values[part], alone, Rows.full(1, 150).regions(2, 5, CPU), 9, 0.01)
        output, lse, chosen = TRITON.step(*on(device, case), SCALING)
        torch.testing.assert_close(together[0][part], output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[1][part], lse, rtol=1e-5, atol=1e-6)
        assert torch.equal(together[2].counts[part], chosen.counts)


@each_dtype
def test_a_threshold_that_everything_exceeds_gives_dense_attention(device, dtype):
    mask = left_padded(150, 90)
    keys, values = skewed_keys(0, 2, 2, 150, 24, dtype=dtype), randn(1, 2, 2, 150, 32, dtype=dtype)
    query, regions = randn(2, 2, 8, 24, dtype=dtype) / 4, Rows.from_mask(mask).regions(2, 5, CPU)
    case = (query, keys, values, coded(keys, fit(keys)), regions)
    for floor, tau in ((1, 1e-30), (150, 0.0)):
        output, lse, selection = home(TRITON.step(*on(device, (*case, floor, tau)), SCALING))
        assert selection.counts.tolist() == [[143] * 2, [83] * 2]
        assert selection.missing_mass.max() < 1e-3
        valid = mask[:, None].expand(-1, 2, -1)
        assert_as_accurate_as_pytorch(output, query, keys, values, valid, SCALING)
        assert_lse_is_exact(lse, exact(query, keys, values, valid, SCALING)[1], 24)


@each_dtype
def test_a_step_without_a_middle_reads_what_is_near(device, dtype):
    keys, values, query = (randn(n, 2, 2, size, 24, dtype=dtype) for n, size in enumerate((9, 9, 3)))
    for rows in (Rows.full(2, 9), Rows.from_mask(left_padded(9, 4))):
        case = (query.flatten(1, 2), keys, values, coded(keys, fit(keys)), rows.regions(2, 7, CPU), 5, 0.01)
        output, _, selection = home(TRITON.step(*on(device, case), SCALING))
        assert selection.counts.eq(0).all()
        valid = torch.ones(2, 9, dtype=torch.bool) if rows.valid is None else rows.valid
        assert_as_accurate_as_pytorch(
            output, query.flatten(1, 2), keys, values, valid[:, None].expand(-1, 2, -1), SCALING
        )


@each_dtype
@pytest.mark.parametrize("padded", [False, True])
def test_memory_that_nobody_wrote_changes_nothing(device, dtype, padded):
    mask = left_padded(150, 90 if padded else 150)
    keys, values = skewed_keys(0, 2, 2, 150, 24, dtype=dtype), randn(1, 2, 2, 150, 24, dtype=dtype)
    query, regions = randn(2, 2, 8, 24, dtype=dtype), Rows.from_mask(mask).regions(2, 5, CPU)
    sketch = coded(keys, fit(keys))
    rooms = [torch.full((2, 2, 190, 24), math.nan, dtype=dtype) for _ in range(2)]
    wide = Coded.room(190, sketch.statistics)
    wide.codes.fill_(0xFF)
    wide.factors.fill_(math.nan)
    # rows apart, for each has its own room
    for row, own in enumerate(mask):
        real = own.nonzero().flatten()
        middle = real[2:-5]
        for room, held in zip(rooms, (keys, values), strict=True):
            room[row, :, real] = held[row, :, real]
        wide.codes[row, :, middle // 16, :, middle % 16] = sketch.codes[row, :, middle // 16, :, middle % 16]
        wide.factors[row, :, middle] = sketch.factors[row, :, middle]
    rooms, wide = on(device, rooms), on(device, wide)
    held = [room[:, :, :150] for room in rooms]
    expected = TRITON.step(*on(device, (query, keys, values, sketch, regions, 9, 0.01)), SCALING)
    found = TRITON.step(on(device, query), *held, wide, on(device, regions), 9, 0.01, SCALING)
    for ours, theirs in zip(
        (*found[:2], *vars(found[2]).values()), (*expected[:2], *vars(expected[2]).values()), strict=True
    ):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_step_of_a_damaged_query_or_window_gives_nan_and_leaves_other_heads_alone(device, bad):
    keys, values, query = randn(0, 1, 2, 90, 16), randn(1, 1, 2, 90, 16), randn(2, 1, 4, 16).abs()
    sketch, regions = coded(keys, fit(keys)), Rows.full(1, 90).regions(2, 5, CPU)
    sound, _, _ = home(TRITON.step(*on(device, (query, keys, values, sketch, regions, 8, 1e-3)), SCALING))
    for damaged, place in ((query, (0, 0, 0)), (keys, (0, 0, 88, 0))):
        kept = damaged.clone()
        damaged[place] = bad
        output, _, selection = home(TRITON.step(*on(device, (query, keys, values, sketch, regions, 8, 1e-3)), SCALING))
        assert output[0, 0].isnan().all()
        assert torch.equal(output[0, 2:], sound[0, 2:])
        assert ((selection.counts >= 0) & (selection.counts <= 83)).all()
        assert ((selection.tokens >= 0) & (selection.tokens < 90)).all()
        damaged.copy_(kept)


def test_regions_and_sketches_of_other_tensors_are_refused(device):
    keys, query = torch.zeros(2, 2, 20, 24), torch.zeros(2, 4, 24)
    sketch, regions = coded(keys, fit(keys)), Rows.full(2, 20).regions(2, 5, CPU)
    short = Coded(sketch.codes[:, :, :0].contiguous(), sketch.factors[:, :, :0].contiguous(), sketch.statistics)
    for reason, query_, sketch_, regions_ in (
        ("the cache holds 20 tokens", query, sketch, Rows.full(2, 30).regions(2, 5, CPU)),
        ("near is", query, sketch, Rows.full(1, 20).regions(2, 5, CPU)),
        ("near is torch.int32", query, sketch, replace(regions, near=regions.near.int())),
        ("middle is", query, sketch, replace(regions, middle=torch.ones(2, 12, dtype=torch.bool))),
        ("the middle ends at 15; the sketch holds 0", query, short, regions),
        ("do not fit", query[:1], sketch, regions),
    ):
        with pytest.raises(ShapeError, match=reason):
            TRITON.step(*on(device, (query_, keys, keys, sketch_, regions_, 8, 0.0)), SCALING)
