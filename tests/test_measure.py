"""The comparison and the quality measure: what they report must be what happened."""

import math

import pytest
import torch
from test_decoder import TEXT, tokenizer
from tiny import BITING, FORCED, build, prompt

from sparse_attention_decoder import AttentionConfig, SparseAttention
from sparse_attention_decoder.errors import InputError
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


def test_agreement_with_everything_read_is_perfect_and_otherwise_is_not() -> None:
    nearly_all, few = compare(build("llama"), prompt(2, 80), 60, [FORCED, BITING])
    for text in nearly_all.texts:
        assert text.kl == pytest.approx(0, abs=1e-6)
        assert text.top1 == 1.0
        assert text.ce_change == pytest.approx(0, abs=1e-4)
    assert min(text.kl for text in few.texts) > 1e-3
    assert few.sparse_share == 1.0
    assert few.retrieved == pytest.approx(5)
    assert 0 < few.missing_mass < 1
    assert few.index_share < few.share_read < 0.5


@torch.no_grad()
def test_agreement_is_computed_from_the_distributions_of_single_steps() -> None:
    ids, context = prompt(1, 71), 60
    outcome = next(compare(build("llama"), ids, context, [BITING]))
    dense = build("llama")(ids).logits[:, context:-1].double().log_softmax(-1)
    sparse_model = SparseAttention(BITING, build("llama"))
    cache = sparse_model.prefill(ids[:, :context])
    steps = [sparse_model(ids[:, at : at + 1], past_key_values=cache).logits[:, 0] for at in range(context, 70)]
    sparse = torch.stack(steps, 1).double().log_softmax(-1)
    target = ids[:, context + 1 :, None]
    text = outcome.texts[0]
    assert text.kl == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), rel=1e-3)
    assert text.top1 == pytest.approx(float((dense.argmax(-1) == sparse.argmax(-1)).double().mean()))
    assert text.ce_dense == pytest.approx(float(-dense.gather(-1, target).mean()), rel=1e-4)
    assert text.ce_change == pytest.approx(float((dense - sparse).gather(-1, target).mean()), rel=1e-3)


def test_a_policy_leaves_no_trace_for_the_next() -> None:
    configs = [AttentionConfig(policy="quest", top_k=16, attention_window=8, dense_below=0), BITING]
    both = list(compare(build("llama"), prompt(1, 90), 60, configs))
    alone = next(compare(build("llama"), prompt(1, 90), 60, [BITING]))
    assert both[1] == alone


def test_too_little_text_to_measure_is_refused() -> None:
    with pytest.raises(InputError, match="give more text"):
        next(compare(build("llama"), prompt(1, 10), 9, [BITING]))


def test_doctor_names_versions_backends_and_model() -> None:
    told = dict(facts())
    assert told["torch"] == torch.__version__
    assert told["backend reference"].startswith("usable")
    assert "default model" in told
    assert math.prod(int(word) for word in told["threads"].split() if word.isdigit()) >= 1
