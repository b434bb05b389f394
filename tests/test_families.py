"""Model families: those hooked are dense at full budget and right below it; the others are refused by name."""

import logging
from functools import cache

import pytest
import tiny
import torch
from tiny import BITING, FORCED, FULL, SPARSE_LAYERS
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from sparse_attention_decoder import SparseCache, disable, enable
from sparse_attention_decoder.errors import UnsupportedError
from sparse_attention_decoder.models import adapter

FAMILIES = sorted(SPARSE_LAYERS)
# logits may differ by this share of the largest one: float32 sums in another order
ROUNDING = 1e-4


@pytest.fixture(autouse=True)
def _warnings_are_said_anew():
    adapter._warn_once.cache_clear()


@cache
def dense_run(family: str) -> tuple[Tensor, Tensor]:
    """Tokens and logits [n, B, V] of the model as transformers runs it."""
    result = tiny.greedy(tiny.build(family), tiny.prompt(1, 40))
    return result.sequences, torch.stack(result.logits)


def padded_batch() -> tuple[list[Tensor], Tensor, Tensor]:
    rows = [tiny.prompt(1, 40, seed=1)[0], tiny.prompt(1, 29, seed=2)[0]]
    return rows, *tiny.left_pad(rows)


def assert_within_rounding(logits: Tensor, expected: Tensor) -> None:
    error = float((logits - expected).abs().max())
    assert error < ROUNDING * float(expected.abs().max())


