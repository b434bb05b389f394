"""Generation on a tiny llama: whatever transformers does with its cache works with ours, and comes out the same."""

import copy
import gc
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import count
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from cases import token_codes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import BITING, FORCED, FULL, greedy, prompt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from sparse_attention_decoder import AttentionConfig, SparseCache, disable, enable
from sparse_attention_decoder.attention import decode_step
from sparse_attention_decoder.cache import Sketch
from sparse_attention_decoder.errors import NonFiniteError, ShapeError, UnsupportedError
from sparse_attention_decoder.models import adapter
from sparse_attention_decoder.models.cache import SparseLayer
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import POLICIES

# by this share of the largest one may a number differ: the same sums in another order
# llama's norms and rotary angles are float32 in any dtype, so float64 models are not exact to float64
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-6}


@pytest.fixture(autouse=True)
def _warnings_are_said_anew():
    adapter._warn_once.cache_clear()


@pytest.fixture
def warned(caplog) -> Callable[[], list[str]]:
    """The package's warnings so far."""
    caplog.set_level(logging.WARNING, logger="sparse_attention_decoder")
    return lambda: [record.message for record in caplog.records if record.name.startswith("sparse_attention_decoder")]


@pytest.fixture
def _no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@cache
def dense_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers runs it. Shared, so leave it as it is."""
    return tiny.build(dtype=dtype)


def sparse_model(config: AttentionConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return enable(tiny.build(dtype=dtype), config)


def logits_of(result: Any) -> Tensor:
    """[n, B, V], of the tokens that `generate` made."""
    return torch.stack(result.logits)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert float(error) < ROUNDING[expected.dtype]


def assert_equals_run(result: Any, expected: Any) -> None:
    """The same tokens, from the same logits but for rounding."""
    assert torch.equal(result.sequences, expected.sequences)
    assert_close(logits_of(result), logits_of(expected))


def assert_in_step(layer: SparseLayer, rows: Rows) -> None:
    """The sketch equals, bit for bit, one made at once of the keys held now."""
    kept, fresh = layer.state.index, Sketch(layer.state.kernels, layer.state.config.sink_tokens)
    fresh.catch_up(layer.state.buffer.keys, rows, rows.length)
    assert kept.length >= rows.regions(2, 4, torch.device("cpu")).high
    assert torch.equal(kept.coded.statistics.mean, fresh.coded.statistics.mean)
    assert torch.equal(kept.coded.statistics.deviation, fresh.coded.statistics.deviation)
    assert torch.equal(token_codes(kept.coded, kept.length), token_codes(fresh.coded, kept.length))
    assert torch.equal(kept.coded.factors[:, :, : kept.length], fresh.coded.factors[:, :, : kept.length])


@pytest.mark.parametrize("config", [FULL, FORCED], ids=["full", "forced"])
@pytest.mark.parametrize("tokens", [1, 2, 12, 41])
def test_prefill_and_decode_equal_one_full_forward(config, tokens):
    ids = prompt(1, tokens + 20)[0]
    with torch.no_grad():
        whole = dense_model()(ids[None]).logits[0]
    logits, held = tiny.replay(sparse_model(config), config, [(ids[:tokens], ids[tokens:])])
    assert_close(logits, whole)
    assert (held.reads.sparse_steps > 0) == (config is FORCED)


@settings(max_examples=12)
@given(st.integers(20, 60), st.integers(2, 60), st.sampled_from([FULL, FORCED, BITING]))
def test_prefill_in_chunks_equals_prefill_in_one_go(tokens, chunk, config):
    # a last chunk of one token cannot be told from a decode step, and is read as sparsely as one
    chunk += config is BITING and tokens % chunk == 1
    model, ids = sparse_model(config, torch.float64), prompt(1, tokens)
    assert_equals_run(greedy(model, ids, 4, prefill_chunk_size=chunk), greedy(model, ids, 4))


def test_generate_equals_decoding_by_hand():
    model, ids = sparse_model(BITING), prompt(1, 40)
    result = greedy(model, ids)
    logits, held = tiny.replay(model, BITING, [(ids[0], result.sequences[0, 40:-1])])
    assert_close(logits[39:], logits_of(result)[:, 0])
    assert held.reads == result.past_key_values.reads


@settings(max_examples=8)
@given(st.lists(st.integers(5, 60), min_size=1, max_size=4), st.sampled_from([BITING, FORCED]))
def test_rows_of_any_lengths_decode_as_they_would_alone(lengths, config):
    # a row of up to 11 tokens is within the budget: dense and sparse rows share a batch here
    model = sparse_model(config, torch.float64)
    rows = [prompt(1, length, seed=seed)[0] for seed, length in enumerate(lengths)]
    ids, mask = tiny.left_pad(rows)
    together = greedy(model, ids, 6, attention_mask=mask)
    for row, own in enumerate(rows):
        alone = greedy(model, own[None], 6)
        assert torch.equal(together.sequences[row, -6:], alone.sequences[0, -6:])
        assert_close(logits_of(together)[:, row], logits_of(alone)[:, 0])


def test_rows_do_not_influence_each_other():
    model, first, second = sparse_model(BITING), prompt(2, 40, seed=1), prompt(2, 40, seed=2)
    second[1] = first[1]
    one, other = greedy(model, first), greedy(model, second)
    assert one.past_key_values.reads.sparse_steps > 0
    assert not torch.equal(one.sequences[0, -8:], other.sequences[0, -8:])
    assert torch.equal(one.sequences[1], other.sequences[1])
    assert torch.equal(logits_of(one)[:, 1], logits_of(other)[:, 1])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_generates(policy):
    result = greedy(sparse_model(replace(BITING, policy=policy)), prompt(2, 40))
    reads = result.past_key_values.reads
    assert result.sequences.shape == (2, 48)
    assert logits_of(result).isfinite().all()
    # two layers; the first of the eight tokens comes from prefill
    assert reads.steps == 2 * 7
    assert reads.sparse_steps == (0 if policy == "dense" else reads.steps)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_at_full_budget_equals_dense_bit_for_bit(policy):
    dense = greedy(dense_model(), prompt(2, 40))
    result = greedy(sparse_model(replace(FULL, policy=policy)), prompt(2, 40))
    assert torch.equal(result.sequences, dense.sequences)
    assert torch.equal(logits_of(result), logits_of(dense))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "dense"])
def test_every_policy_decodes_a_padded_row_as_it_would_alone(policy):
    model = sparse_model(replace(BITING, policy=policy), torch.float64)
    rows = [prompt(1, 60, seed=1)[0], prompt(1, 37, seed=2)[0]]
    ids, mask = tiny.left_pad(rows)
    together = greedy(model, ids, attention_mask=mask)
    for row, own in enumerate(rows):
        assert_close(logits_of(together)[:, row], logits_of(greedy(model, own[None]))[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_full_budget_equals_dense_bit_for_bit_in_every_dtype(dtype):
    dense, result = (greedy(model, prompt(2, 40)) for model in (dense_model(dtype), sparse_model(FULL, dtype)))
    assert torch.equal(result.sequences, dense.sequences)
    assert torch.equal(logits_of(result), logits_of(dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_decodes_sparsely(dtype):
    result = greedy(sparse_model(BITING, dtype), prompt(2, 40))
    reads = result.past_key_values.reads
    assert reads.sparse_steps == 2 * 7
    # 2 sinks, 4 of the window, 5 retrieved; 2 layers, 2 rows, 2 KV heads, 7 steps
    assert reads.tokens_read == 11 * 2 * 2 * 2 * 7
    assert logits_of(result).isfinite().all()
    assert result.past_key_values.layers[0].keys.dtype == dtype


def test_double_precision_through_the_sparse_path_equals_dense():
    result = greedy(sparse_model(FORCED, torch.float64), prompt(2, 40))
    assert result.past_key_values.reads.sparse_steps == 2 * 7
    expected = greedy(dense_model(torch.float64), prompt(2, 40))
    assert torch.equal(result.sequences, expected.sequences)
    # float32 attention would be off by about 1e-7
    assert float((logits_of(result) - logits_of(expected)).abs().max()) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3},
        {"use_cache": False},
    ],
    ids=lambda options: " ".join(options),
)
def test_every_way_to_generate_at_full_budget_equals_dense(options):
    def run(model: PreTrainedModel) -> Tensor:
        torch.manual_seed(3)
        return greedy(model, prompt(2, 40), **options).sequences

    assert torch.equal(run(sparse_model(FULL)), run(dense_model()))


def few_words() -> Tensor:
    """Ids [1, 80] of eight words: the look-up always finds something to propose, and most of it is rejected."""
    return prompt(1, 80) % 8 + 20


@pytest.mark.parametrize("config", [FULL, FORCED], ids=["full", "forced"])
def test_assisted_decoding_equals_dense(config):
    result = greedy(sparse_model(config), few_words(), 30, prompt_lookup_num_tokens=3)
    assert torch.equal(result.sequences, greedy(dense_model(), few_words(), 30).sequences)


def test_assisted_decoding_at_a_small_budget_keeps_the_sketch_in_step():
    model, ids = sparse_model(BITING), few_words()
    held = greedy(model, ids, 40, prompt_lookup_num_tokens=3).past_key_values
    # single tokens are decoded sparsely, drafts are read densely
    assert 0 < held.reads.sparse_steps < 2 * 40
    with torch.no_grad():
        model(ids[:, :1], past_key_values=held)
    for layer in held.sparse_layers:
        assert_in_step(layer, Rows.full(1, held.get_seq_length()))


def test_beams_decode_as_each_would_alone():
    model, ids = sparse_model(BITING, torch.float64), prompt(1, 40)
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(5):
        longer = []
        for tokens, score in beams:
            logits, _ = tiny.replay(model, BITING, [(ids[0], torch.tensor(tokens, dtype=torch.int64))])
            shares = logits[-1].log_softmax(-1)
            longer += [([*tokens, token], score + float(shares[token])) for token in range(tiny.VOCABULARY)]
        beams = sorted(longer, key=lambda beam: -beam[1])[:3]
    result = greedy(model, ids, 5, num_beams=3, num_return_sequences=3)
    assert result.past_key_values.reads.sparse_steps == 2 * 4
    assert result.sequences[:, 40:].tolist() == [tokens for tokens, _ in beams]


def test_beam_search_keeps_the_sketch_in_step():
    ids, mask = tiny.left_pad([prompt(1, 40)[0], prompt(1, 29)[0]])
    held = greedy(sparse_model(BITING), ids, 20, num_beams=3, attention_mask=mask).past_key_values
    assert held.reads.sparse_steps > 0
    for layer in held.sparse_layers:
        assert_in_step(layer, layer.last[1])


@pytest.mark.parametrize("config", [BITING, FORCED, FULL], ids=["biting", "forced", "full"])
def test_a_second_turn_on_the_same_cache_equals_the_conversation_from_scratch(config):
    model, ids, more = sparse_model(config, torch.float64), prompt(1, 40), prompt(1, 9, seed=5)
    first = greedy(model, ids, 6)
    longer = torch.cat([first.sequences, more], 1)
    second = greedy(model, longer, 6, past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values
    said, answer = first.sequences[0, 40:], second.sequences[0, 55:]
    # the last token of a turn is not fed before the next turn
    turns = [(ids[0], said[:-1]), (torch.cat([said[-1:], more[0]]), answer[:-1])]
    logits, held = tiny.replay(model, config, turns)
    assert_close(logits[-6:], logits_of(second)[:, 0])
    assert torch.equal(logits[-6:].argmax(-1), answer)
    assert held.reads == second.past_key_values.reads
    if config is not BITING:
        assert_equals_run(second, greedy(dense_model(torch.float64), longer, 6))


def test_a_second_turn_padded_in_the_middle_equals_each_row_alone():
    model = sparse_model(BITING, torch.float64)
    openings = [prompt(1, 40, seed=1)[0], prompt(1, 31, seed=2)[0]]
    replies = [prompt(1, 5, seed=3)[0], prompt(1, 12, seed=4)[0]]
    ids, mask = tiny.left_pad(openings)
    first = greedy(model, ids, 6, attention_mask=mask)
    more, more_mask = tiny.left_pad(replies)
    longer = torch.cat([first.sequences, more], 1)
    whole_mask = torch.cat([mask, mask.new_ones(2, 6), more_mask], 1)
    second = greedy(model, longer, 6, attention_mask=whole_mask, past_key_values=first.past_key_values)
    for row in range(2):
        said, answer = first.sequences[row, -6:], second.sequences[row, -6:]
        turns = [(openings[row], said[:-1]), (torch.cat([said[-1:], replies[row]]), answer[:-1])]
        logits, _ = tiny.replay(model, BITING, turns)
        assert_close(logits_of(second)[:, row], logits[-6:])
        assert torch.equal(answer, logits[-6:].argmax(-1))


@pytest.mark.parametrize("policy", ["sketch", "quest"])
def test_a_row_that_ended_early_and_is_masked_in_the_next_turn_equals_the_row_alone(policy):
    # while the first turn runs, what a finished row is filled up with counts as text; only the
    # second turn's mask says that it is none
    config = replace(BITING, policy=policy)
    model = sparse_model(config, torch.float64)
    openings = prompt(2, 40, seed=1)
    dry = greedy(model, openings, 14).sequences[:, 40:].tolist()
    stop = next(token for token in dry[0] if token not in dry[1])
    ended = dry[0].index(stop) + 1
    assert ended < 10
    first = greedy(model, openings, 14, min_new_tokens=0, eos_token_id=stop)
    more = prompt(2, 10, seed=4)
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[0, 40 + ended : 54] = 0
    longer = torch.cat([first.sequences, more], 1)
    second = greedy(model, longer, 6, attention_mask=mask, past_key_values=first.past_key_values)
    said = [first.sequences[0, 40 : 40 + ended], first.sequences[1, 40:]]
    # row 0's end-of-text was fed while row 1 went on, row 1's last token was not
    turns = [
        [(openings[0], said[0]), (more[0], second.sequences[0, -6:-1])],
        [(openings[1], said[1][:-1]), (torch.cat([said[1][-1:], more[1]]), second.sequences[1, -6:-1])],
    ]
    if policy == "sketch":
        for layer in second.past_key_values.sparse_layers:
            assert_in_step(layer, layer.last[1])
    for row in (1, 0):
        logits, _ = tiny.replay(model, config, turns[row])
        assert_close(logits_of(second)[:, row], logits[-6:])


@settings(max_examples=10)
@given(st.integers(30, 110), st.integers(1, 25), st.integers(2, 25), st.sampled_from(["sketch", "quest"]))
@example(tokens=50, undone=20, chunk=20, policy="sketch")  # the statistics reach into what is cropped
def test_crop_and_continue_equals_never_having_had_the_tokens(tokens, undone, chunk, policy):
    config = replace(BITING, policy=policy)
    model = sparse_model(config)
    ids, other, more = prompt(1, tokens)[0], prompt(1, undone, seed=1)[0], prompt(1, chunk + 3, seed=2)[0]
    logits, clean = tiny.replay(model, config, [(ids, more[:1]), (more[1:chunk], more[chunk:])])
    _, held = tiny.replay(model, config, [(ids, more[:1]), (other[: undone // 2], other[undone // 2 :])])
    held.crop(-undone)
    assert held.get_seq_length() == tokens + 1
    with torch.no_grad():
        found = [model(part[None], past_key_values=held).logits[0] for part in (more[1:chunk], *more[chunk:].split(1))]
    if policy == "sketch":
        for layer in held.sparse_layers:
            assert_in_step(layer, Rows.full(1, clean.get_seq_length()))
    assert torch.equal(torch.cat(found), logits[tokens + 1 :])


@settings(max_examples=10)
@given(st.integers(1, 25), st.integers(1, 25), st.sampled_from(["sketch", "quest"]))
@example(undone=20, chunk=3, policy="sketch")  # less is left than the statistics were fitted on
def test_crop_of_a_padded_batch_equals_never_having_had_the_tokens(undone, chunk, policy):
    model = sparse_model(replace(BITING, policy=policy))
    ids, mask = tiny.left_pad([prompt(1, 60, seed=1)[0], prompt(1, 41, seed=2)[0]])
    mask = torch.cat([mask, mask.new_ones(2, 64)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    held, clean = (SparseCache(model.config, replace(BITING, policy=policy)) for _ in range(2))

    def read(where: SparseCache, tokens: Tensor) -> Tensor:
        past = where.get_seq_length()
        end = past + tokens.shape[1]
        return model(
            tokens, attention_mask=mask[:, :end], position_ids=positions[:, past:end], past_key_values=where
        ).logits

    with torch.no_grad():
        for where in (held, clean):
            read(where, ids)
            read(where, ids[:, :1])
        for step in range(undone):
            read(held, ids[:, step : step + 1])
        held.crop(-undone)
        for tokens in (ids[:, :chunk], ids[:, :1], ids[:, 1:2]):
            assert torch.equal(read(held, tokens), read(clean, tokens))


def test_crop_takes_a_negative_number_or_zero():
    _, held = tiny.replay(sparse_model(BITING), BITING, [(prompt(1, 20)[0], prompt(1, 2)[0])])
    with pytest.raises(ShapeError, match=r"crop\(3\)"):
        held.crop(3)
    held.crop(0)
    assert held.get_seq_length() == 22
    held.crop(-22)
    assert held.get_seq_length() == 0


def test_crop_of_an_empty_cache_does_nothing():
    held = SparseCache(dense_model().config, BITING)
    held.crop(-3)
    assert held.get_seq_length() == 0


def test_crop_of_more_than_is_held_is_refused_and_changes_nothing():
    _, held = tiny.replay(sparse_model(BITING), BITING, [(prompt(1, 20)[0], prompt(1, 2)[0])])
    with pytest.raises(ShapeError, match="holds 22"):
        held.crop(-30)
    assert [layer.get_seq_length() for layer in held.layers] == [22, 22]


ROW_CHANGES: dict[str, tuple[Callable[[SparseCache], None], list[int]]] = {
    "repeat": (lambda held: held.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda held: held.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by mask": (lambda held: held.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "reorder": (lambda held: held.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("change", ROW_CHANGES)
@pytest.mark.parametrize("policy", ["sketch", "quest", "oracle", "window"])
def test_rows_moved_in_the_cache_go_on_as_where_they_came_from(change, policy):
    model = sparse_model(replace(BITING, policy=policy))
    ids, next_ids = prompt(3, 40), prompt(3, 6, seed=1)
    move, source = ROW_CHANGES[change]
    held = greedy(model, ids, 6).past_key_values
    moved = copy.deepcopy(held)
    move(moved)
    with torch.no_grad():
        for step in range(6):
            kept = model(next_ids[:, step : step + 1], past_key_values=held).logits
            found = model(next_ids[source, step : step + 1], past_key_values=moved).logits
            assert_close(found, kept[source])
    assert moved.layers[0].keys.shape[0] == len(source)


class Drive:
    """One layer under a random sequence of what transformers does to caches."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.layer = SparseLayer(BITING)
        self.rows = 2
        self.append(30)
        self.decode()

    def draw(self, heads: int, tokens: int) -> Tensor:
        # off centre and uneven, as real keys are, so that the statistics matter
        return torch.randn(self.rows, heads, tokens, 8, generator=self.random) * torch.arange(1, 9) + 3

    def append(self, tokens: int) -> None:
        self.layer.update(self.draw(2, tokens), self.draw(2, tokens))

    def crop(self, tokens: int) -> None:
        self.layer.crop(-min(tokens, self.layer.get_seq_length() - 1))

    def rewrite(self, tokens: int) -> None:
        # as a rejected draft does
        self.crop(tokens)
        self.append(tokens)

    def repeat(self, number: int) -> None:
        if self.rows < 4:
            self.layer.batch_repeat_interleave(number)
            self.rows *= number

    def select(self, number: int) -> None:
        self.layer.batch_select_indices(torch.tensor([number % self.rows, 0]))
        self.rows = 2

    def select_by_mask(self, number: int) -> None:
        mask = torch.arange(self.rows) <= number
        self.layer.batch_select_indices(mask)
        self.rows = int(mask.sum())

    def reorder(self, number: int) -> None:
        self.layer.reorder_cache((torch.arange(self.rows) + number) % self.rows)

    def decode(self, steps: int = 1) -> None:
        for _ in range(steps):
            keys, values = self.layer.update(self.draw(2, 1), self.draw(2, 1))
            adapter.sparse_attention_forward(nn.Identity(), self.draw(4, 1), keys, values)


