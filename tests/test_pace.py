"""How long drafts are, and when none are made: from times and acceptance alone, no model."""

import pytest
import torch

from sparse_attention_decoder.models.pace import Pace


def paced(step: float, alone: float, further: float, right: float, rounds: int = 60) -> tuple[list[int], Pace]:
    """Lengths of drafts where steps take so long and every token is right with the same chance, by a fixed pattern."""
    pace, lengths = Pace(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        length, chance = 0, 1.0
        while pace.pays and pace.goes_on(length, chance):
            pace.record_step(step)
            chance *= pace.chance(0.9)
            length += 1
        seconds = alone + further * length
        pace.record_pass(length + 1, seconds)
        hits = torch.rand(length, generator=generator) < right
        accepted = int(hits.long().cumprod(0).sum())
        if length:
            pace.record_round([0.9] * length, accepted, seconds + length * step)
        lengths.append(length)
    return lengths, pace


def test_drafts_are_long_where_they_are_cheap_and_right_and_short_where_not():
    cheap, _ = paced(1.0, 20.0, 0.1, 0.98)
    dear, _ = paced(8.0, 20.0, 2.0, 0.98)
    wrong, _ = paced(1.0, 20.0, 0.1, 0.5)
    assert sum(cheap[-20:]) / 20 > 8
    assert sum(dear[-20:]) < sum(cheap[-20:])
    assert sum(wrong[-20:]) < sum(cheap[-20:])
    assert max(cheap) <= 15


@pytest.mark.parametrize(("step", "right"), [(20.0, 0.99), (30.0, 0.9), (8.0, 0.05)])
def test_drafts_that_do_not_pay_cost_next_to_nothing(step, right):
    lengths, _ = paced(step, 20.0, 1.0, right, rounds=400)
    assert sum(length > 0 for length in lengths) < 0.05 * len(lengths)


def test_one_slow_step_does_not_end_drafting():
    _, pace = paced(2.0, 20.0, 1.0, 0.98)
    pace.record_step(60.0)
    assert pace.pays and pace.goes_on(0, 1.0)


def test_a_disturbed_round_does_not_end_drafting_and_many_do():
    _, pace = paced(2.0, 20.0, 1.0, 0.98, rounds=2)
    pace.record_round([0.9] * 2, 2, 500.0)
    assert pace.pays and pace.goes_on(0, 1.0)
    for _ in range(40):
        if pace.pays:
            pace.record_step(250.0)
            pace.record_round([0.9] * 2, 2, 500.0)
    assert not pace.pays


def test_a_draft_that_is_not_worth_it_now_is_no_loss_where_drafts_paid():
    _, pace = paced(2.0, 20.0, 0.1, 0.98)
    # a token takes 20 without drafts and some 4 with them: one that costs 10 now is declined, for a single token
    for _ in range(20):
        pace.record_step(10.0)
    assert not pace.goes_on(0, 1.0)
    pace.record_pass(1, 20.0)
    assert pace.pays and pace.goes_on(0, 1.0)
