"""The dial: what an audit finds, where the loop goes, what is counted, what is refused."""

import dataclasses
import json
import math

import pytest
import tiny
import torch
from cases import layer_with, left_padded, near_and_middle, randn, real_tokens, true_shares
from hypothesis import given
from hypothesis import strategies as st
from tiny import BITING

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache, StaticSparseCache, enable
from sparse_attention_decoder.attention import LayerState, decode_step
from sparse_attention_decoder.cache.static import StaticTokens
from sparse_attention_decoder.dial import AUDIT_EVERY, FIRST_STEPS, Dial, LayerDial, Ratio
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.ledger import StepReads
from sparse_attention_decoder.models.bookmark import Bookmark
from sparse_attention_decoder.models.statistics import Statistics, record
from sparse_attention_decoder.selection import Rows, Selection
from sparse_attention_decoder.tables import POLICIES, QUALITIES

SINKS, WINDOW, SCALING = 2, 6, 0.25
DIALLED = dataclasses.replace(BITING, threshold=0.02, missing_mass=0.3)
WHOLE, PADDED, MIXED = left_padded(90, 90), left_padded(90, 61, 40), left_padded(90, 9, 63)


def dialled_layer(mask: torch.Tensor, dtype: torch.dtype = torch.float64, **settings: object) -> LayerState:
    """Two KV heads of three query heads, under a dial."""
    batch, tokens = mask.shape
    keys, values = randn(1, batch, 2, tokens, 16, dtype=dtype), randn(2, batch, 2, tokens, 20, dtype=dtype)
    given_ = {"missing_mass": 0.2, "threshold": 0.02, "backend": "reference", **settings}
    layer = layer_with(keys, values, Rows.from_mask(mask), **given_)
    layer.ledger.record()
    return layer


def steps_of(layer: LayerState) -> list[StepReads]:
    _ = layer.reads
    assert layer.ledger.log is not None
    return layer.ledger.log


def true_missing(layer: LayerState, query: torch.Tensor, rows: Rows, selection: Selection) -> torch.Tensor:
    """[B, Hkv] float64 by definition: the exact shares of what is neither near nor chosen."""
    shares = true_shares(query, layer.buffer.plain_keys, rows, SCALING)
    missing = torch.zeros(shares.shape[:2], dtype=torch.float64)
    for row, real in enumerate(real_tokens(rows)):
        _, middle = near_and_middle(real, SINKS, WINDOW)
        for head in range(shares.shape[1]):
            chosen = set(selection.tokens[row, head, : int(selection.counts[row, head])].tolist())
            missing[row, head] = shares[row, head, sorted(set(middle) - chosen)].sum()
    return missing


# --- the audit


