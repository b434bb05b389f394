"""A cap on what is held: what it keeps, what it costs, what it refuses; layer by layer and through the tiny model."""

import logging
from dataclasses import replace

import pytest
import tiny
import torch
from cases import assert_error_within, layer_with, left_padded, randn
from hypothesis import given
from hypothesis import strategies as st
from tiny import build, greedy, prompt
from torch import Tensor
from transformers import DynamicCache

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache, StaticSparseCache, disable, enable
from sparse_attention_decoder.attention import LayerState, decode_step
from sparse_attention_decoder.cache.cap import POOL
from sparse_attention_decoder.cache.witness import OBSERVED
from sparse_attention_decoder.config import CAPPED
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.kernels import Packed
from sparse_attention_decoder.models.reading import PREFILL_CHUNK, chunking
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import POLICIES

SCALING, SINKS, WINDOW, TOP_K, HEADS, DIM = 0.25, 2, 6, 5, 2, 8
# 21 tokens are left of 24
SMALL = {"sink_tokens": SINKS, "attention_window": WINDOW, "top_k": TOP_K, "threshold": None, "dense_below": 0}
CAP = 24
# of bytes so many that tokens packed beside those that are whole are more than tokens none of which are packed
LIMITS = {"tokens": {"max_cache_tokens": CAP}, "bytes": {"max_cache_bytes": 60_000}}
LADDER = ["float32", "int8", "int4"]

pytestmark = pytest.mark.usefixtures("poison")