OPERATIONS = st.one_of(
    st.tuples(st.sampled_from([Drive.append, Drive.crop, Drive.rewrite]), st.integers(1, 40)),
    st.tuples(st.just(Drive.decode), st.integers(1, 6)),
    st.tuples(st.sampled_from([Drive.repeat, Drive.select, Drive.select_by_mask, Drive.reorder]), st.integers(1, 3)),
)


@settings(max_examples=60)
@given(st.integers(0, 1000), st.lists(OPERATIONS, max_size=8))
def test_whatever_is_done_to_a_layer_its_sketch_is_that_of_its_keys(seed, operations):
    drive = Drive(seed)
    for operation, number in operations:
        operation(drive, number)
    # long enough that there is a middle, whatever was cropped
    drive.append(max(0, 12 - drive.layer.get_seq_length()))
    drive.decode()
    rows = Rows.full(drive.rows, drive.layer.get_seq_length())
    assert_in_step(drive.layer, rows)
    query, scratch = drive.draw(4, 1)[:, :, 0], drive.layer.reconfigured(BITING)
    found, expected = (decode_step(query, layer.state, rows, 0.1) for layer in (drive.layer, scratch))
    assert torch.equal(found.selection.tokens, expected.selection.tokens)
    assert torch.equal(found.output, expected.output)