@pytest.mark.parametrize("mask", [WHOLE, PADDED, MIXED], ids=["whole", "padded", "mixed"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_an_audited_step_knows_its_true_missing_mass(mask, dtype, limit):
    layer, rows = dialled_layer(mask, dtype), Rows.from_mask(mask)
    query = 2 * randn(0, mask.shape[0], 6, 16, dtype=dtype)
    decoded = decode_step(query, layer, rows, SCALING)
    sparse = [row for row, dense in enumerate(layer.dense_rows(rows)) if not dense]
    exact = true_missing(layer, query, rows, decoded.selection)[sparse]
    (step,) = steps_of(layer)
    assert 0.01 < step.audited == pytest.approx(float(exact.mean()), abs=limit)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_an_audit_reads_packed_keys_too_and_counts_their_bytes(kv_dtype):
    layer, rows = dialled_layer(WHOLE, torch.float32, kv_dtype=kv_dtype), Rows.full(2, 90)
    query = 2 * randn(0, 2, 6, 16)
    decoded = decode_step(query, layer, rows, SCALING)
    (step,) = steps_of(layer)
    assert step.audited == pytest.approx(float(true_missing(layer, query, rows, decoded.selection).mean()), abs=1e-5)
    assert step.reads.audit_bytes == 2 * 2 * 90 * (18 if kv_dtype == "int8" else 10)


def test_an_audit_changes_no_output():
    query, rows = 2 * randn(0, 2, 6, 16, dtype=torch.float64), Rows.full(2, 90)
    audited, plain = dialled_layer(WHOLE), dialled_layer(WHOLE, missing_mass=None)
    one, other = (decode_step(query, layer, rows, SCALING) for layer in (audited, plain))
    assert torch.equal(one.output, other.output)
    assert (audited.reads.audit_bytes, plain.reads.audit_bytes) == (2 * 2 * 90 * 16 * 8, 0)
    assert math.isnan(steps_of(plain)[0].audited)


@pytest.mark.parametrize("layers", [1, 2, 7, 24, 30, 32])
def test_all_layers_have_their_turn_to_be_audited_one_a_step(layers):
    dials = [LayerDial(dial, 3e-5) for dial in [Dial(0.03, 3e-5)] for _ in range(layers)]
    turns = []
    for _ in range(layers * AUDIT_EVERY):
        for dial in dials:
            dial.begin()
        turns.append([number for number, dial in enumerate(dials) if dial.is_audited])
    first = [turns[step - 1] for step in FIRST_STEPS]
    assert all(first)
    audited = [turn for number, turn in enumerate(turns) if turn and number + 1 not in FIRST_STEPS]
    assert all(len(turn) == 1 for turn in audited)
    assert sorted(turn[0] for turn in audited) == list(range(layers))


@given(st.floats(0.01, 0.2), st.floats(0.8, 1.6))
def test_the_factor_goes_to_what_audits_find(estimated, bias):
    found = Ratio(100)
    first = found.factor(1.2, 0.03)
    for _ in range(400):
        found.add(estimated, bias * estimated)
    assert first == pytest.approx(1.2)
    assert found.factor(1.2, 0.03) == pytest.approx(bias, rel=0.02)


# --- the loop


@given(st.floats(0.005, 0.05), st.floats(1e-6, 1e-3), st.floats(0.4, 0.9), st.integers(0, 2**31 - 1))
def test_the_loop_brings_the_mean_mass_to_its_target(target, start, slope, seed):
    """A stationary world: the mass is a power of the threshold, times noise of its own every step."""
    dial, noise = Dial(target, start), torch.Generator().manual_seed(seed)
    layers = [LayerDial(dial, start) for _ in range(4)]
    masses = []
    for _ in range(300):
        shock = math.exp(0.2 * float(torch.randn((), generator=noise)) - 0.02)
        for number, layer in enumerate(layers):
            mass = (1 + number) * 0.4 * layer.begin() ** slope * shock
            dial.see(mass)
            masses.append(mass)
    settled = masses[len(masses) // 3 :]
    assert sum(settled) / len(settled) == pytest.approx(target, rel=0.05)


def test_the_threshold_moves_between_steps_and_never_within():
    dial = Dial(0.03, 3e-5)
    layers = [LayerDial(dial, 3e-5) for _ in range(3)]
    seen = []
    for _ in range(4):
        for layer in layers:
            seen.append(layer.begin())
            dial.see(0.06)
    assert [len(set(seen[at : at + 3])) for at in (0, 3, 6, 9)] == [1] * 4
    assert seen[0] == 3e-5 and seen[0] > seen[3] > seen[6] > seen[9]


def thresholds_after(scales: tuple[float, float] | None, steps: int) -> list[float]:
    """Of both layers, so many steps behind a prompt."""
    config = dataclasses.replace(DIALLED, layer_scales=scales)
    model, ids = enable(tiny.build(), config), tiny.prompt(1, 60)
    cache = SparseCache(model.config, config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(steps):
            model(ids[:, :1], past_key_values=cache)
    return [layer.state.dial.threshold for layer in cache.sparse_layers]


def test_layers_keep_their_ratios_while_the_loop_moves_them():
    assert thresholds_after((0.5, 2.0), 0) == [0.01, 0.04]
    first, second = thresholds_after((0.5, 2.0), 5)
    assert first != 0.01 and second == pytest.approx(4 * first)
    assert thresholds_after((1.0, 1.0), 5) == thresholds_after(None, 5)


def test_a_layer_that_is_read_whole_is_none_of_the_loops():
    config = dataclasses.replace(DIALLED, layer_scales=(None, 1.0))
    model, ids = enable(tiny.build(), config), tiny.prompt(1, 60)
    cache = SparseCache(model.config, config)
    record(cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(9):
            model(ids[:, :1], past_key_values=cache)
    whole, moved = (layer.state.dial for layer in cache.sparse_layers)
    assert whole is None and moved.threshold != config.threshold
    assert not Statistics.of(cache).audit_bytes[:, 0].any() and Statistics.of(cache).audit_bytes[:, 1].any()


def test_no_layer_asks_for_more_than_all_of_the_attention():
    dial = Dial(0.9, 0.02)
    layer = LayerDial(dial, 0.02 * 100)
    assert layer.threshold == layer.begin() < 1


@pytest.mark.parametrize("mass", [0.0, 1.0])
def test_the_threshold_stays_within_limits_where_the_target_is_out_of_reach(mass):
    dial = Dial(0.03, 3e-5)
    layer = LayerDial(dial, 3e-5)
    for _ in range(500):
        layer.begin()
        dial.see(mass)
    assert 0 < dial.threshold < 0.1


def test_rows_that_are_read_whole_move_nothing():
    layer, rows = dialled_layer(left_padded(90, 9)), Rows.from_mask(left_padded(90, 9))
    alone = dialled_layer(left_padded(90))
    query = 2 * randn(0, 2, 6, 16, dtype=torch.float64)
    alone.buffer.reset()
    alone.buffer.append(layer.buffer.plain_keys[:1], layer.buffer.plain_values[:1])
    decode_step(query, layer, rows, SCALING)
    decode_step(query[:1], alone, Rows.full(1, 90), SCALING)
    both, one = steps_of(layer)[0], steps_of(alone)[0]
    assert both.estimated == pytest.approx(one.estimated, rel=1e-9)
    assert both.audited == pytest.approx(one.audited, rel=1e-9)


def test_a_crop_and_other_rows_leave_the_loop_where_it_is_and_a_reset_starts_it_anew():
    model, ids = enable(tiny.build(), DIALLED), tiny.prompt(2, 60)
    cache = SparseCache(model.config, DIALLED)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(5):
            model(ids[:, :1], past_key_values=cache)
    dials = [layer.state.dial for layer in cache.sparse_layers]
    moved = dials[0].threshold
    assert moved != DIALLED.threshold and {dial.threshold for dial in dials} == {moved}
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert dials[0].threshold == moved
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    assert cache.reconfigured(cache.config).sparse_layers[0].state.dial.threshold == cache.config.threshold
    cache.reset()
    assert dials[0].threshold == cache.config.threshold


def test_a_bookmark_brings_the_loop_back_to_where_it_stood():
    model, ids = enable(tiny.build(), DIALLED), tiny.prompt(1, 60)
    cache = SparseCache(model.config, DIALLED)

    def steps() -> list[float]:
        seen = []
        for _ in range(4):
            model(ids[:, :1], past_key_values=cache)
            seen.append(cache.sparse_layers[1].state.dial.threshold)
        return seen

    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        mark, first = Bookmark(cache), steps()
        mark.go_back()
        assert steps() == first
        mark.go_back()
        assert steps() == first
    dials = [layer.state.dial for layer in cache.sparse_layers]
    assert dials[0] is not dials[1] and dials[0].threshold == dials[1].threshold


# --- what is counted


@pytest.mark.parametrize("config", [DIALLED, BITING, dataclasses.replace(BITING, policy="window")])
def test_statistics_have_a_cell_a_step_and_layer_and_add_up_to_the_reads(config):
    decoder = SparseAttention(config, tiny.build())
    cache = SparseCache(decoder.model.config, config)
    ids, mask = tiny.left_pad([tiny.prompt(1, 60)[0], tiny.prompt(1, 41)[0]])
    output, stats = decoder.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, past_key_values=cache, return_stats=True
    )
    reads = cache.reads
    assert output.shape == (2, 69)
    arrays = {name: held for name, held in vars(stats).items() if isinstance(held, torch.Tensor)}
    assert {tuple(held.shape) for held in arrays.values()} == {(8, 2)}
    assert int(stats.tokens_read.sum()) == reads.tokens_read
    assert int(stats.tokens_cached.sum()) == reads.tokens_cached
    assert int(stats.audit_bytes.sum()) == reads.audit_bytes
    assert int(stats.bytes_read.sum()) == reads.bytes_read + reads.index_bytes + reads.audit_bytes
    assert stats.share_read == reads.share_read < 1
    assert (reads.audit_bytes > 0) is (config is DIALLED) is bool((~stats.audited.isnan()).any())
    assert bool(stats.estimated.isnan().all()) is (config.policy == "window")
    rows = json.loads(json.dumps(stats.rows()))
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in range(8) for layer in range(2)]
    assert sum(row["tokens_read"] for row in rows) == reads.tokens_read
    assert f"{stats.share_read:.1%}" in str(stats) and ("no estimate" in str(stats)) is (config.policy == "window")


def test_statistics_leave_the_output_as_it_is_and_count_many_steps():
    decoder, ids = SparseAttention(DIALLED, tiny.build()), tiny.prompt(1, 60)
    plain = decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=270, do_sample=False)
    output, stats = decoder.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=270, do_sample=False, return_stats=True
    )
    assert torch.equal(plain, output)
    # more than are remembered before they are added up
    assert stats.estimated.shape == (269, 2)


def test_dense_steps_miss_nothing_and_have_no_threshold():
    decoder, ids = SparseAttention(AttentionConfig(), tiny.build()), tiny.prompt(1, 30)
    _, stats = decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, return_stats=True)
    assert stats.share_read == 1 and not stats.estimated.any() and bool(stats.threshold.isnan().all())
    assert stats.rows()[0]["threshold"] is None