class Run:
    """A layer under a cap, fed as a model would feed it. Channel 0 of a value is the token's number."""

    def __init__(self, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> None:
        self.layer = LayerState(AttentionConfig(**{**SMALL, **settings}))
        self.batch, self.dtype, self.seen, self.seed = batch, dtype, 0, seed
        self.queries: list[Tensor] = []
        # numbers of the tokens held [B, Hkv, T], by what the buffer is told to keep
        self.held = torch.zeros(batch, HEADS, 0, dtype=torch.int64)
        take = self.layer.buffer.take_tokens

        def take_tokens(keep: Tensor, capacity: int) -> None:
            self.held = self.held.gather(-1, keep)
            take(keep, capacity)

        self.layer.buffer.take_tokens = take_tokens

    def feed(self, count: int) -> Tensor | None:
        """So many tokens at once; the output of a decode step if it is one."""
        start, layer = self.seen, self.layer
        # a token is the same however it comes
        each = [randn(self.seed * 100_003 + start + at, self.batch, 8, DIM, dtype=self.dtype) for at in range(count)]
        tokens = torch.stack(each, 2)
        query, keys, values = 2 * tokens[:, :4], tokens[:, 4:6], tokens[:, 6:].clone()
        values[..., 0] = torch.arange(start, start + count)
        layer.append(keys, values)
        self.held = torch.cat([self.held, values[..., 0].long()], -1)
        self.seen += count
        self.queries.append(query)
        rows, output = Rows.full(self.batch, layer.buffer.length), None
        if count == 1:
            output = decode_step(query[:, :, 0], layer, rows, SCALING).output
        layer.fit(query, rows, SCALING)
        return output


def assert_sound(run: Run) -> None:
    """What always holds between steps."""
    layer, held, values = run.layer, run.held, run.layer.buffer.values
    assert held.shape == values.shape[:3]
    assert isinstance(values, Packed) or torch.equal(values[..., 0].long(), held)
    assert layer.buffer.seen == run.seen == layer.buffer.length + layer.buffer.evicted
    assert (held.diff() > 0).all()
    near = [*range(min(SINKS, run.seen)), *range(max(0, run.seen - WINDOW), run.seen)]
    assert all(set(near) <= set(head.tolist()) for row in held for head in row)
    assert layer.buffer.length >= min(run.seen, layer.config.budget_tokens)


@pytest.mark.parametrize("policy", CAPPED)
@pytest.mark.parametrize("limit", LIMITS)
def test_memory_is_constant_over_thousands_of_steps(policy: str, limit: str) -> None:
    run = Run(policy=policy, **LIMITS[limit])
    account = run.layer.cap.account
    # a token's key and value, and codes in whole blocks of 16 with the statistics
    most = 60_000 if limit == "bytes" else 2 * HEADS * (CAP * 2 * DIM * 4 + 32 * 6 + 2 * DIM * 4)
    for step in range(2500):
        run.feed(1)
        assert run.layer.buffer.capacity <= CAP or limit == "bytes"
        assert run.layer.nbytes == account.now <= most
        if step % 100 < 10:
            assert_sound(run)
    assert account.most <= most
    assert run.layer.buffer.evicted > (1900 if limit == "bytes" else 2350)
    assert run.layer.buffer.kept_as == ("int4" if limit == "bytes" else "float32")


@given(st.lists(st.integers(1, 150), min_size=1, max_size=12), st.integers(30_000, 60_000), st.integers(1, 3))
def test_precision_goes_before_tokens(chunks: list[int], limit: int, batch: int) -> None:
    run = Run(batch, max_cache_bytes=limit * batch)
    demoted, kept_as = 0, "float32"
    for size in [*chunks, *[1] * 100]:
        held = run.layer.buffer.length + size
        run.feed(size)
        buffer = run.layer.buffer
        assert_sound(run)
        assert run.layer.nbytes <= limit * batch
        assert buffer.kept_as == "int4" or not buffer.evicted
        if buffer.kept_as != kept_as:
            assert LADDER.index(buffer.kept_as) > LADDER.index(kept_as)
            demoted, kept_as = demoted + held, buffer.kept_as
        assert buffer.demoted == demoted


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(4000, 30_000))
def test_nothing_is_packed_where_that_would_hold_fewer_tokens(chunks: list[int], limit: int) -> None:
    run, most = Run(1, max_cache_bytes=limit), 0
    for size in [*chunks, *[1] * 150]:
        run.feed(size)
        assert_sound(run)
        assert run.layer.nbytes <= limit
        assert run.layer.cap.most >= most
        most = run.layer.cap.most


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@given(st.lists(st.integers(1, 120), min_size=1, max_size=8), st.integers(24, 250))
def test_a_packed_cache_evicts_as_a_plain_one(kv_dtype: str, chunks: list[int], cap: int) -> None:
    run = Run(policy="dense", kv_dtype=kv_dtype, max_cache_tokens=cap)
    for size in [*chunks, *[1] * 60]:
        run.feed(size)
        assert_sound(run)
        buffer = run.layer.buffer
        values = buffer.plain_values[:, :, buffer.length - buffer.whole :, 0]
        assert torch.equal(values.long(), run.held[..., buffer.length - buffer.whole :])
        assert buffer.length < cap


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from(CAPPED), st.integers(0, 9))
def test_chunks_of_any_size_leave_sinks_window_and_what_adds_up(chunks: list[int], policy: str, seed: int) -> None:
    run = Run(policy=policy, seed=seed, max_cache_tokens=CAP)
    for size in chunks:
        run.feed(size)
        assert_sound(run)
        assert run.layer.buffer.length < CAP
        # a chunk is held beside the cap while it is read, and not after
        assert run.layer.buffer.capacity <= CAP


