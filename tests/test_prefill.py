"""Chunks of a prompt: the same as attention with a causal mask, whatever the sizes; never where it would be wrong."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from sparse_attention_decoder import SparseCache, enable, prefill
from sparse_attention_decoder.models import adapter


def masked(query, keys, values, scaling):
    """The definition: one call, the future masked, heads repeated."""
    count, total, group = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def tensors(batch, kv_heads, group, count, past, dim, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, count, kv_heads * group, dim, generator=draw).transpose(1, 2)
    keys, values = (torch.randn(batch, kv_heads, past + count, dim, generator=draw) for _ in range(2))
    return query.to(dtype), 3 * keys.to(dtype), values.to(dtype)


@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(2, 70), st.integers(1, 90),
    st.sampled_from([8, 24, 64]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_chunk_is_masked_attention(batch, kv_heads, group, count, past, dim, dtype):
    query, keys, values = tensors(batch, kv_heads, group, count, past, dim, dtype)
    assert prefill.takes_chunk(query, keys, values)
    found = prefill.attend_chunk(query, keys, values, 0.3)
    exact = masked(query.double(), keys.double(), values.double(), 0.3)
    theirs = masked(query, keys, values, 0.3)
    assert found.dtype == dtype and found.shape == query.shape
    # two parts rounded on their own: an element may be off by three roundings, on the whole it is less than two
    errors, others = (found - exact).abs(), (theirs - exact).abs()
    assert errors.square().mean() <= 4 * others.square().mean() + 1e-12
    assert errors.max() <= 4 * others.max() + 1e-6


def test_logits_far_apart_do_not_overflow():
    query, keys, values = tensors(1, 1, 2, 5, 7, 8, torch.float32)
    keys[:, :, :7] *= 300
    assert torch.allclose(prefill.attend_chunk(query, keys, values, 1.0), masked(query, keys, values, 1.0), atol=1e-5)


@pytest.mark.parametrize("name", ["first", "one token", "grad", "values of another size"])
def test_what_it_does_not_take(name):
    query, keys, values = tensors(1, 1, 2, 5, 7, 8, torch.float32)
    refused = {
        "first": (query, keys[:, :, 7:], values[:, :, 7:]),
        "one token": (query[:, :, :1], keys, values),
        "grad": (query.requires_grad_(), keys, values),
        "values of another size": (query.detach(), keys, values[..., :4]),
    }
    assert not prefill.takes_chunk(*refused[name])


def chunked(model, ids, **options):
    cache = SparseCache(model.config, tiny.FULL)
    with torch.no_grad():
        return torch.cat([
            model(ids[:, at : at + 16], past_key_values=cache, **options).logits for at in range(0, ids.shape[1], 16)
        ], 1)  # fmt: skip


def test_a_prompt_in_chunks_is_the_prompt_at_once(monkeypatch):
    model, ids, calls = enable(tiny.build("llama"), tiny.FULL), tiny.prompt(2, 60), []
    whole = prefill.attend_chunk
    monkeypatch.setattr(adapter, "attend_chunk", lambda *args: calls.append(1) or whole(*args))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(chunked(model, ids), expected, rtol=0, atol=1e-5)
    # three chunks behind the first, two layers
    assert len(calls) == 6


def test_padding_is_left_to_the_mask(monkeypatch):
    model = enable(tiny.build("llama"), tiny.FULL)
    ids, mask = tiny.left_pad([tiny.prompt(1, 48)[0], tiny.prompt(1, 40, seed=1)[0]])
    monkeypatch.setattr(adapter, "attend_chunk", None)
    cache = SparseCache(model.config, tiny.FULL)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        found = [
            model(
                ids[:, at : at + 16], attention_mask=mask[:, : at + 16], position_ids=positions[:, at : at + 16],
                past_key_values=cache,
            ).logits
            for at in range(0, 48, 16)
        ]  # fmt: skip
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], expected[real], rtol=0, atol=1e-5)