def test_no_step_is_no_statistics_and_no_error():
    cache = SparseCache(tiny.build().config, DIALLED)
    record(cache)
    assert Statistics.of(cache).rows() == [] and "0 decode steps" in str(Statistics.of(cache))


def test_statistics_of_a_static_cache_are_refused():
    decoder, ids = SparseAttention(BITING, tiny.build()), tiny.prompt(1, 30)
    static = StaticSparseCache(decoder.model.config, BITING, 64)
    with pytest.raises(UnsupportedError, match="needs a SparseCache; a StaticSparseCache"):
        decoder.generate(ids, max_new_tokens=2, past_key_values=static, return_stats=True)


# --- what is asked for


def test_a_static_cache_refuses_a_threshold_that_moves():
    with pytest.raises(ConfigError, match=r"missing_mass 0.3 moves the threshold.*use missing_mass=None"):
        StaticTokens(DIALLED, randn(0, 1, 2, 8, 16), randn(1, 1, 2, 8, 16), 64)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_without_an_estimate_ignore_the_target(policy):
    shared = Dial.of(AttentionConfig(policy=policy, missing_mass=0.03))
    assert (shared is not None) is (policy in ("sketch", "oracle"))


BAD = [(0, "above 0 and below 1"), (1, "above 0 and below 1"), (-0.1, "above 0"), (float("nan"), "above 0"),
       ("3%", "expected a number above 0"), (True, "expected a number above 0")]  # fmt: skip