def test_each_head_keeps_what_the_newest_queries_attend_to_most() -> None:
    run = Run(dtype=torch.float64, max_cache_tokens=CAP)
    for _ in range(CAP - 1):
        run.feed(1)
    keys = run.layer.buffer.keys.clone()
    run.feed(1)
    keys = torch.cat([keys, run.layer.buffer.keys[:, :, -1:]], 2)
    newest = range(CAP - min(OBSERVED, WINDOW), CAP)
    for row in range(2):
        for head in range(HEADS):
            paid = torch.zeros(CAP, dtype=torch.float64)
            for at in newest:
                for query in run.queries[at][row, 2 * head : 2 * head + 2, 0]:
                    paid[: at + 1] += (SCALING * keys[row, head, : at + 1] @ query).softmax(-1)
            paid = torch.stack([paid[max(0, at - POOL // 2) : at + POOL // 2 + 1].max() for at in range(CAP)])
            middle = sorted(range(SINKS, CAP - WINDOW), key=lambda token, paid=paid: -float(paid[token]))
            best = middle[: CAP - CAP // 8 - SINKS - WINDOW]
            assert run.held[row, head].tolist() == sorted([*range(SINKS), *best, *range(CAP - WINDOW, CAP)])


@pytest.mark.parametrize("policy", CAPPED)
def test_a_full_cache_is_read_as_one_that_never_held_more(policy: str) -> None:
    run = Run(dtype=torch.float64, policy=policy, max_cache_tokens=CAP)
    for _ in range(100):
        run.feed(1)
    fresh = layer_with(run.layer.buffer.keys.clone(), run.layer.buffer.values.clone(), **SMALL, policy=policy)
    length = fresh.buffer.length
    query = randn(5, 2, 4, DIM, dtype=torch.float64)
    # the newest token takes part in both
    ours, other = (decode_step(query, layer, Rows.full(2, length), SCALING) for layer in (run.layer, fresh))
    assert torch.equal(ours.output, other.output)
    if policy == "dense":
        keys, values = (x.repeat_interleave(2, 1) for x in (fresh.buffer.keys, fresh.buffer.values))
        weights = (SCALING * query.unsqueeze(2) @ keys.transpose(-1, -2)).softmax(-1)
        assert_error_within(ours.output, (weights @ values).squeeze(2), 1e-10)
    else:
        assert ours.selection is not None


def test_reading_at_once_or_one_by_one_up_to_the_cap_keeps_the_same() -> None:
    runs = [Run(dtype=torch.float64, policy="dense", max_cache_tokens=CAP) for _ in range(3)]
    for run, chunks in zip(runs, ([CAP], [1] * CAP, [CAP - 9, 8, 1]), strict=True):
        for size in chunks:
            run.feed(size)
        assert run.layer.buffer.evicted == CAP // 8
    assert torch.equal(runs[0].held, runs[1].held)
    assert torch.equal(runs[0].held, runs[2].held)


def test_rows_do_not_influence_each_other_and_may_change_places() -> None:
    run = Run(batch=3, dtype=torch.float64, max_cache_tokens=CAP)
    for _ in range(30):
        run.feed(1)
    run.layer.take_rows(torch.tensor([2, 0, 2]))
    run.held = run.held[[2, 0, 2]]
    for _ in range(30):
        run.feed(1)
    assert_sound(run)
    # rows that were copies and have gone different ways since
    assert not torch.equal(run.held[0], run.held[2])


def test_going_back_is_possible_as_far_as_nothing_was_evicted() -> None:
    run = Run(max_cache_tokens=CAP)
    for _ in range(CAP + 1):
        run.feed(1)
    left = CAP - CAP // 8
    run.layer.truncate(left)
    run.held = run.held[..., :left]
    assert run.layer.buffer.seen == CAP
    with pytest.raises(UnsupportedError, match="cannot go back by 1 tokens: 3 were evicted"):
        run.layer.truncate(left - 1)
    run.seen = CAP
    for _ in range(40):
        run.feed(1)
    assert_sound(run)


# --- through the model ---


@pytest.fixture(scope="module")
def model() -> tiny.PreTrainedModel:
    return build("llama", torch.float64)


def capped(model: tiny.PreTrainedModel, **settings: object) -> AttentionConfig:
    config = AttentionConfig(**{**SMALL, **settings})
    enable(model, config)
    return config


@pytest.mark.parametrize("policy", CAPPED)
def test_below_the_cap_nothing_changes(model: tiny.PreTrainedModel, policy: str) -> None:
    found = []
    for limit in ({}, {"max_cache_tokens": 74}, {"max_cache_bytes": 10**6}):
        capped(model, policy=policy, **limit)
        found.append(greedy(model, prompt(2, 60), 12))
        assert found[-1].past_key_values.held.tokens_evicted == 0
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0].logits, other.logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "smollm3"])
@pytest.mark.parametrize("count", [1, 5])
def test_positions_go_on_counting_and_masks_fit_what_is_held(family: str, count: int) -> None:
    model = build(family, torch.float64)
    cache = SparseCache(model.config, capped(model, policy="dense", max_cache_tokens=CAP))
    for chunk in prompt(2, 100).split(7, 1):
        model(chunk, past_key_values=cache)
    held = cache.held
    assert (held.tokens_seen, held.tokens_held + held.tokens_evicted) == (100, 100)
    assert cache.get_seq_length() == 100
    stock = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        stock.update(layer.keys.clone(), layer.values.clone(), number)
    ids = prompt(2, count, seed=1)
    ours = model(ids, past_key_values=cache, attention_mask=torch.ones(2, 100 + count)).logits
    disable(model)
    positions = torch.arange(100, 100 + count).expand(2, -1)
    torch.testing.assert_close(ours, model(ids, past_key_values=stock, position_ids=positions).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_goes_on_and_on(family: str) -> None:
    model = build(family)
    capped(model, max_cache_tokens=CAP)
    held = greedy(model, prompt(2, 100), 400).past_key_values.held
    assert held.tokens_seen == 499
    assert held.tokens_held < CAP
    assert held.bytes_now < held.bytes_most


@pytest.mark.parametrize("limit", LIMITS)
def test_beams_change_places_in_a_full_cache(model: tiny.PreTrainedModel, limit: str) -> None:
    capped(model, **{**LIMITS[limit], **({"max_cache_bytes": 500_000} if limit == "bytes" else {})})
    output = model.generate(prompt(1, 400), num_beams=3, max_new_tokens=60, return_dict_in_generate=True)
    assert output.past_key_values.held.tokens_evicted > 0


def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_attention_decoder.models.reading.PREFILL_CHUNK", 16)
    config = AttentionConfig(**SMALL, max_cache_tokens=CAP)
    decoder = SparseAttention(config, build("llama"))
    ids = prompt(1, 200)
    # two KV heads of 16 channels
    token = 2 * 2 * 16 * 4
    for cache, sketch in ((greedy(decoder, ids, 3).past_key_values, 1000), (decoder.prefill(ids), 0)):
        assert cache.held.tokens_seen >= 200
        # both layers at their cap, and one of them with a chunk beside it
        assert cache.held.bytes_most <= token * (2 * CAP + 17) + sketch


def test_bytes_are_those_of_all_layers_and_rows() -> None:
    capped(model := build("llama"), max_cache_bytes=150_000)
    lengths = []
    # one row in int4; of two those that are whole would leave less room than float32 has
    for rows in (1, 2):
        cache = greedy(model, prompt(rows, 600), 300).past_key_values
        states = [layer.state for layer in cache.sparse_layers]
        assert {state.buffer.kept_as for state in states} == {"int4" if rows == 1 else "float32"}
        assert cache.held.bytes_now == sum(state.nbytes for state in states) <= 150_000
        lengths.append(states[0].buffer.capacity)
        assert states[0].buffer.capacity == states[1].buffer.capacity
        # as many whole blocks as fit
        assert cache.held.bytes_now * (lengths[-1] + 16) > 150_000 * lengths[-1]
    assert lengths[0] >= 2 * lengths[1]


def test_reset_forgets_and_gives_back(model: tiny.PreTrainedModel) -> None:
    cache = SparseCache(model.config, capped(model, max_cache_tokens=CAP))
    for _ in range(2):
        greedy(model, prompt(1, 60), 10, past_key_values=cache)
        assert cache.held.tokens_evicted > 0
        cache.reset()
        held = vars(cache.held)
        assert held == {**dict.fromkeys(held, 0), "kept_as": held["kept_as"]}


def test_eviction_is_announced_once(model: tiny.PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    capped(model, max_cache_tokens=CAP)
    with caplog.at_level(logging.WARNING):
        greedy(model, prompt(1, CAP - 4), 3)
        assert caplog.text == ""
        greedy(model, prompt(1, 60), 60)
    (record,) = caplog.records
    assert "cannot be retrieved" in record.getMessage()


# --- what is refused ---


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in CAPPED])
def test_policies_with_rules_of_their_own_take_no_cap(policy: str, limit: str) -> None:
    with pytest.raises(ConfigError, match="choose one of sketch, dense, window"):
        AttentionConfig(policy=policy, **{"max_cache_tokens": 10_000} if limit == "tokens" else {"max_cache_bytes": 1})


@given(st.integers(0, 20), st.integers(1, 50), st.integers(1, 50), st.sampled_from(CAPPED))
def test_the_least_cap_of_tokens_holds_the_budget_and_one_less_would_not(
    sinks: int, window: int, top_k: int, policy: str
) -> None:
    config = AttentionConfig(sink_tokens=sinks, attention_window=window, top_k=top_k, policy=policy)
    least = config.least_cache_tokens
    assert least - max(1, least // 8) >= config.budget_tokens > (least - 1) - max(1, (least - 1) // 8)
    replace(config, max_cache_tokens=least)
    with pytest.raises(ConfigError, match=f"use {least} or more"):
        replace(config, max_cache_tokens=least - 1)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "200MB"])
def test_bytes_are_a_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="max_cache_bytes is"):
        AttentionConfig(max_cache_bytes=value)


