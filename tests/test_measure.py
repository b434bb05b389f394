"""The comparison and the quality measure: what they report must be what happened."""

import math
from dataclasses import replace

import pytest
import torch
from test_decoder import TEXT, tokenizer
from tiny import BITING, FORCED, build, prompt

from sparse_attention_decoder import AttentionConfig, SparseAttention
from sparse_attention_decoder.errors import ConfigError, InputError
from sparse_attention_decoder.measure.compare import TURN, side_by_side
from sparse_attention_decoder.measure.doctor import facts
from sparse_attention_decoder.measure.quality import compare


def test_sides_agree_when_everything_is_read() -> None:
    model = SparseAttention(FORCED, build("llama"), tokenizer())
    result = side_by_side(model, model.prompt_ids(TEXT), 3 * TURN + 1)
    texts = {side.name: side.ids for side in result.sides}
    assert texts["transformers"] == texts["dense"] == texts["sparse"]
    assert result.agreeing == result.shortest == 3 * TURN + 1
    assert result.side("dense").share_read == 1.0
    # everything is read, and the index on top
    assert result.side("sparse").share_read > 1.0


def test_the_sparse_side_reads_less_and_the_count_is_right() -> None:
    model = SparseAttention(BITING, build("llama"), tokenizer())
    result = side_by_side(model, model.prompt_ids(TEXT), 10)
    sparse = result.side("sparse")
    # 2 layers x 2 KV heads x 10 steps of 2 + 4 + 5 tokens
    assert sparse.tokens_read == 2 * 2 * 10 * 11
    assert sparse.tokens_cached == 2 * 2 * sum(range(90, 100))
    assert sparse.share_read < 0.4
    assert result.prompt_tokens == 90
    assert len(sparse.step_seconds) == len(sparse.ids) == 10


def test_the_dense_side_writes_what_plain_transformers_writes() -> None:
    model = SparseAttention(BITING, build("llama"), tokenizer())
    ids = model.prompt_ids(TEXT)
    result = side_by_side(model, ids, 12)
    expected = build("llama").generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result.side("dense").ids == result.side("transformers").ids == expected


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_both_of_our_sides_keep_keys_and_values_packed_alike(kv_dtype: str) -> None:
    model = SparseAttention(replace(FORCED, kv_dtype=kv_dtype), build("llama"), tokenizer())
    result = side_by_side(model, model.prompt_ids(TEXT), 12)
    dense, sparse = result.side("dense"), result.side("sparse")
    assert dense.ids == sparse.ids and dense.tokens_read == dense.tokens_cached == sparse.tokens_read
    # packed both, but for the newest, which are most of so short a text
    assert dense.share_read < 1 and sparse.share_read < 1


def test_a_side_ends_at_its_end_of_text_token() -> None:
    plain = build("llama")
    ids = SparseAttention(FORCED, plain, tokenizer()).prompt_ids(TEXT)
    first = side_by_side(SparseAttention(FORCED, build("llama"), tokenizer()), ids, 4).side("dense").ids[0]
    ending = build("llama")
    ending.generation_config.eos_token_id = [first, 127]
    result = side_by_side(SparseAttention(FORCED, ending, tokenizer()), ids, 4)
    assert [len(side.ids) for side in result.sides] == [1, 1, 1]


def test_the_model_is_sparse_again_after_a_comparison() -> None:
    model = SparseAttention(BITING, build("llama"), tokenizer())
    side_by_side(model, prompt(1, 20), 2)
    cache = model(prompt(1, 40)).past_key_values
    assert cache.config == BITING


def test_comparing_needs_a_context() -> None:
    with pytest.raises(InputError, match="at least 2"):
        side_by_side(SparseAttention(BITING, build("llama")), prompt(1, 1), 2)


def decoder() -> SparseAttention:
    return SparseAttention(BITING, build("llama"))