@pytest.mark.parametrize(("value", "way_out"), BAD)
def test_a_target_that_cannot_work_is_refused(value, way_out):
    with pytest.raises(ConfigError, match=way_out):
        AttentionConfig(missing_mass=value)


@pytest.mark.parametrize("threshold", [None, 0])
def test_a_target_needs_a_threshold_to_move(threshold):
    with pytest.raises(ConfigError, match="give one to start from"):
        AttentionConfig(missing_mass=0.03, threshold=threshold)


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_preset_sets_what_its_row_says_and_comes_back_from_json(quality):
    config = AttentionConfig(quality=quality, top_k=17)
    assert {name: getattr(config, name) for name in QUALITIES[quality]} == QUALITIES[quality]
    assert AttentionConfig.from_json(config.to_json()) == config == dataclasses.replace(config)
    assert AttentionConfig.from_json(json.dumps({"quality": quality, "top_k": 17})) == config
    kept = dataclasses.replace(config, quality=None, attention_window=99)
    assert kept.threshold == config.threshold and kept.attention_window == 99


def test_presets_are_in_the_order_of_what_they_read():
    fast, balanced, firm = (AttentionConfig(quality=quality) for quality in ("fast", "balanced", "firm"))
    assert fast.threshold > balanced.threshold > firm.threshold
    assert fast.attention_window <= balanced.attention_window <= firm.attention_window


def test_a_value_beside_a_preset_that_sets_it_is_refused_and_not_dropped():
    with pytest.raises(ConfigError, match=r"quality 'fast' sets threshold to .*given as 0.001; leave one"):
        AttentionConfig(quality="fast", threshold=1e-3)
    with pytest.raises(ConfigError, match="sets"):
        dataclasses.replace(AttentionConfig(quality="fast"), quality="firm")
    with pytest.raises(ConfigError, match="the JSON says 3e-05"):
        AttentionConfig.from_json('{"quality": "fast", "threshold": 3e-5}')


@pytest.mark.parametrize("value", ["best", "", 3, ["fast"]])
def test_an_unknown_preset_is_refused(value):
    with pytest.raises(ConfigError, match="choose one of fast, balanced, firm, or None"):
        AttentionConfig(quality=value)