def test_offloading_is_refused():
    _, held = tiny.replay(sparse_model(BITING), BITING, [(prompt(1, 20)[0], prompt(1, 2)[0])])
    for move in (held.layers[0].offload, held.layers[0].prefetch):
        with pytest.raises(UnsupportedError, match="offloading"):
            move()


def test_a_reset_cache_is_empty_and_serves_another_batch():
    model = sparse_model(BITING)
    held = greedy(model, prompt(2, 40)).past_key_values
    held.reset()
    assert held.get_seq_length() == 0
    assert held.reads.steps == 0
    again = greedy(model, prompt(3, 30, seed=1), past_key_values=held)
    fresh = greedy(model, prompt(3, 30, seed=1))
    assert torch.equal(logits_of(again), logits_of(fresh))
    assert held.reads == fresh.past_key_values.reads


@pytest.mark.parametrize("config", [BITING, replace(BITING, policy="quest")], ids=["sketch", "quest"])
def test_a_prompt_read_once_serves_many_continuations(config):
    model, ids = sparse_model(config), prompt(1, 40)
    _, held = tiny.replay(model, config, [(ids[0], prompt(1, 0)[0])])
    for seed in range(3):
        longer = torch.cat([ids, prompt(1, 5, seed=seed)], 1)
        copied = greedy(model, longer, past_key_values=copy.deepcopy(held))
        _, own = tiny.replay(model, config, [(ids[0], prompt(1, 0)[0])])
        assert torch.equal(logits_of(copied), logits_of(greedy(model, longer, past_key_values=own)))
        assert held.get_seq_length() == 40