def test_too_few_bytes_are_refused_with_a_number_that_would_do(model: tiny.PreTrainedModel) -> None:
    capped(model, max_cache_bytes=1000)
    with pytest.raises(ConfigError, match="max_cache_bytes is 1000") as found:
        model(prompt(1, 30))
    enough = int(str(found.value).split()[-2])
    capped(model, max_cache_bytes=enough)
    assert greedy(model, prompt(1, 30), 100).past_key_values.held.bytes_now <= enough
    capped(model, max_cache_bytes=enough - 1)
    with pytest.raises(ConfigError, match=f"take {enough} bytes"):
        model(prompt(1, 30))


def test_padded_rows_are_refused_where_something_has_to_go(model: tiny.PreTrainedModel) -> None:
    capped(model, max_cache_tokens=40)
    mask = left_padded(30, 20).long()
    greedy(model, prompt(2, 30), 8, attention_mask=mask)
    with pytest.raises(UnsupportedError, match=r"rows of 30 to 40 real tokens in a batch at its cap of 40"):
        greedy(model, prompt(2, 30), 20, attention_mask=mask)


def test_a_mask_of_floats_is_refused(model: tiny.PreTrainedModel) -> None:
    capped(model, max_cache_tokens=40)
    with pytest.raises(UnsupportedError, match="what a mask hides"):
        model(prompt(1, 8), attention_mask=torch.zeros(1, 1, 8, 8, dtype=torch.float64), use_cache=True)


