"""Generation on a cache of 8 or 4 bits: whatever is done to it, it is read as the numbers that it stores."""

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from cases import layer_with, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_generation import assert_close, assert_in_step, logits_of
from tiny import BITING, FORCED, FULL, greedy, prompt
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparse_attention_decoder import AttentionConfig, SparseCache, enable
from sparse_attention_decoder.attention import decode_step
from sparse_attention_decoder.cache.newest import TOGETHER, packed_of
from sparse_attention_decoder.cache.static import StaticTokens
from sparse_attention_decoder.errors import ConfigError, UnsupportedError
from sparse_attention_decoder.kernels import Packed, stored_bytes
from sparse_attention_decoder.models.memory import token_bytes, whole_bytes
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import KV_BITS, POLICIES

each_kv_dtype = pytest.mark.parametrize("kv_dtype", KV_BITS)


def round_trip(x: Tensor, kv_dtype: str) -> Tensor:
    stored = Packed.room(x, kv_dtype)
    stored.write(x)
    return stored.unpack()


class Rounded(DynamicLayer):
    """Transformers' own layer, fed with the numbers that a packed one stores."""

    kv_dtype: str

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        count = key_states.shape[2]
        found = []
        for x in super().update(key_states, value_states, *args, **kwargs):
            first = packed_of(x.shape[2])
            if count > 1:
                # several attend to each other before they are rounded
                first = min(first, x.shape[2] - count)
            found.append(torch.cat([round_trip(x[:, :, :first], self.kv_dtype), x[:, :, first:]], 2))
        return found[0], found[1]


def rounded_cache(model: PreTrainedModel, kv_dtype: str) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for number in range(len(cache.layers)):
        cache.layers[number] = Rounded()
        cache.layers[number].kv_dtype = kv_dtype
    return cache