def test_a_cache_copied_in_the_middle_of_decoding_goes_on_the_same():
    model = sparse_model(BITING)
    first = greedy(model, prompt(1, 40))
    longer = torch.cat([first.sequences, prompt(1, 3)], 1)
    copied = copy.deepcopy(first.past_key_values)
    expected = greedy(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(logits_of(greedy(model, longer, past_key_values=copied)), logits_of(expected))


def test_a_custom_float_mask_is_attended_densely_and_said_once(warned):
    model, ids = sparse_model(BITING), prompt(1, 46)
    held, stock = SparseCache(model.config, BITING), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=held)
        dense_model()(ids[:, :40], past_key_values=stock)
        for step in range(40, 46):
            mask = torch.zeros(1, 1, 1, step + 1)
            mask[..., 3:9] = -math.inf
            found = model(ids[:, step : step + 1], past_key_values=held, attention_mask=mask).logits
            expected = dense_model()(ids[:, step : step + 1], past_key_values=stock, attention_mask=mask).logits
            assert_close(found, expected)
    assert held.reads.sparse_steps == 0
    assert [message for message in warned() if "float32 mask" in message] == warned()
    assert len(warned()) == 1


def test_a_four_dimensional_padding_mask_is_read_sparsely():
    model, ids, mask = sparse_model(BITING), *tiny.left_pad([prompt(1, 40)[0], prompt(1, 29)[0]])
    by_hand, given_2d = (greedy(model, ids, 1, attention_mask=mask).past_key_values for _ in range(2))
    longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
    step = {"input_ids": ids[:, -1:], "position_ids": mask.sum(-1, keepdim=True)}
    with torch.no_grad():
        found = model(**step, past_key_values=by_hand, attention_mask=longer.bool()[:, None, None])
        expected = model(**step, past_key_values=given_2d, attention_mask=longer)
    assert by_hand.reads.sparse_steps == 2
    assert torch.equal(found.logits, expected.logits)


