"""Question and answer over a prefilled context: decoded one token at a time, and the cache left as it was."""

import pytest
import torch
from tiny import BITING, CONTEXT, FORCED, build, greedy, prompt

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache
from sparse_attention_decoder.errors import ConfigError, InputError, UnsupportedError
from sparse_attention_decoder.measure.retrieval import Answer, answer

DENSE = AttentionConfig(policy="dense")
LAYERS, CONTEXT_TOKENS, QUESTION_TOKENS = 2, 40, 7
CONTEXT_IDS, QUESTION_IDS = prompt(1, CONTEXT_TOKENS, 1), prompt(1, QUESTION_TOKENS, 2)


def never(written: list[int]) -> bool:
    return False


def read(model: SparseAttention) -> SparseCache:
    return model.prefill(CONTEXT_IDS)


def asked(
    model: SparseAttention, cache: SparseCache, config: AttentionConfig, new_tokens: int = 6, is_done=never
) -> Answer:
    return answer(model.model, cache, QUESTION_IDS, config, new_tokens, is_done)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_a_dense_answer_is_what_transformers_writes(family: str) -> None:
    whole = torch.cat([CONTEXT_IDS, QUESTION_IDS], dim=1)
    expected = greedy(build(family), whole, 6).sequences[0, whole.shape[1] :].tolist()
    model = SparseAttention(DENSE, build(family))
    cache = read(model)
    assert asked(model, cache, DENSE).ids == expected
    # every token goes through the sparse kernels, and the cache serves a second question like a first
    assert asked(model, cache, FORCED).ids == expected


def test_the_question_is_decoded_token_by_token() -> None:
    model = SparseAttention(DENSE, build("llama"))
    result = asked(model, read(model), BITING, new_tokens=6)
    # the last token written is not fed
    assert result.reads.steps == result.reads.sparse_steps == LAYERS * (QUESTION_TOKENS + 6 - 1)
    # 2 KV heads read 11 tokens a step
    assert result.reads.tokens_read == result.reads.steps * 2 * 11


def test_answers_do_not_depend_on_those_before() -> None:
    model = SparseAttention(DENSE, build("llama"))
    cache = read(model)
    before = [layer.keys.clone() for layer in cache.layers]
    configs = [BITING, FORCED, DENSE, AttentionConfig(policy="window", dense_below=0, attention_window=4)]
    together = [asked(model, cache, config, 30) for config in configs]
    assert together == [asked(model, read(model), config, 30) for config in configs]
    assert cache.get_seq_length() == CONTEXT_TOKENS
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert cache.reads.steps == 0


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_layers_that_cannot_be_cropped_are_left_as_they_were(family: str) -> None:
    model = SparseAttention(DENSE, build(family))
    cache = read(model)
    first = asked(model, cache, BITING, 20)
    assert asked(model, cache, BITING, 20) == first
    assert cache.get_seq_length() == CONTEXT_TOKENS


def test_an_answer_ends_at_the_end_of_text_at_done_and_at_its_length() -> None:
    model = SparseAttention(DENSE, build("llama"))
    cache = read(model)
    ids = asked(model, cache, DENSE).ids
    assert len(ids) == 6
    at = next(number for number in range(1, 6) if ids[number] not in ids[:number])
    assert asked(model, cache, DENSE, is_done=lambda written: written[-1] == ids[at]).ids == ids[: at + 1]
    model.model.generation_config.eos_token_id = [ids[at], 127]
    assert asked(model, cache, DENSE).ids == ids[:at]
    assert cache.get_seq_length() == CONTEXT_TOKENS


def test_a_failing_check_leaves_the_cache_as_it_was() -> None:
    model = SparseAttention(DENSE, build("llama"))
    cache = read(model)

    def fails(written: list[int]) -> bool:
        raise RuntimeError("not decoded")

    with pytest.raises(RuntimeError, match="not decoded"):
        asked(model, cache, BITING, is_done=fails)
    assert cache.get_seq_length() == CONTEXT_TOKENS


def test_dense_steps_under_a_sparse_config_are_refused() -> None:
    model = SparseAttention(DENSE, build("llama"))
    cache = read(model)
    waiting = AttentionConfig(dense_below=CONTEXT, sink_tokens=2, attention_window=4, top_k=5)
    with pytest.raises(ConfigError, match=r"40 tokens exceeds the budget of 11.*dense_below=1024.*use dense_below=0"):
        asked(model, cache, waiting)
    assert cache.get_seq_length() == CONTEXT_TOKENS
    # within the budget everything is read, as it should be
    assert asked(model, cache, AttentionConfig(attention_window=CONTEXT)).reads.sparse_steps == 0


def test_wrong_calls_are_refused() -> None:
    model = SparseAttention(DENSE, build("llama"))
    cache = read(model)
    with pytest.raises(InputError, match="cache is empty"):
        asked(model, SparseCache(model.model.config, DENSE), DENSE)
    with pytest.raises(InputError, match="use 1 or more"):
        asked(model, cache, DENSE, 0)
    with pytest.raises(InputError, match=r"shape \(1, 0\)"):
        answer(model.model, cache, QUESTION_IDS[:, :0], DENSE, 4, never)
    with pytest.raises(InputError, match="2 rows"):
        asked(model, model.prefill(prompt(2, 20)), DENSE)
    sliding = build("mistral", sliding_window=16)
    with pytest.raises(UnsupportedError, match="full attention"):
        asked(model, SparseCache(sliding.config, DENSE), DENSE)
