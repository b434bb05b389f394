"""The sieve of csrc/sift.h: middles of 16,384 tokens and more, sampled first and scanned with cuts."""

import pytest
import torch
from cases import coded, fit, randn
from torch import Tensor

from sparse_attention_decoder.kernels.cpu import CpuKernels
from sparse_attention_decoder.kernels.reference import REFERENCE
from sparse_attention_decoder.selection import Regions, Rows, Selection

CPU = CpuKernels()
DEVICE = torch.device("cpu")
DIM, HEADS, GROUP, SINKS, WINDOW = 64, 2, 3, 4, 256
SCALING = DIM**-0.5
# sinks 4: the first block is shared with the middle; 16,384 tokens of middle and some that fill no block
LENGTH = 16384 + WINDOW + 61

pytestmark = pytest.mark.usefixtures("poison", "isa")


def regions_of(length: int) -> Regions:
    return Rows.full(1, length).regions(SINKS, WINDOW, DEVICE)


def shares(query: Tensor, keys: Tensor, sketch, regions: Regions) -> Tensor:
    """[Hkv, M], the group's share of every middle token, by the definition."""
    logits = REFERENCE.score(query, sketch, regions.low, regions.high, SCALING)
    near = regions.near[:, None].expand(-1, HEADS, -1)
    near_lse = REFERENCE.exact_logits(query, keys, near, SCALING).logsumexp(-1)
    lse = torch.logaddexp(logits.logsumexp(-1), near_lse)
    return (logits - lse.unsqueeze(-1)).exp().mean(2)[0]


def chosen(selection: Selection, head: int) -> set[int]:
    return set(selection.tokens[0, head, : selection.counts[0, head]].tolist())


def steps(query: Tensor, keys: Tensor, floor: int, threshold: float):
    """The step of both backends, and the shares they go by."""
    values, regions, sketch = randn(7, *keys.shape), regions_of(keys.shape[2]), coded(keys, fit(keys))
    case = (query, keys, values, sketch, regions, floor, threshold, SCALING)
    return CPU.step(*case), REFERENCE.step(*case), shares(query, keys, sketch, regions)


def assert_alike(ours: Selection, theirs: Selection, share: Tensor, slack: float) -> None:
    """The same tokens, but for those whose share is within `slack` of the least that was chosen."""
    for head in range(HEADS):
        mine, own = chosen(ours, head), chosen(theirs, head)
        cut = min(float(share[head, token - SINKS]) for token in own)
        for token in mine ^ own:
            assert abs(float(share[head, token - SINKS]) / cut - 1) < slack
        listed = ours.tokens[0, head, : ours.counts[0, head]]
        assert bool((listed.diff() > 0).all())


@pytest.mark.parametrize(("floor", "threshold"), [(32, 3e-5), (32, 1e-3), (512, 0.0), (3000, 1e-4)])
@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_a_sieved_step_chooses_what_the_definition_chooses(floor, threshold, strength):
    keys, query = randn(1, 1, HEADS, LENGTH, DIM), strength * randn(2, 1, HEADS * GROUP, DIM)
    (output, lse, ours), (expected, expected_lse, theirs), share = steps(query, keys, floor, threshold)
    assert_alike(ours, theirs, share, 0.02)
    torch.testing.assert_close(ours.counts, theirs.counts, rtol=0.02, atol=1)
    torch.testing.assert_close(ours.missing_mass, theirs.missing_mass, rtol=0, atol=0.01)
    if all(chosen(ours, head) == chosen(theirs, head) for head in range(HEADS)):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [SINKS, 63, 64, 80, LENGTH // 2, LENGTH - WINDOW - 1])
def test_a_needle_is_found_wherever_it_is(position):
    keys, query = randn(1, 1, HEADS, LENGTH, DIM), randn(2, 1, HEADS * GROUP, DIM)
    # every query head of the group looks for the same key
    query = query.unflatten(1, (HEADS, GROUP))[:, :, :1].expand(-1, -1, GROUP, -1).flatten(1, 2).contiguous()
    keys[:, :, position] = 3 * query[:, ::GROUP]
    (_, _, ours), (_, _, theirs), _ = steps(query, keys, 1, 0.0)
    for head in range(HEADS):
        assert chosen(ours, head) == chosen(theirs, head) == {position}


def test_a_sample_that_misleads_costs_nothing_but_time():
    # all that is strong lies in sampled blocks, so the cuts come out too high: the scan is repeated without them
    keys, query = 0.1 * randn(1, 1, HEADS, LENGTH, DIM), 3 * randn(2, 1, HEADS * GROUP, DIM)
    direction = query.unflatten(1, (HEADS, GROUP)).mean(2)
    for block in range(4, (LENGTH - WINDOW) // 16, 8):
        keys[:, :, 16 * block : 16 * block + 16] += 0.3 * direction.unsqueeze(2)
    (_, _, ours), (_, _, theirs), share = steps(query, keys, 6000, 0.0)
    assert ours.counts.tolist() == theirs.counts.tolist() == [[6000, 6000]]
    assert_alike(ours, theirs, share, 0.02)


def test_a_floor_of_all_takes_all():
    keys, query = randn(1, 1, HEADS, LENGTH, DIM), randn(2, 1, HEADS * GROUP, DIM)
    (_, _, ours), _, _ = steps(query, keys, LENGTH, 0.0)
    for head in range(HEADS):
        assert chosen(ours, head) == set(range(SINKS, LENGTH - WINDOW))
    torch.testing.assert_close(ours.missing_mass, torch.zeros(1, HEADS), rtol=0, atol=1e-5)


def test_threads_do_not_change_a_sieved_step():
    keys, query = randn(1, 1, HEADS, LENGTH, DIM), randn(2, 1, HEADS * GROUP, DIM)
    values, regions, sketch = randn(7, *keys.shape), regions_of(LENGTH), coded(keys, fit(keys))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(CPU.step(query, keys, values, sketch, regions, 300, 1e-4, SCALING))
    finally:
        torch.set_num_threads(before)
    for output, lse, selection in found[1:]:
        assert torch.equal(output, found[0][0])
        assert torch.equal(lse, found[0][1])
        assert torch.equal(selection.tokens, found[0][2].tokens)
