"""The audit of a decode step: three numbers, against their definitions computed token by token in float64."""

import math

import pytest
import tiny
import torch
from cases import attention_over, chosen_sets, layer_with, left_padded, near_and_middle, randn, real_tokens, true_shares
from tiny import BITING, FORCED

from sparse_attention_decoder import AttentionConfig, SparseCache, enable
from sparse_attention_decoder.attention import Decoded, decode_step
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.audit import Audit, audit
from sparse_attention_decoder.models.cache import SparseLayer
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import POLICIES

SINKS, WINDOW, SCALING = 2, 6, 0.25
WHOLE, PADDED, MIXED = left_padded(60, 60), left_padded(60, 41, 30), left_padded(60, 9, 33)


def stepped(policy: str, mask: torch.Tensor, dtype: torch.dtype = torch.float32, **settings: object) -> SparseLayer:
    """A layer of 2 KV heads of 3 query heads that has just made one decode step."""
    batch, tokens = mask.shape
    query = 2 * randn(0, batch, 6, 16, dtype=dtype)
    keys, values = randn(1, batch, 2, tokens, 16, dtype=dtype), randn(2, batch, 2, tokens, 20, dtype=dtype)
    # what padding holds must not matter
    values.transpose(1, 2)[~mask] = 1e4
    layer, rows = SparseLayer(AttentionConfig()), Rows.from_mask(mask)
    layer.state = layer_with(keys, values, rows, policy=policy, **settings)
    layer.last = (query, rows, SCALING, decode_step(query, layer.state, rows, SCALING))
    return layer


def by_definition(layer: SparseLayer) -> Audit:
    query, rows, _, decoded = layer.last
    keys, values = layer.state.buffer.keys, layer.state.buffer.values
    real = real_tokens(rows)
    exact, _ = attention_over(query, keys, values, [[set(own)] * 2 for own in real], SCALING)
    errors = (decoded.output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    shares = true_shares(query, keys, rows, SCALING)
    masses, recalls = [], []
    for row, own in enumerate(real):
        near, middle = near_and_middle(own, SINKS, WINDOW)
        for head in range(2):
            if decoded.selection is None or len(own) <= layer.state.config.budget_tokens:
                masses.append(1.0)
                continue
            chosen = chosen_sets(decoded.selection)[row][head]
            masses.append(float(shares[row, head, near + sorted(chosen)].sum()))
            best = sorted(middle, key=lambda token: -float(shares[row, head, token]))[: len(chosen)]
            if chosen:
                recalls.append(len(chosen & set(best)) / len(chosen))
    return Audit(float(errors.mean()), sum(masses) / len(masses), sum(recalls) / len(recalls) if recalls else None)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", [WHOLE, PADDED, MIXED], ids=["whole", "padded", "mixed"])
def test_an_audit_is_what_its_definition_says(policy, mask):
    layer = stepped(policy, mask)
    found, expected = audit(layer), by_definition(layer)
    assert found.error == pytest.approx(expected.error, rel=1e-4, abs=1e-6)
    assert found.mass == pytest.approx(expected.mass, rel=1e-5)
    assert found.recall == (None if expected.recall is None else pytest.approx(expected.recall))
    # a dense step misses nothing, a sparse one something
    assert (found.error < 1e-6) is (policy == "dense")
    assert (found.recall is None) is (policy in ("dense", "window", "streaming"))


@pytest.mark.parametrize("mask", [WHOLE, PADDED], ids=["whole", "padded"])
def test_a_step_within_the_budget_misses_nothing(mask):
    found = audit(stepped("sketch", mask, top_k=60))
    assert found.error < 1e-6
    assert (found.mass, found.recall) == (1.0, None)


def test_the_oracle_chooses_the_best_there_are():
    best, sketch, evicting = (audit(stepped(policy, PADDED)) for policy in ("oracle", "sketch", "snapkv"))
    assert best.recall == 1.0
    assert best.mass >= sketch.mass > evicting.mass
    assert best.recall > sketch.recall > evicting.recall


def test_the_dense_kernel_in_half_precision_is_off_by_its_rounding():
    found = audit(stepped("dense", WHOLE, torch.bfloat16))
    assert 1e-4 < found.error < 1e-2
    assert found.mass == 1.0


def test_the_layers_of_a_model_can_be_audited_after_a_step():
    model, ids = enable(tiny.build(), BITING), tiny.prompt(2, 60)
    with torch.no_grad():
        few = model(ids).past_key_values
        model(ids[:, :1], past_key_values=few)
        nearly_all = few.reconfigured(FORCED)
        model(ids[:, :1], past_key_values=nearly_all)
    for one, other in zip(few.sparse_layers, nearly_all.sparse_layers, strict=True):
        found = audit(other)
        assert found.error < 1e-5 and found.mass == pytest.approx(1) and found.recall == 1.0
        with pytest.raises(InputError, match=r"read 2 rows of 61 tokens; the cache now holds 2 of 62"):
            audit(one)


def test_a_layer_without_a_step_is_refused():
    model = enable(tiny.build(), BITING)
    cache = SparseCache(model.config, BITING)
    with pytest.raises(InputError, match="no decode step"):
        audit(cache.sparse_layers[0])


def test_a_step_whose_output_was_zero_is_all_error():
    layer = stepped("dense", WHOLE)
    query, rows, scaling, decoded = layer.last
    layer.last = (query, rows, scaling, Decoded(torch.zeros_like(decoded.output), None, None))
    assert audit(layer).error == pytest.approx(1)
    assert not math.isnan(audit(layer).mass)