@torch.no_grad()
def test_a_cap_that_nobody_keeps_is_refused(model: tiny.PreTrainedModel) -> None:
    cache = SparseCache(model.config, capped(model, max_cache_tokens=CAP))
    disable(model)
    model(prompt(1, CAP), past_key_values=cache)
    with pytest.raises(UnsupportedError, match=r"enable\(\) the model"):
        model(prompt(1, 1), past_key_values=cache)


def test_crop_stops_at_an_eviction(model: tiny.PreTrainedModel) -> None:
    cache = SparseCache(model.config, capped(model, max_cache_tokens=CAP))
    greedy(model, prompt(1, 60), 3, past_key_values=cache)
    assert not cache.is_croppable
    cache.crop(-2)
    assert cache.get_seq_length() == 60
    with pytest.raises(UnsupportedError, match="cannot go back by 1"):
        cache.crop(-1)


def test_more_rows_are_refused_under_a_cap_of_bytes(model: tiny.PreTrainedModel) -> None:
    capped(model, max_cache_bytes=200_000)
    cache = model(prompt(2, 30)).past_key_values
    cache.batch_select_indices(torch.tensor([1, 0]))
    with pytest.raises(UnsupportedError, match="2 rows cannot become 4 under max_cache_bytes"):
        cache.batch_repeat_interleave(2)


def test_what_needs_every_token_is_refused_once_some_are_gone(model: tiny.PreTrainedModel) -> None:
    from test_decoder import TEXT, tokenizer

    decoder = SparseAttention(AttentionConfig(**SMALL, max_cache_tokens=CAP), model, tokenizer())
    with pytest.raises(UnsupportedError, match="trace without max_cache_tokens"):
        decoder.trace(TEXT)
    with pytest.raises(UnsupportedError, match="tokens were evicted"):
        decoder.prefill(prompt(1, 60)).to_stock(model.config)


def test_a_static_cache_has_a_cap_already(model: tiny.PreTrainedModel) -> None:
    for limit in LIMITS.values():
        with pytest.raises(ConfigError, match="its capacity of 64 tokens is its cap"):
            StaticSparseCache(model.config, AttentionConfig(**SMALL, **limit), 64)


def test_a_chunk_is_never_one_token() -> None:
    config = AttentionConfig(max_cache_tokens=400)
    for tokens in range(PREFILL_CHUNK - 1, 5 * PREFILL_CHUNK):
        size = chunking(config, tokens).get("prefill_chunk_size")
        assert (size is None) == (tokens <= PREFILL_CHUNK)
        assert size is None or tokens % size != 1
