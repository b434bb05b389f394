"""The sampled tail: one token for every threshold of attention below it, standing for that much."""

import math

import pytest
import torch
from cases import (
    REFERENCE,
    assert_error_within,
    coded,
    fit,
    left_padded,
    near_and_middle,
    randn,
    real_tokens,
    skewed_keys,
    true_shares,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_attention_decoder import dial
from sparse_attention_decoder.attention import LayerState, decode_step
from sparse_attention_decoder.cache.static import StaticTokens
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import BackendError, ConfigError
from sparse_attention_decoder.kernels import Request, resolve
from sparse_attention_decoder.kernels.choice import sample_tail
from sparse_attention_decoder.kernels.cpu import CpuKernels
from sparse_attention_decoder.selection import Rows, Selection
from sparse_attention_decoder.trace import trace_layer

SINKS, WINDOW, SCALING = 2, 6, 0.25
pytestmark = pytest.mark.usefixtures("poison")


def chosen_above(shares: Tensor, threshold: float, low: int) -> Selection:
    """Every token above the threshold, by definition."""
    above = shares > threshold
    counts = above.sum(-1)
    order = above.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())]
    return Selection(order + low, counts, None)


def by_definition(shares: list[float], cell: float) -> dict[int, float]:
    """The log weights of what is read of one head: all above the cell, and where the rest passes n + 1/2 cells."""
    read, total = {}, 0.0
    for token, share in enumerate(shares):
        if share > cell:
            read[token] = 0.0
            continue
        before, total = total, total + share
        if math.floor(total / cell + 0.5 - 1e-12) > math.floor(before / cell + 0.5 - 1e-12):
            read[token] = math.log(cell / share)
    return read


@given(st.integers(0, 10_000), st.sampled_from([1e-3, 5e-3, 0.02, 0.3]))
def test_a_sample_is_what_its_definition_says(seed, cell):
    shares = (2 * randn(seed, 2, 3, 157, dtype=torch.float64)).softmax(-1)
    sampled = sample_tail(shares, chosen_above(shares, cell, 7), 7, cell)
    for row in range(2):
        for head in range(3):
            count = int(sampled.counts[row, head])
            tokens = (sampled.tokens[row, head, :count] - 7).tolist()
            expected = by_definition(shares[row, head].tolist(), cell)
            assert tokens == sorted(tokens) == list(expected)
            weights = torch.tensor(list(expected.values()), dtype=torch.float64)
            assert_error_within(sampled.log_weights[row, head, :count], weights, 1e-9)
            unread = sum(share for token, share in enumerate(shares[row, head].tolist()) if token not in expected)
            assert float(sampled.missing_mass[row, head]) == pytest.approx(unread, abs=1e-12)


@given(st.integers(0, 10_000))
def test_what_is_read_stands_for_all_there_is_within_half_a_cell(seed):
    shares, cell = (2 * randn(seed, 1, 4, 301, dtype=torch.float64)).softmax(-1), 0.01
    sampled = sample_tail(shares, chosen_above(shares, cell, 0), 0, cell)
    stood_for = shares.gather(-1, sampled.tokens) * sampled.log_weights.exp() * sampled.chosen
    assert_error_within(stood_for.sum(-1), torch.ones(1, 4, dtype=torch.float64), cell / 2 + 1e-9)


def test_attention_is_unbiased_over_where_the_text_begins():
    """Mean output over many heads whose tokens are the same in another order."""
    tokens, order = 400, torch.Generator().manual_seed(0)
    logits, values = randn(0, tokens, dtype=torch.float64), randn(1, tokens, 8, dtype=torch.float64) + 1
    shuffles = torch.stack([torch.randperm(tokens, generator=order) for _ in range(600)])
    shares = logits.softmax(-1)[shuffles][None]
    cell = 0.02
    sampled = sample_tail(shares, chosen_above(shares, cell, 0), 0, cell)
    weights = shares.gather(-1, sampled.tokens) * sampled.log_weights.exp() * sampled.chosen
    picked = values[shuffles.gather(-1, sampled.tokens[0])]
    outputs = (weights[0].unsqueeze(-1) * picked).sum(1) / weights[0].sum(-1, keepdim=True)
    exact = logits.softmax(-1) @ values
    assert float((outputs.mean(0) - exact).norm() / exact.norm()) < 0.02
    assert int(sampled.counts.max()) < tokens / 4


def layer_of(backend: str, keys: Tensor, values: Tensor, **settings: object) -> LayerState:
    config = AttentionConfig(
        8, settings.pop("threshold", 5e-3), WINDOW, SINKS, backend=backend, dense_below=0, sample_tail=True, **settings
    )
    layer = LayerState(config)
    layer.append(keys, values)
    return layer