def test_agreement_with_everything_read_is_perfect_and_otherwise_is_not() -> None:
    nearly_all, few = compare(decoder(), prompt(2, 80), 60, [FORCED, BITING])
    assert nearly_all.tokens[0].abs().max() < 1e-6
    assert bool((nearly_all.tokens[1] == 1).all())
    assert nearly_all.tokens[3].abs().max() < 1e-4
    assert min(nearly_all.mass) > 0.9999
    assert min(few.mean(0)[0], few.mean(1)[0]) > 1e-3
    assert few.sparse_share == 1.0
    assert few.retrieved == pytest.approx(5)
    assert 0 < few.missing_mass < 1
    assert few.index_share < few.share_read < 0.5
    assert len(few.error) == len(few.mass) == len(few.recall) == 2
    assert max(few.mass) < 0.99 < nearly_all.mass[0]
    assert min(few.error) > 100 * max(nearly_all.error)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_dense_and_sparse_read_keys_and_values_packed_alike(kv_dtype: str) -> None:
    packed = [replace(config, kv_dtype=kv_dtype) for config in (FORCED, BITING)]
    model = SparseAttention(packed[0], build("llama"))
    nearly_all, few = compare(model, prompt(2, 80), 60, packed)
    assert nearly_all.tokens[0].abs().max() < 1e-6 and min(nearly_all.mass) > 0.9999
    assert min(few.mean(0)[0], few.mean(1)[0]) > 1e-3
    with pytest.raises(ConfigError, match="kv_dtype None cannot read"):
        next(compare(model, prompt(2, 80), 60, [BITING]))


@torch.no_grad()
def test_agreement_is_computed_from_the_distributions_of_single_steps() -> None:
    ids, context = prompt(1, 71), 60
    outcome = next(compare(decoder(), ids, context, [BITING]))
    dense = build("llama")(ids).logits[:, context:-1].double().log_softmax(-1)
    sparse_model = SparseAttention(BITING, build("llama"))
    cache = sparse_model.prefill(ids[:, :context])
    steps = [sparse_model(ids[:, at : at + 1], past_key_values=cache).logits[:, 0] for at in range(context, 70)]
    sparse = torch.stack(steps, 1).double().log_softmax(-1)
    target = ids[:, context + 1 :, None]
    kl, top1, ce_dense, ce_change = outcome.mean()
    assert kl == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), rel=1e-3)
    assert top1 == pytest.approx(float((dense.argmax(-1) == sparse.argmax(-1)).double().mean()))
    assert ce_dense == pytest.approx(float(-dense.gather(-1, target).mean()), rel=1e-4)
    assert ce_change == pytest.approx(float((dense - sparse).gather(-1, target).mean()), rel=1e-3)


def test_a_result_has_intervals_around_its_means_and_a_row_a_text() -> None:
    result = next(compare(decoder(), prompt(2, 130), 60, [BITING])).result(["one", "two"])
    for name in ("kl", "top1", "ce_change", "ppl_change"):
        low, high = result[f"{name}_ci"]
        assert low <= result[name] <= high, name
        assert low < high, name
    assert result["ppl_change"] == pytest.approx(math.exp(result["ce_change"]) - 1)
    assert result["ppl_dense"] == pytest.approx(math.exp(result["ce_dense"]))
    assert [text["name"] for text in result["per_text"]] == ["one", "two"]
    assert sum(text["kl"] for text in result["per_text"]) / 2 == pytest.approx(result["kl"])
    assert result["mass"] == pytest.approx(sum(result["layers"]["mass"]) / 2, abs=1e-4)


def test_a_policy_leaves_no_trace_for_the_next() -> None:
    few = AttentionConfig(policy="quest", top_k=16, attention_window=8, dense_below=0)
    configs = [few, replace(few, policy="h2o"), replace(few, policy="snapkv"), BITING]
    together = list(compare(decoder(), prompt(1, 90), 60, configs))
    for config, found in zip(configs, together, strict=True):
        alone = next(compare(decoder(), prompt(1, 90), 60, [config]))
        assert torch.equal(found.tokens, alone.tokens), config.policy
        assert (found.share_read, found.mass) == (alone.share_read, alone.mass), config.policy


def test_the_model_reads_as_before_after_an_agreement() -> None:
    model = decoder()
    list(compare(model, prompt(1, 80), 60, [FORCED]))
    assert model(prompt(1, 40)).past_key_values.config == BITING


def test_dense_compared_with_dense_is_refused() -> None:
    late = replace(BITING, dense_below=1000)
    with pytest.raises(InputError, match="dense would be compared with dense"):
        next(compare(decoder(), prompt(1, 80), 60, [late]))


def test_too_little_text_to_measure_is_refused() -> None:
    with pytest.raises(InputError, match="give more text"):
        next(compare(decoder(), prompt(1, 10), 9, [BITING]))


def test_doctor_names_versions_backends_and_model() -> None:
    told = dict(facts())
    assert told["torch"] == torch.__version__
    assert told["backend reference"].startswith("usable")
    assert "default model" in told
    assert math.prod(int(word) for word in told["threads"].split() if word.isdigit()) >= 1