def assert_runs_as_before(model: PreTrainedModel, before: dict, dense: Tensor) -> None:
    assert tiny.trace(model) == before
    assert torch.equal(tiny.greedy(model, tiny.prompt(1, 40)).sequences, dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_dense_bit_for_bit(family):
    tokens, logits = dense_run(family)
    result = tiny.greedy(enable(tiny.build(family), FULL), tiny.prompt(1, 40))
    assert torch.equal(result.sequences, tokens)
    assert torch.equal(torch.stack(result.logits), logits)
    assert result.past_key_values.reads.sparse_steps == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_dense_bit_for_bit_in_a_padded_batch(family):
    _, ids, mask = padded_batch()
    dense = tiny.greedy(tiny.build(family), ids, attention_mask=mask)
    result = tiny.greedy(enable(tiny.build(family), FULL), ids, attention_mask=mask)
    assert torch.equal(result.sequences, dense.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(dense.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_read_through_the_sparse_path_equals_dense(family):
    tokens, logits = dense_run(family)
    result = tiny.greedy(enable(tiny.build(family), FORCED), tiny.prompt(1, 40))
    reads = result.past_key_values.reads
    # the first of eight tokens comes from prefill, seven steps decode
    assert reads.sparse_steps == reads.steps == 7 * SPARSE_LAYERS[family]
    assert reads.tokens_read == reads.tokens_cached
    assert torch.equal(result.sequences, tokens)
    assert_within_rounding(torch.stack(result.logits), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_read_through_the_sparse_path_equals_dense_in_a_padded_batch(family):
    _, ids, mask = padded_batch()
    dense = tiny.greedy(tiny.build(family), ids, attention_mask=mask)
    result = tiny.greedy(enable(tiny.build(family), FORCED), ids, attention_mask=mask)
    assert result.past_key_values.reads.sparse_steps > 0
    assert torch.equal(result.sequences, dense.sequences)
    assert_within_rounding(torch.stack(result.logits), torch.stack(dense.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_left_padded_batch_decode_as_they_would_alone(family):
    model = enable(tiny.build(family), BITING)
    rows, ids, mask = padded_batch()
    together = tiny.greedy(model, ids, attention_mask=mask)
    reads = together.past_key_values.reads
    assert reads.sparse_steps > 0
    assert reads.tokens_read < reads.tokens_cached / 2
    for row, own in enumerate(rows):
        alone = tiny.greedy(model, own[None])
        assert torch.equal(together.sequences[row, -8:], alone.sequences[0, -8:])
        assert_within_rounding(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_budget_bites(family):
    # otherwise the tests above would prove nothing
    _, logits = dense_run(family)
    result = tiny.greedy(enable(tiny.build(family), BITING), tiny.prompt(1, 40))
    second = result.logits[1]
    assert float((second - logits[1]).abs().max()) > 100 * ROUNDING * float(logits.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_layers_and_no_others_are_sparse(family):
    model = enable(tiny.build(family), BITING)
    assert len(SparseCache(model.config, BITING).sparse_layers) == SPARSE_LAYERS[family]
    cache = tiny.greedy(model, tiny.prompt(1, 40)).past_key_values
    assert [layer.state.reads.sparse_steps for layer in cache.sparse_layers] == [7] * SPARSE_LAYERS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_disable_gives_back_the_model_as_it_was(family):
    model = tiny.build(family)
    before = tiny.trace(model)
    enable(model, BITING)
    tiny.greedy(model, tiny.prompt(1, 40))
    assert_runs_as_before(disable(model), before, dense_run(family)[0])


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "falcon", "bloom", "mpt"])
def test_a_family_that_would_come_out_wrong_is_refused_by_name_and_left_as_it_was(family):
    model = tiny.build(family)
    before = tiny.trace(model)
    dense = tiny.greedy(model, tiny.prompt(1, 40)).sequences
    with pytest.raises(UnsupportedError, match=f"^{family} "):
        enable(model, BITING)
    assert_runs_as_before(model, before, dense)


def test_an_encoder_decoder_is_refused_by_name_and_left_as_it_was():
    model = tiny.build("t5", auto_class=AutoModelForSeq2SeqLM)
    before = tiny.trace(model)
    with pytest.raises(UnsupportedError, match=r"^t5 .*decoder-only"):
        enable(model, BITING)
    assert tiny.trace(model) == before


def test_soft_capped_logits_are_refused_in_any_family():
    model = tiny.build("llama", attn_logit_softcapping=30.0)
    before = tiny.trace(model)
    with pytest.raises(UnsupportedError, match=r"^llama .*soft-capped"):
        enable(model, BITING)
    assert tiny.trace(model) == before


def test_a_model_that_ignores_the_switch_is_refused_by_name_and_left_as_it_was():
    # codegen is in no table: its attention is written out, and set_attn_implementation only logs
    model = tiny.build("codegen")
    before = tiny.trace(model)
    dense = tiny.greedy(model, tiny.prompt(1, 40)).sequences
    with pytest.raises(UnsupportedError, match=r"^codegen "):
        enable(model, BITING)
    assert_runs_as_before(model, before, dense)


@pytest.mark.parametrize(("family", "auto_class"), [("llama", AutoModel), ("bert", AutoModelForMaskedLM)])
def test_what_is_no_causal_language_model_is_refused_and_left_as_it_was(family, auto_class):
    model = tiny.build(family, auto_class=auto_class)
    before = tiny.trace(model)
    with pytest.raises(UnsupportedError, match=type(model).__name__):
        enable(model, BITING)
    assert tiny.trace(model) == before


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "block_indices", "indices", "sinks"])
def test_an_unknown_family_that_changes_the_scores_is_refused_when_it_does(name):
    query, key = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 8, 16)
    with pytest.raises(UnsupportedError, match=f"Linear passes {name}"):
        adapter.sparse_attention_forward(torch.nn.Linear(1, 1), query, key, key, **{name: torch.ones(1)})


@pytest.mark.parametrize("family", ["mamba", "minimax"])
def test_a_model_with_a_cache_of_another_kind_is_refused_by_name_and_left_as_it_was(family):
    model = tiny.build(family)
    before = tiny.trace(model)
    with pytest.raises(UnsupportedError, match=f"^{family} "):
        enable(model, BITING)
    assert tiny.trace(model) == before


@pytest.mark.parametrize("config", [FULL, FORCED, BITING], ids=["full", "forced", "biting"])
def test_values_changed_behind_the_cache_are_attended_as_they_are_and_densely(config, caplog):
    # diffllama attends the same keys twice, each time to another half of the values' heads
    caplog.set_level(logging.WARNING, logger="sparse_attention_decoder")
    dense = tiny.greedy(tiny.build("diffllama"), tiny.prompt(1, 40))
    result = tiny.greedy(enable(tiny.build("diffllama"), config), tiny.prompt(1, 40))
    assert torch.equal(result.sequences, dense.sequences)
    assert_within_rounding(torch.stack(result.logits), torch.stack(dense.logits))
    assert len(caplog.records) == 1
    assert "DiffLlamaAttention" in caplog.text


def test_latent_attention_is_warned_of_by_name_and_stays_dense(caplog):
    dense = tiny.greedy(tiny.build("deepseek_v3"), tiny.prompt(1, 40))
    with caplog.at_level(logging.WARNING, logger="sparse_attention_decoder"):
        model = enable(tiny.build("deepseek_v3"), BITING)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "deepseek_v3" in caplog.text
    assert "dense" in caplog.text
    result = tiny.greedy(model, tiny.prompt(1, 40))
    assert torch.equal(result.sequences, dense.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(dense.logits))
    assert result.past_key_values.reads.steps == 0


def test_a_model_of_sliding_layers_alone_is_warned_of_by_name_and_unchanged(caplog):
    dense = tiny.greedy(tiny.build("mistral", sliding_window=64), tiny.prompt(1, 80))
    with caplog.at_level(logging.WARNING, logger="sparse_attention_decoder"):
        model = enable(tiny.build("mistral", sliding_window=64), BITING)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "mistral" in caplog.text
    result = tiny.greedy(model, tiny.prompt(1, 80))
    assert len(caplog.records) == 1
    assert result.past_key_values.sparse_layers == []
    assert torch.equal(result.sequences, dense.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(dense.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_model_is_not_warned_of(family, caplog):
    with caplog.at_level(logging.WARNING, logger="sparse_attention_decoder"):
        tiny.greedy(enable(tiny.build(family), BITING), tiny.prompt(1, 40))
    assert caplog.records == []


def test_the_text_half_of_an_image_model_decodes_sparsely():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**tiny.SIZES["gemma3_text"], "vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "eos_token_id": None}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=125,
        boi_token_index=126,
        eoi_token_index=127,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config).eval()
    before = tiny.trace(model)
    ids = tiny.prompt(1, 40).clamp_max(120)
    dense = tiny.greedy(model, ids)
    forced = tiny.greedy(enable(model, FORCED), ids)
    assert forced.past_key_values.reads.sparse_steps == 7
    assert torch.equal(forced.sequences, dense.sequences)
    assert isinstance(model(ids).past_key_values, SparseCache)
    assert tiny.trace(disable(model)) == before