def attended(layer: LayerState, query: Tensor, rows: Rows, selection: Selection) -> Tensor:
    """[B, Hq, Dv] float64: softmax over what was read, each token with its weight."""
    keys, values = layer.buffer.plain_keys.double(), layer.buffer.plain_values.double()
    group = query.shape[1] // keys.shape[1]
    output = torch.zeros(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    for row, real in enumerate(real_tokens(rows)):
        near, _ = near_and_middle(real, SINKS, WINDOW)
        for head in range(query.shape[1]):
            count = int(selection.counts[row, head // group])
            own = selection.tokens[row, head // group, :count].tolist()
            weights = torch.cat(
                [torch.zeros(len(near)), selection.log_weights[row, head // group, :count].float().cpu()]
            ).double()
            logits = SCALING * keys[row, head // group, near + own] @ query[row, head].double() + weights
            output[row, head] = logits.softmax(0) @ values[row, head // group, near + own]
    return output


@pytest.mark.parametrize("mask", [left_padded(300, 300), left_padded(300, 211, 90)], ids=["whole", "padded"])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_output_is_attention_over_what_was_read_with_its_weights(backend, kv_dtype, mask, request):
    if backend == "cpu":
        request.getfixturevalue("compiled_library")
    batch = len(mask)
    keys, values, query = skewed_keys(1, batch, 2, 300, 16), randn(2, batch, 2, 300, 24), randn(3, batch, 6, 16)
    rows = Rows.from_mask(mask)
    layer = layer_of(backend, keys, values, kv_dtype=kv_dtype)
    decoded = decode_step(query, layer, rows, SCALING)
    selection = decoded.selection
    assert (selection.log_weights[selection.chosen] > 0).any() and int(selection.counts.max()) < 200
    assert_error_within(decoded.output, attended(layer, query, rows, selection), 2e-5)


@pytest.mark.parametrize("mask", [left_padded(300, 300), left_padded(300, 211, 90)], ids=["whole", "padded"])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_missed_is_what_the_sample_stands_for(backend, kv_dtype, mask, request):
    """By definition: of the attention, weights included, the part that no read token has by itself."""
    if backend == "cpu":
        request.getfixturevalue("compiled_library")
    batch, rows = len(mask), Rows.from_mask(mask)
    keys, values, query = skewed_keys(1, batch, 2, 300, 16), randn(2, batch, 2, 300, 24), randn(3, batch, 6, 16)
    layer = layer_of(backend, keys, values, kv_dtype=kv_dtype)
    layer.ledger.record()
    selection = decode_step(query, layer, rows, SCALING).selection
    held, expected = layer.buffer.plain_keys.double(), torch.zeros(batch, 6, dtype=torch.float64)
    for row, real in enumerate(real_tokens(rows)):
        near, _ = near_and_middle(real, SINKS, WINDOW)
        for head in range(6):
            count = int(selection.counts[row, head // 3])
            tokens = near + selection.tokens[row, head // 3, :count].tolist()
            logits = SCALING * held[row, head // 3, tokens] @ query[row, head].double()
            weighed = logits.clone()
            weighed[len(near) :] += selection.log_weights[row, head // 3, :count].double()
            expected[row, head] = 1 - (logits - weighed.logsumexp(0)).exp().sum()
    assert expected.max() > 0.05
    assert_error_within(selection.missing_mass, expected.unflatten(1, (2, 3)).mean(-1), 1e-5)


def test_over_many_steps_the_sample_sees_what_the_sketch_does_not():
    keys, values = skewed_keys(1, 16, 2, 600, 16), randn(2, 16, 2, 600, 16)
    layer, rows = layer_of("reference", keys, values), Rows.full(16, 600)
    true, sketched, sampled = 0.0, 0.0, 0.0
    for seed in range(12):
        query = 2 * randn(seed, 16, 6, 16)
        layer.ledger.log = None
        sketched += float(decode_step(query, layer, rows, SCALING).selection.missing_mass.mean())
        layer.ledger.log = []
        step = decode_step(query, layer, rows, SCALING).selection
        sampled += float(step.missing_mass.mean())
        left = true_shares(query, keys, rows, SCALING)
        left[..., :SINKS] = left[..., 600 - WINDOW :] = 0
        for row in range(16):
            for head in range(2):
                left[row, head, step.tokens[row, head, : int(step.counts[row, head])]] = 0
        true += float(left.sum(-1).mean())
    assert sampled / true == pytest.approx(1, abs=0.03)
    assert abs(sketched / true - 1) > 0.1


def test_what_a_sample_never_sees_is_added_after_an_audit(monkeypatch):
    """As in a layer whose sketch gives tokens that matter no chance to be read."""
    keys, values = skewed_keys(1, 1, 2, 300, 16), randn(2, 1, 2, 300, 16)
    layer, rows = layer_of("reference", keys, values, missing_mass=0.3), Rows.full(1, 300)
    layer.ledger.record()
    monkeypatch.setattr(dial, "true_missing", lambda step, selection: selection.missing_mass + 0.2)
    seen = [decode_step(randn(seed, 1, 6, 16), layer, rows, SCALING).selection.missing_mass for seed in range(40)]
    _ = layer.reads
    added = [step.estimated - float(mass.mean()) for step, mass in zip(layer.ledger.log, seen, strict=True)]
    assert added[0] == 0
    assert added[1] == pytest.approx(0.16, abs=1e-6)
    assert added[-1] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("tokens", [40, 300, 1000, 20_000])
def test_compiled_and_plain_read_the_same_sample(isa, tokens):
    keys, values, query = skewed_keys(1, 1, 2, tokens, 16), randn(2, 1, 2, tokens, 16), randn(3, 1, 6, 16)
    regions = Rows.full(1, tokens).regions(SINKS, WINDOW, keys.device)
    compiled, sketch = CpuKernels(), coded(keys, fit(keys))
    got, ours = (
        kernels.step(query, keys, values, sketch, regions, 4, 2e-3, SCALING, True) for kernels in (compiled, REFERENCE)
    )
    for head in range(2):
        one, other = (
            {
                int(token): float(weight)
                for token, weight in zip(found.tokens[0, head, :count], found.log_weights[0, head, :count], strict=True)
            }
            for found, count in ((found, int(found.counts[0, head])) for found in (got[2], ours[2]))
        )
        same = one.keys() & other.keys()
        # a sum that passes a boundary by its last bit may take a neighbour
        assert len(same) >= 0.97 * max(len(one), len(other))
        assert all(one[token] == pytest.approx(other[token], abs=1e-3) for token in same)
    assert_error_within(got[2].missing_mass, ours[2].missing_mass.double(), 2e-3)


def test_rows_of_a_batch_read_what_they_would_read_alone():
    mask = left_padded(200, 131)
    keys, values, query = skewed_keys(1, 2, 2, 200, 16), randn(2, 2, 2, 200, 16), randn(3, 2, 6, 16)
    together = decode_step(query, layer_of("auto", keys, values), Rows.from_mask(mask), SCALING)
    alone = decode_step(query[1:], layer_of("auto", keys[1:, :, 69:], values[1:, :, 69:]), Rows.full(1, 131), SCALING)
    assert_error_within(together.output[1:], alone.output.double(), 1e-5)


def test_a_trace_shows_the_weights_that_the_step_gave():
    """Its scores, times the values, are the step's output."""
    keys, values, query = skewed_keys(1, 1, 2, 200, 16), randn(2, 1, 2, 200, 16), randn(3, 1, 6, 16)
    layer, rows = layer_of("auto", keys, values), Rows.full(1, 200)
    decoded = decode_step(query, layer, rows, SCALING)
    found = trace_layer(0, layer, (query, rows, SCALING, decoded), ("x",) * 200)
    for head, entry in enumerate(found):
        output = entry.weights.double() @ values[0, head, entry.positions].double()
        assert_error_within(decoded.output[0].unflatten(0, (2, 3))[head], output, 1e-5)


def test_without_a_sample_nothing_has_a_weight():
    keys, values, query = skewed_keys(1, 1, 2, 200, 16), randn(2, 1, 2, 200, 16), randn(3, 1, 6, 16)
    layer = LayerState(AttentionConfig(8, 5e-3, WINDOW, SINKS, dense_below=0))
    layer.append(keys, values)
    assert decode_step(query, layer, Rows.full(1, 200), SCALING).selection.log_weights is None


def test_who_cannot_sample_says_so():
    with pytest.raises(BackendError, match="sample of what lies below the threshold"):
        resolve("triton", Request(torch.device("cpu"), torch.float32, 64, sampled=True))
    with pytest.raises(ConfigError, match="sample_tail is not for a static cache"):
        StaticTokens(AttentionConfig(sample_tail=True), randn(0, 1, 2, 8, 16), randn(1, 1, 2, 8, 16), 64)
    with pytest.raises(ConfigError, match="give one to sample below"):
        AttentionConfig(sample_tail=True, threshold=None)
    with pytest.raises(ConfigError, match="expected True or False"):
        AttentionConfig(sample_tail=1)
