"""Lossless decoding: whatever is drafted, the tokens are those of dense decoding, of the same seed."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_decoder import TEXT, tokenizer
from tiny import BITING, VOCABULARY, build, prompt
from torch import Tensor
from transformers import StoppingCriteria

from sparse_attention_decoder import AttentionConfig, Lossless, SparseAttention, SparseCache
from sparse_attention_decoder.errors import ConfigError, InputError, UnsupportedError

DENSE = replace(BITING, policy="dense")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
WAYS: tuple[dict[str, Any], ...] = (
    GREEDY,
    {**GREEDY, "repetition_penalty": 1.3},
    {"do_sample": True, "temperature": 1.3, "max_new_tokens": 40},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "max_new_tokens": 40},
)
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "mixtral", "gpt2")


def generated(decoder: SparseAttention, ids: Tensor, seed: int = 0, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    output: Tensor = decoder.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output


@pytest.fixture
def sparse() -> SparseAttention:
    return SparseAttention(BITING, build("llama"), tokenizer())


@pytest.fixture
def dense() -> SparseAttention:
    return SparseAttention(DENSE, build("llama"), tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_dense_decoding_however_much_is_drafted(family, dtype):
    drafting, plain = (SparseAttention(config, build(family, dtype)) for config in (BITING, DENSE))
    ids = prompt(1, 50)
    for options in WAYS:
        expected = generated(plain, ids, **options)
        for drafts in (1, 4, 15, None):
            assert torch.equal(generated(drafting, ids, lossless=Lossless(drafts), **options), expected), (
                options,
                drafts,
            )


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_a_packed_cache_is_refused(kv_dtype):
    model = SparseAttention(replace(BITING, kv_dtype=kv_dtype), build("llama"))
    with pytest.raises(ConfigError, match=f"{kv_dtype}.*leave kv_dtype out"):
        generated(model, prompt(1, 50), lossless=Lossless(4), **GREEDY)


@torch.no_grad()
def test_the_cache_holds_what_dense_decoding_leaves_in_it(sparse, dense):
    ids = prompt(1, 50)
    caches = [SparseCache(model.model.config, model.config) for model in (sparse, dense)]
    generated(sparse, ids, past_key_values=caches[0], lossless=Lossless(5), **GREEDY)
    generated(dense, ids, past_key_values=caches[1], **GREEDY)
    for ours, theirs in zip(*(cache.sparse_layers for cache in caches), strict=True):
        assert torch.equal(ours.state.buffer.keys, theirs.state.buffer.keys)
        assert torch.equal(ours.state.buffer.values, theirs.state.buffer.values)


def test_without_a_seed_in_common_the_distribution_is_the_same():
    # a handful of tokens, all of them likely: 2,000 answers of two tokens, dense and lossless, chi-square of the pairs
    model = build("llama", vocab_size=8)
    drafting, plain = SparseAttention(BITING, model), SparseAttention(DENSE, build("llama", vocab_size=8))
    ids = prompt(1, 40) % 6 + 2
    counts = []
    for decoder, lossless, seed in ((drafting, Lossless(2), 1), (plain, False, 2)):
        torch.manual_seed(seed)
        pairs = torch.zeros(8, 8)
        for _ in range(1000):
            last = decoder.generate(ids, do_sample=True, temperature=20.0, max_new_tokens=3, lossless=lossless)[0, -2:]
            pairs[last[0], last[1]] += 1
        counts.append(pairs.flatten())
    both = counts[0] + counts[1]
    seen = both > 20
    statistic = float(((counts[0] - counts[1]).square() / both)[seen].sum())
    freedom = int(seen.sum()) - 1
    assert freedom > 8
    # mean and spread of chi-square: four standard deviations
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_counts_add_up(sparse):
    ids, lossless = prompt(1, 50), Lossless(3)
    output = generated(sparse, ids, lossless=lossless, **GREEDY)
    # the first token is the prompt's own
    assert lossless.tokens == output.shape[1] - 50 - 1 == 39
    assert lossless.passes <= lossless.tokens <= lossless.passes + lossless.accepted
    assert 0 < lossless.accepted < lossless.drafted <= 3 * lossless.passes
    assert lossless.tokens_per_pass == lossless.tokens / lossless.passes
    assert f"{lossless.accepted} of {lossless.drafted}" in str(lossless)


def test_a_draft_that_sees_everything_is_always_accepted():
    everything = replace(BITING, threshold=1e-30)
    lossless = Lossless(4)
    generated(SparseAttention(everything, build("llama")), prompt(1, 50), lossless=lossless, **GREEDY)
    assert lossless.acceptance > 0.9
    assert lossless.tokens_per_pass > 4


def test_streams_what_it_returns(sparse, dense):
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
        torch.manual_seed(1)
        whole = dense.complete(TEXT, max_new_tokens=30, chat=False, **options)
        torch.manual_seed(1)
        assert sparse.complete(TEXT, max_new_tokens=30, chat=False, lossless=Lossless(4), **options) == whole
        for on_prefill in (None, lambda done, total: None):
            torch.manual_seed(1)
            pieces = list(sparse.stream(TEXT, 30, False, on_prefill, lossless=Lossless(4), **options))
            assert "".join(pieces) == whole


def test_a_reader_who_leaves_ends_it(sparse):
    before = threading.active_count()
    stream = sparse.stream(TEXT, max_new_tokens=900, chat=False, do_sample=False, lossless=Lossless(2))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_ends_where_dense_decoding_ends(sparse, dense):
    ids = prompt(1, 50)
    plain = generated(dense, ids, **GREEDY)[0, 50:].tolist()
    for end in {plain[3], plain[7], plain[20]}:
        cut = plain[: plain.index(end) + 1]
        found = generated(sparse, ids, eos_token_id=end, lossless=Lossless(6), **GREEDY)[0, 50:].tolist()
        assert found == cut
    text = dense.tokenizer.decode(plain)
    strings = [text[10:12]]
    expected = generated(dense, ids, stop_strings=strings, tokenizer=dense.tokenizer, **GREEDY)
    assert torch.equal(generated(sparse, ids, stop_strings=strings, lossless=Lossless(6), **GREEDY), expected)
    assert expected.shape[1] < 90

    class After(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] >= 63])

    assert generated(sparse, ids, stopping_criteria=[After()], lossless=Lossless(6), **GREEDY).shape[1] == 63
    for tokens in (1, 2, 3):
        few = {**GREEDY, "max_new_tokens": tokens}
        assert torch.equal(generated(sparse, ids, lossless=Lossless(6), **few), generated(dense, ids, **few))


def test_goes_on_with_a_cache_from_turn_to_turn(sparse, dense):
    turns = [prompt(1, 30, seed=1), prompt(1, 1, seed=2), prompt(1, 17, seed=3)]
    answers = []
    for decoder, lossless in ((sparse, Lossless(4)), (dense, False)):
        cache, ids = SparseCache(decoder.model.config, decoder.config), prompt(1, 0)
        for turn in turns:
            ids = torch.cat([ids, turn], 1)
            ids = generated(decoder, ids, past_key_values=cache, lossless=lossless, do_sample=False, max_new_tokens=12)
        answers.append(ids)
    assert torch.equal(*answers)


def test_a_session_answers_losslessly(sparse, dense):
    document, question = prompt(1, 60, seed=4), prompt(1, 9, seed=5)
    ours, theirs = sparse.read(document), dense.read(document)
    for remember in (False, True, False):
        answer = ours.ask(question, 20, remember=remember, do_sample=False, lossless=True)
        assert answer.tokens == theirs.ask(question, 20, remember=remember, do_sample=False).tokens


def test_what_is_returned_can_be_a_dict(sparse, dense):
    ids = prompt(1, 50)
    output = generated(sparse, ids, lossless=Lossless(3), return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.sequences, generated(dense, ids, **GREEDY))
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


def test_a_sliding_window_is_none_the_wiser():
    # a window of 16 tokens, reached by the prompt: its layers have to give back drafts too, and forget their past after
    drafting, plain = (SparseAttention(config, build("gemma3_text")) for config in (BITING, DENSE))
    for length in (5, 14, 40):
        ids = prompt(1, length)
        cache = SparseCache(drafting.model.config, BITING)
        output = generated(drafting, ids, past_key_values=cache, lossless=Lossless(4), **GREEDY)
        assert torch.equal(output, generated(plain, ids, **GREEDY))
        assert cache.layers[0].keys.shape[2] <= 15
        assert not cache.layers[0].record_past


def test_no_drafts_where_a_step_reads_everything_anyway(dense, caplog):
    short = SparseAttention(AttentionConfig(), build("llama"))
    lossless = Lossless()
    ids = prompt(1, 30)
    assert torch.equal(generated(short, ids, lossless=lossless, **GREEDY), generated(dense, ids, **GREEDY))
    assert lossless.drafted == 0
    assert lossless.passes == lossless.tokens == 39
    assert "reads them all anyway" in str(lossless)


@pytest.mark.parametrize(
    ("settings", "options", "error", "says"),
    [
        ({}, {"num_beams": 2}, UnsupportedError, "2 beams"),
        ({}, {"num_return_sequences": 2, "do_sample": True}, UnsupportedError, "2 rows"),
        ({}, {"use_cache": False}, ConfigError, "SparseCache"),
        ({}, {"cache_implementation": "static"}, ConfigError, "StaticCache"),
        ({}, {"output_logits": True, "return_dict_in_generate": True}, UnsupportedError, "output_logits"),
        ({}, {"prompt_lookup_num_tokens": 3}, ConfigError, "prompt_lookup_num_tokens"),
        ({"max_cache_tokens": 64}, {}, ConfigError, "max_cache_tokens"),
        ({"policy": "snapkv"}, {}, ConfigError, "snapkv"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(settings, options, error, says):
    decoder = SparseAttention(replace(BITING, **settings), build("llama"))
    with pytest.raises(error, match=says):
        decoder.generate(prompt(1, 50), **{"max_new_tokens": 8, "do_sample": False, "lossless": True, **options})


def test_padding_and_half_a_text_are_refused(sparse):
    ids = prompt(1, 50)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(InputError, match="padding"):
        sparse.generate(ids, attention_mask=mask, max_new_tokens=8, lossless=True)
    with pytest.raises(InputError, match="50 ids and a cache of 100"):
        sparse.generate(ids, past_key_values=sparse.prefill(torch.cat([ids, ids], 1)), max_new_tokens=8, lossless=True)
    for drafts in (0, 16):
        with pytest.raises(ConfigError, match="1 to 15"):
            Lossless(drafts)


def test_layers_that_cannot_go_back_are_refused():
    with pytest.raises(UnsupportedError, match="take back"):
        SparseAttention(BITING, build("qwen3_next")).generate(prompt(1, 50), max_new_tokens=8, lossless=True)


# --- the pace, on times that are made up


def test_a_vocabulary_of_one_choice_needs_no_luck():
    # a near tie is where bits decide: two tokens with the same logits to the last bit, in every place
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = model.lm_head.weight[2] = model.lm_head.weight[5:VOCABULARY].mean(0) * 3
    drafting, plain = SparseAttention(BITING, model), SparseAttention(DENSE, build("llama"))
    plain.model.load_state_dict(model.state_dict())
    ids = prompt(1, 50)
    assert torch.equal(generated(drafting, ids, lossless=Lossless(7), **GREEDY), generated(plain, ids, **GREEDY))