def test_attention_weights_are_refused_from_forward_and_generate():
    model, ids = sparse_model(BITING), prompt(1, 20)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        greedy(model, ids, output_attentions=True)


def test_generation_stops_at_end_of_text():
    model, ids = sparse_model(BITING), prompt(1, 40)
    tokens = greedy(model, ids, 12).sequences[0, 40:].tolist()
    stop = tokens[5]
    found = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=stop)[0, 40:].tolist()
    assert found == tokens[: tokens.index(stop) + 1]


def test_generation_stops_at_a_stop_string():
    characters = [chr(ord("a") + token) if token < 26 else chr(0x4E00 + token) for token in range(tiny.VOCABULARY)]
    words = Tokenizer(models.WordLevel({text: token for token, text in enumerate(characters)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    model, ids = sparse_model(BITING), prompt(1, 40)
    tokens = greedy(model, ids, 12).sequences[0, 40:].tolist()
    stop = tokens[5]
    found = model.generate(
        ids,
        max_new_tokens=12,
        do_sample=False,
        stop_strings=[characters[stop]],
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words),
    )
    assert found[0, 40:].tolist() == tokens[: tokens.index(stop) + 1]


def test_generation_stops_when_its_time_is_up(monkeypatch):
    # a clock that strikes once when generation starts and once a token
    clock = SimpleNamespace(time=count().__next__)
    monkeypatch.setattr("transformers.generation.stopping_criteria.time", clock)
    model, ids = sparse_model(BITING), prompt(1, 40)
    found = model.generate(ids, max_new_tokens=12, max_time=3, do_sample=False)
    assert torch.equal(found, greedy(model, ids, 4).sequences)


def test_a_streamer_gets_every_token_as_it_comes():
    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Heard()
    result = greedy(sparse_model(BITING), prompt(1, 40), streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == result.sequences[0].tolist()


def test_enable_again_replaces_the_config():
    model, ids = sparse_model(FULL), prompt(1, 40)
    first = greedy(model, ids).past_key_values
    assert enable(model, BITING) is model
    second = greedy(model, ids)
    assert (first.config, second.past_key_values.config) == (FULL, BITING)
    assert model(ids).past_key_values.config == BITING
    assert torch.equal(logits_of(second), logits_of(greedy(sparse_model(BITING), ids)))
    assert len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_disable_leaves_no_trace(times, implementation):
    model, ids = tiny.build(), prompt(1, 40)
    model.set_attn_implementation(implementation)
    before, dense = tiny.trace(model), greedy(model, ids)
    for config in (FULL, BITING)[:times]:
        enable(model, config)
        greedy(model, ids)
    assert disable(model) is model
    after = greedy(model, ids)
    assert tiny.trace(model) == before
    assert type(after.past_key_values) is type(model(ids).past_key_values) is DynamicCache
    assert torch.equal(logits_of(after), logits_of(dense))


def test_disable_of_a_model_never_enabled_does_nothing():
    model = tiny.build()
    before = tiny.trace(model)
    assert disable(model) is model
    assert tiny.trace(model) == before


def test_a_users_own_cache_preparation_survives_enable_and_disable():
    model = tiny.build()
    own = partial(type(model)._prepare_cache_for_generation, model)
    model._prepare_cache_for_generation = own
    before = tiny.trace(model)
    enable(model, BITING)
    greedy(model, prompt(1, 20))
    disable(model)
    assert tiny.trace(model) == before


def test_a_copy_of_an_enabled_model_is_enabled_and_disabled_on_its_own():
    model, ids = sparse_model(BITING), prompt(1, 40)
    expected = greedy(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(greedy(other, ids)), logits_of(expected))
    assert type(greedy(disable(other), ids).past_key_values) is DynamicCache
    assert isinstance(greedy(model, ids).past_key_values, SparseCache)


def test_a_saved_model_comes_back_plain(tmp_path):
    model, ids = sparse_model(BITING), prompt(1, 40)
    model.save_pretrained(tmp_path)
    assert adapter.NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    result = greedy(plain, ids)
    assert type(result.past_key_values) is DynamicCache
    assert_equals_run(result, greedy(dense_model(), ids))
    assert isinstance(greedy(model, ids).past_key_values, SparseCache)


def test_a_bare_forward_returns_a_sparse_cache_unless_told_to_use_none():
    model, ids = sparse_model(BITING), prompt(1, 40)
    assert isinstance(model(ids, use_cache=True).past_key_values, SparseCache)
    assert isinstance(model(ids).past_key_values, SparseCache)
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_a_cache_given_by_position_is_used():
    model, ids = sparse_model(BITING), prompt(1, 40)
    held = SparseCache(model.config, FULL)
    assert model(ids, None, None, held).past_key_values is held
    assert held.get_seq_length() == 40


def test_none_given_by_position_is_as_good_as_no_cache_given():
    model, ids = sparse_model(BITING), prompt(1, 40)
    found = model(ids, None, None, None)
    assert isinstance(found.past_key_values, SparseCache)
    assert torch.equal(found.logits, model(ids).logits)


def test_a_cache_may_bring_another_config_than_the_model():
    model, ids = sparse_model(BITING), prompt(1, 40)
    result = greedy(model, ids, past_key_values=SparseCache(model.config, FORCED))
    assert_equals_run(result, greedy(dense_model(), ids))


def test_a_stock_cache_already_filled_is_decoded_densely_and_said_once(warned):
    model, ids = sparse_model(BITING), prompt(1, 40)
    dense = greedy(dense_model(), ids)
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        dense_model()(ids[:, :-1], past_key_values=stock)
    result = greedy(model, ids, past_key_values=stock)
    assert result.past_key_values is stock
    assert_equals_run(result, dense)
    # the hook says which cache it was, the attention function says that it decodes densely: once each
    assert len([message for message in warned() if "stock DynamicCache" in message]) == 1
    assert len(set(warned())) == len(warned())


def test_a_static_cache_is_decoded_densely_and_said_once(warned):
    result = greedy(sparse_model(BITING), prompt(1, 40), cache_implementation="static")
    assert_equals_run(result, greedy(dense_model(), prompt(1, 40)))
    assert len(warned()) == 1


def gradients(model: PreTrainedModel, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_training_builds_no_sparse_cache_and_has_the_gradients_of_the_dense_model():
    ids, model = prompt(2, 40), tiny.build().train()
    dense = gradients(model, lambda: model(ids, labels=ids).loss)
    enable(model, BITING)
    assert not isinstance(model(ids).past_key_values, SparseCache)
    assert_same_gradients(gradients(model, lambda: model(ids, labels=ids).loss), dense)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_evaluation_under_autograd_has_the_gradients_of_the_dense_model(tokens):
    ids, model = prompt(2, tokens), tiny.build()
    dense = gradients(model, lambda: model(ids).logits.square().sum())
    enable(model, BITING)
    assert_same_gradients(gradients(model, lambda: model(ids).logits.square().sum()), dense)


def test_gradients_of_values_alone_are_those_of_the_dense_model():
    # adapters often train q_proj and v_proj: the first layer's keys then carry no gradient, its values do
    ids, model = prompt(2, 40), tiny.build()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.v_proj.requires_grad_(True)
    dense = gradients(model, lambda: model(ids).logits.square().sum())
    enable(model, BITING)
    assert_same_gradients(gradients(model, lambda: model(ids).logits.square().sum()), dense)


@pytest.mark.parametrize("chunk", [1, 8])
def test_gradients_behind_a_cached_prefix_are_those_of_the_dense_model(chunk):
    ids, model = prompt(2, 40), tiny.build()

    def loss() -> Tensor:
        with torch.no_grad():
            held = model(ids[:, :-chunk], use_cache=True).past_key_values
        return model(ids[:, -chunk:], past_key_values=held).logits.square().sum()

    dense = gradients(model, loss)
    enable(model, FULL)
    assert_same_gradients(gradients(model, loss), dense)


def test_inference_mode_gives_the_same_as_no_grad():
    model, ids = sparse_model(BITING), prompt(1, 40)
    expected = greedy(model, ids)
    with torch.inference_mode():
        assert torch.equal(logits_of(greedy(model, ids)), logits_of(expected))


def run_side_by_side(monkeypatch: pytest.MonkeyPatch, runs: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own; all of them update a cache before any of them attends to its own."""
    alone, together = SparseLayer.update, Barrier(len(runs), timeout=60)

    def update(layer: SparseLayer, *args: Any, **kwargs: Any) -> Any:
        found = alone(layer, *args, **kwargs)
        together.wait()
        return found

    with monkeypatch.context() as patch, ThreadPoolExecutor(len(runs)) as executor:
        patch.setattr(SparseLayer, "update", update)
        return [done.result() for done in [executor.submit(run) for run in runs]]


def test_two_models_in_two_threads_give_what_they_give_one_after_the_other(monkeypatch):
    configs = [BITING, replace(BITING, policy="quest", top_k=9)]
    sparse, ids = [sparse_model(config) for config in configs], [prompt(2, 40), prompt(1, 55)]
    runs = [partial(greedy, model, own) for model, own in zip(sparse, ids, strict=True)]
    expected = [run() for run in runs]
    for result, alone in zip(run_side_by_side(monkeypatch, runs), expected, strict=True):
        assert torch.equal(logits_of(result), logits_of(alone))
        assert result.past_key_values.reads == alone.past_key_values.reads


def test_one_model_serves_two_threads_with_a_cache_each(monkeypatch):
    model = sparse_model(BITING)
    runs = [partial(greedy, model, own) for own in (prompt(1, 40), prompt(1, 55))]
    expected = [run() for run in runs]
    for result, alone in zip(run_side_by_side(monkeypatch, runs), expected, strict=True):
        assert torch.equal(logits_of(result), logits_of(alone))
        assert result.past_key_values.reads == alone.past_key_values.reads


@pytest.mark.usefixtures("_no_garbage_collector")
@pytest.mark.parametrize("padding", [0, 7], ids=["even rows", "padded rows"])
@pytest.mark.parametrize("policy", ["sketch", "quest"])
def test_the_memory_of_a_cache_is_freed_with_the_last_reference_to_it(policy, padding):
    model = sparse_model(replace(BITING, policy=policy))
    ids, mask = tiny.left_pad([prompt(1, 40)[0], prompt(1, 40 - padding)[0]])
    result = greedy(model, ids, attention_mask=mask)
    held = result.past_key_values
    layer = held.sparse_layers[0]
    watched = [held, layer, layer.state, layer.state.buffer, layer.state.index, layer.last[3]]
    # rows without padding hold no tensors, and all layers of all caches share them
    watched += [layer.last[1]] if padding else []
    references = [weakref.ref(thing) for thing in (*watched, *layer.state.buffer._stored.values())]
    del result, held, layer, watched
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.usefixtures("_no_garbage_collector")
def test_the_memory_of_a_forward_under_autograd_is_freed_with_its_output():
    output = sparse_model(BITING)(prompt(1, 40))
    held = output.past_key_values
    references = [weakref.ref(thing) for thing in (held, *held.layers, *held.layers[0].state.buffer._stored.values())]
    del output, held
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_weight_is_refused_by_name_and_leaves_no_trace(value):
    model = tiny.build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    before = tiny.trace(model)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        enable(model, BITING)
    assert tiny.trace(model) == before


def test_a_refused_config_change_leaves_the_old_config_in_force():
    model, ids = sparse_model(BITING), prompt(1, 40)
    before = tiny.trace(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(NonFiniteError):
        enable(model, FULL)
    assert tiny.trace(model) == before
    assert model(ids).past_key_values.config == BITING


def test_large_finite_weights_are_not_taken_for_damage():
    model = tiny.build(dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight[0] = 1e300
    enable(model, BITING)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_damaged_key_is_found_when_the_sketch_codes_it(value):
    model, ids = sparse_model(BITING), prompt(1, 40)
    _, held = tiny.replay(model, BITING, [(ids[0], prompt(1, 0)[0])])
    # beyond what the statistics are fitted on, so it is the coding that has to notice
    held.layers[1].keys[0, 1, 34, 2] = value
    with torch.no_grad(), pytest.raises(NonFiniteError, match="cached keys"):
        model(ids[:, :1], past_key_values=held)


def test_keys_that_turn_bad_while_decoding_are_found_when_they_leave_the_window():
    model, ids = sparse_model(BITING), prompt(1, 40)
    held = greedy(model, ids, 3).past_key_values
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="cached keys"):
        greedy(model, prompt(1, 60), BITING.attention_window + 2, past_key_values=held)


def test_damage_in_padding_is_nobodys_concern():
    model = sparse_model(BITING)
    ids, mask = tiny.left_pad([prompt(1, 40)[0], prompt(1, 29)[0]])
    expected = greedy(model, ids, attention_mask=mask)
    held = SparseCache(model.config, BITING)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, :20]
        model(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions, past_key_values=held)
    # finite, but far out: statistics that counted padding would be of no use to anyone
    for layer in held.layers:
        layer.keys[1, :, :11] = 1e4
    result = greedy(model, ids, attention_mask=mask, past_key_values=held)
    assert_close(logits_of(result), logits_of(expected))