def packed_model(config: AttentionConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return enable(tiny.build(dtype=dtype), config)


@pytest.mark.parametrize("config", [FULL, FORCED, AttentionConfig()], ids=["full", "forced", "below the crossover"])
@pytest.mark.parametrize("tokens", [1, 2, 130])
@each_kv_dtype
def test_decoding_equals_dense_attention_to_the_numbers_stored(kv_dtype, tokens, config):
    config = replace(config, kv_dtype=kv_dtype)
    ids, model = prompt(1, tokens + 150)[0], tiny.build()
    cache = rounded_cache(model, kv_dtype)
    with torch.no_grad():
        parts = (ids[:tokens], *ids[tokens:].split(1))
        expected = torch.cat([model(part[None], past_key_values=cache).logits[0] for part in parts])
    logits, held = tiny.replay(packed_model(config), config, [(ids[:tokens], ids[tokens:])])
    assert_close(logits, expected)
    assert (held.reads.sparse_steps > 0) == (config.threshold == 1e-30)
    assert 0 < held.reads.share_read < 1


@pytest.mark.parametrize("tokens", [2, 41])
@each_kv_dtype
def test_a_prompt_read_at_once_is_read_as_the_dense_model_reads_it(kv_dtype, tokens):
    ids = prompt(2, tokens)
    with torch.no_grad():
        assert torch.equal(packed_model(replace(BITING, kv_dtype=kv_dtype))(ids).logits, tiny.build()(ids).logits)


@pytest.mark.parametrize("policy", POLICIES)
@each_kv_dtype
def test_every_policy_decodes_a_padded_row_as_it_would_alone(kv_dtype, policy):
    model = packed_model(replace(BITING, policy=policy, kv_dtype=kv_dtype), torch.float64)
    # padded by as many tokens as are packed together: which ones are whole depends on a row's place in the batch
    rows = [prompt(1, 140, seed=1)[0], prompt(1, 140 - TOGETHER, seed=2)[0]]
    ids, mask = tiny.left_pad(rows)
    together = greedy(model, ids, 6, attention_mask=mask)
    for number, row in enumerate(rows):
        alone = greedy(model, row[None], 6)
        assert torch.equal(together.sequences[number, -6:], alone.sequences[0, -6:])


@each_kv_dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_decodes_packed(kv_dtype, dtype):
    result = greedy(packed_model(replace(BITING, kv_dtype=kv_dtype), dtype), prompt(2, 120))
    assert logits_of(result).isfinite().all()
    assert result.past_key_values.reads.sparse_steps > 0


@settings(max_examples=6)
@given(st.integers(30, 210), st.integers(1, 25), st.integers(2, 25), st.sampled_from(["sketch", "quest"]))
@example(tokens=126, undone=20, chunk=20, policy="sketch")
@each_kv_dtype
def test_crop_and_continue_equals_never_having_had_the_tokens(kv_dtype, tokens, undone, chunk, policy):
    config = replace(BITING, policy=policy, kv_dtype=kv_dtype)
    model = packed_model(config)
    ids, other, more = prompt(1, tokens)[0], prompt(1, undone, seed=1)[0], prompt(1, chunk + 3, seed=2)[0]
    logits, clean = tiny.replay(model, config, [(ids, more[:1]), (more[1:chunk], more[chunk:])])
    _, held = tiny.replay(model, config, [(ids, more[:1]), (other[: undone // 2], other[undone // 2 :])])
    held.crop(-undone)
    with torch.no_grad():
        found = [model(part[None], past_key_values=held).logits[0] for part in (more[1:chunk], *more[chunk:].split(1))]
    if policy == "sketch":
        for layer in held.sparse_layers:
            assert_in_step(layer, Rows.full(1, clean.get_seq_length()))
    assert torch.equal(torch.cat(found), logits[tokens + 1 :])


@each_kv_dtype
def test_beams_rows_and_assistants_work_on_a_packed_cache(kv_dtype):
    config = replace(FORCED, kv_dtype=kv_dtype)
    model, ids = packed_model(config), prompt(2, 125)
    beams = greedy(model, ids, 6, num_beams=3, num_return_sequences=3)
    dense = greedy(
        tiny.build(), ids, 6, num_beams=3, num_return_sequences=3, past_key_values=rounded_cache(model, kv_dtype)
    )
    assert torch.equal(beams.sequences, dense.sequences)
    alone = greedy(model, ids[:1], 6)
    assisted = model.generate(
        ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=6, do_sample=False, assistant_model=model
    )
    assert torch.equal(assisted, alone.sequences)


# --- what other code sees of it


@each_kv_dtype
def test_a_single_new_token_shows_nan_and_several_show_themselves_behind_the_numbers_stored(kv_dtype):
    cache = SparseCache(tiny.build().config, replace(BITING, kv_dtype=kv_dtype))
    keys, values = randn(0, 2, 2, 7, 16), randn(1, 2, 2, 7, 16)
    found = cache.update(keys, values, 0)
    for shown, x in zip(found, (keys, values), strict=True):
        assert torch.equal(shown, x)
    for shown in (*cache.update(keys[:, :, :1], values[:, :, :1], 0), cache.layers[0].keys, cache.layers[0].values):
        assert shown.shape == (2, 2, 8, 16)
        assert shown.isnan().all()
        assert shown.untyped_storage().nbytes() == 4
    more, later = randn(2, 2, 2, 150, 16), cache.update(*[randn(2, 2, 2, 150, 16)] * 2, 0)
    for shown, x in zip(later, (keys, values), strict=True):
        # those that left the newest are rounded, but for the chunk's own
        assert torch.equal(shown, torch.cat([round_trip(torch.cat([x, x[:, :, :1]], 2), kv_dtype), more], 2))


@each_kv_dtype
@pytest.mark.parametrize("policy", ["sketch", "dense", "window", "quest", "snapkv"])
def test_decoding_never_makes_a_float_copy_of_the_cache(kv_dtype, policy, monkeypatch):
    config = replace(BITING, policy=policy, kv_dtype=kv_dtype)
    model, ids = packed_model(config), prompt(1, 320)[0]
    # from here to 366 tokens no statistics are fitted anew
    _, held = tiny.replay(model, config, [(ids[:300], ids[300:305])])
    made = []
    for name in ("rotated", "unpack"):
        original = getattr(Packed, name)
        monkeypatch.setattr(Packed, name, lambda x, original=original: made.append(x.shape[-2]) or original(x))
    monkeypatch.setattr("sparse_attention_decoder.kernels.reference._PIECE", 64)
    with torch.no_grad():
        for token in ids[305:]:
            assert model(token[None, None], past_key_values=held).logits.isfinite().all()
    assert max(made, default=0) <= 64


@each_kv_dtype
@pytest.mark.parametrize("family", ["deepseek_v3", "diffllama"])
def test_a_model_that_makes_keys_of_cached_ones_is_refused(kv_dtype, family):
    config = replace(BITING, kv_dtype=kv_dtype)
    with pytest.raises(UnsupportedError, match=f"{family} .* use kv_dtype=None"):
        enable(tiny.build(family), config)
    # a cache of another config than the model's cannot be known beforehand
    model, ids = enable(tiny.build(family), BITING), prompt(1, 20)
    held = SparseCache(model.config, config)
    with torch.no_grad():
        model(ids, past_key_values=held)
        with pytest.raises(UnsupportedError, match="behind the cache"):
            model(ids[:, :1], past_key_values=held)


@each_kv_dtype
def test_other_attention_on_a_packed_cache_gives_nan_and_not_something(kv_dtype):
    model = tiny.build()
    held, ids = SparseCache(model.config, replace(BITING, kv_dtype=kv_dtype)), prompt(1, 20)
    with torch.no_grad():
        assert model(ids, past_key_values=held).logits.isfinite().all()
        assert model(ids[:, :1], past_key_values=held).logits.isnan().all()


@each_kv_dtype
def test_dense_fallbacks_read_the_numbers_stored(kv_dtype):
    config = replace(BITING, kv_dtype=kv_dtype)
    model, ids, plain = packed_model(config), prompt(1, 146), tiny.build()
    held, rounded = SparseCache(model.config, config), rounded_cache(plain, kv_dtype)
    with torch.no_grad():
        for which, where in ((model, held), (plain, rounded)):
            which(ids[:, :140], past_key_values=where)
        mask = torch.zeros(1, 1, 1, 141)
        mask[..., 3:9] = -math.inf
        found, expected = (
            which(ids[:, 140:141], past_key_values=where, attention_mask=mask).logits
            for which, where in ((model, held), (plain, rounded))
        )
        assert_close(found, expected)
    # only queries carry a gradient: the cache hides its numbers, and the fallback asks for them
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    model(ids[:, 141:142], past_key_values=held).logits.square().sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


@each_kv_dtype
def test_a_stock_copy_holds_the_numbers_and_another_config_keeps_the_kv_dtype(kv_dtype):
    config = replace(BITING, kv_dtype=kv_dtype)
    model, ids = packed_model(config), prompt(1, 140)[0]
    logits, held = tiny.replay(model, config, [(ids[:130], ids[130:])])
    stock = held.to_stock(model.config)
    for layer, other in zip(held.sparse_layers, stock.layers, strict=True):
        assert torch.equal(other.keys, layer.state.buffer.plain_keys)
        assert torch.equal(other.values, layer.state.buffer.plain_values)
    other = held.reconfigured(replace(config, top_k=3))
    assert other.sparse_layers[0].keys.isnan().all()
    for kv in (None, *KV_BITS):
        if kv != kv_dtype:
            with pytest.raises(ConfigError, match="read the prompt anew"):
                held.reconfigured(replace(config, kv_dtype=kv))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("path", [["int8"], ["int8", "int4"]], ids=str)
def test_a_cache_converted_while_decoding_goes_on_as_one_that_held_those_numbers(policy, path):
    config = replace(BITING, policy=policy)
    model, ids = packed_model(config), prompt(1, 160)[0]
    _, held = tiny.replay(model, config, [(ids[:140], ids[140:150])])
    before = held.reads.bytes_read
    for kv_dtype in path:
        numbers = [layer.state.buffer.plain_keys.clone() for layer in held.sparse_layers]
        for layer in held.sparse_layers:
            layer.convert(kv_dtype)
        for layer, keys in zip(held.sparse_layers, numbers, strict=True):
            first = packed_of(150)
            rounded = torch.cat([round_trip(keys[:, :, :first], kv_dtype), keys[:, :, first:]], 2)
            assert torch.equal(layer.state.buffer.plain_keys, rounded)
            assert layer.keys.isnan().all()
    assert held.reads.bytes_read == before
    with torch.no_grad():
        for token in ids[150:]:
            assert model(token[None, None], past_key_values=held).logits.isfinite().all()
    if policy == "sketch":
        for layer in held.sparse_layers:
            assert_in_step(layer, Rows.full(1, 160))


def test_an_empty_layer_converts_too():
    model, ids = packed_model(BITING), prompt(1, 40)
    held = SparseCache(model.config, BITING)
    for layer in held.sparse_layers:
        layer.convert("int4")
    assert logits_of(greedy(model, ids, past_key_values=held)).isfinite().all()
    assert {layer.state.buffer.kv_dtype for layer in held.sparse_layers} == {"int4"}


# --- bytes


@each_kv_dtype
def test_reads_count_packed_bytes_over_plain_dense_ones(kv_dtype):
    query, keys, values = randn(0, 2, 6, 16), randn(1, 2, 2, 100, 16), randn(2, 2, 2, 100, 20)
    layer = layer_with(keys, values, policy="window", kv_dtype=kv_dtype)
    decode_step(query, layer, Rows.full(2, 100), 0.25)
    whole = layer.buffer.whole
    token = stored_bytes(16, kv_dtype, torch.float32) + stored_bytes(20, kv_dtype, torch.float32)
    assert token == (16 + 20) * KV_BITS[kv_dtype] // 8 + 4
    # two sinks are packed, the window of six is whole
    assert layer.reads.bytes_read == 8 * token + 24 * 144
    assert layer.reads.bytes_dense == 400 * 144
    dense = layer_with(keys, values, policy="dense", kv_dtype=kv_dtype)
    decode_step(query, dense, Rows.full(2, 100), 0.25)
    assert dense.reads.bytes_read == 4 * ((100 - whole) * token + whole * 144)


@pytest.mark.parametrize("kv_dtype", [None, *KV_BITS])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_bytes_of_a_token_are_those_that_a_cache_holds(kv_dtype, family):
    config = replace(BITING, kv_dtype=kv_dtype)
    model = enable(tiny.build(family), config)
    held = greedy(model, prompt(1, 150), 2).past_key_values
    stored = sum(x.nbytes for layer in held.sparse_layers for x in layer.state.buffer.tensors().values())
    whole, total = held.sparse_layers[0].state.buffer.whole, held.get_seq_length()
    assert (whole > 0) == (kv_dtype is not None)
    packed, plain = (token_bytes(model.config, form, torch.float32) for form in (kv_dtype, None))
    assert stored == (total - whole) * packed + whole * plain
    if whole:
        rooms = sum(layer.state.buffer.newest.nbytes for layer in held.sparse_layers)
        assert rooms == whole_bytes(model.config, torch.float32) >= whole * plain


@each_kv_dtype
def test_a_static_cache_refuses_a_kv_dtype(kv_dtype):
    with pytest.raises(ConfigError, match=f"kv_dtype '{kv_dtype}' is not for a static cache"):
        StaticTokens(replace(BITING, kv_dtype=kv_dtype), randn(0, 1, 2, 3, 16), randn(1, 1, 2, 3, 16), 64)
