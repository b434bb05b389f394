"""The far field: what is left unread adds its share of attention times the mean value."""

import pytest
import torch
from cases import coded, fit, layer_with, left_padded, randn
from hypothesis import given
from hypothesis import strategies as st
from tiny import build, prompt, replay

from sparse_attention_decoder import AttentionConfig, enable
from sparse_attention_decoder.attention import decode_step
from sparse_attention_decoder.cache import FarField, KVBuffer
from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.errors import BackendError, ConfigError
from sparse_attention_decoder.kernels import plain, settled
from sparse_attention_decoder.kernels.cpu import CpuKernels
from sparse_attention_decoder.kernels.reference import REFERENCE
from sparse_attention_decoder.selection import Rows

CPU = CpuKernels()
SMALL = {"top_k": 8, "attention_window": 6, "sink_tokens": 2, "threshold": None, "dense_below": 0}

pytestmark = pytest.mark.usefixtures("poison")


def constant_but_for_sinks(batch: int = 2, tokens: int = 100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, keys, and values that are all the same behind two sinks."""
    values = randn(3, batch, 2, 1, 20).expand(-1, -1, tokens, -1).clone()
    values[:, :, :2] = randn(4, batch, 2, 2, 20)
    return randn(0, batch, 6, 16), randn(1, batch, 2, tokens, 16), values


def test_where_unread_values_are_the_mean_and_shares_are_exact_it_is_dense_attention() -> None:
    query, keys, values = constant_but_for_sinks()
    rows = Rows.full(2, 100)
    exact = REFERENCE.attend_all(query.double(), keys.double(), values.double(), None, 0.25)
    far = decode_step(query, layer_with(keys, values, policy="oracle", far_field=1.0), rows, 0.25).output
    without = decode_step(query, layer_with(keys, values, policy="oracle"), rows, 0.25).output
    torch.testing.assert_close(far.double(), exact, rtol=1e-5, atol=1e-5)
    assert float((without.double() - exact).norm()) > 0.05 * float(exact.norm())


def test_with_every_token_read_it_changes_nothing() -> None:
    query, keys, values = constant_but_for_sinks()
    outputs = [
        decode_step(query, layer_with(keys, values, threshold=1e-30, far_field=far), Rows.full(2, 100), 0.25).output
        for far in (0.0, 1.0)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_the_mean_of_a_packed_cache_does_not_depend_on_which_tokens_are_whole(kv_dtype) -> None:
    keys, values, means = randn(0, 1, 2, 160, 16), randn(1, 1, 2, 160, 16), []
    for ahead in (0, 60):
        buffer = KVBuffer(kv_dtype)
        buffer.append(keys[:, :, : 100 + ahead], values[:, :, : 100 + ahead])
        # further back than there are whole tokens to go back to: fewer are whole
        buffer.truncate(100)
        means.append(FarField(2).add(torch.zeros(1, 2, 16), torch.ones(1, 2), buffer.values, Rows.full(1, 100)))
    assert torch.equal(*means)


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda one: one.name)
@pytest.mark.parametrize(("group", "tokens"), [(1, 90), (3, 90), (3, 17000)])
def test_shares_of_heads_are_the_definitions_and_average_to_the_groups(kernels, group, tokens, request) -> None:
    if kernels is CPU:
        request.getfixturevalue("compiled_library")
    query, keys = 2 * randn(0, 1, 2 * group, 64), randn(1, 1, 2, tokens, 64)
    regions = Rows.full(1, tokens).regions(4, 16, keys.device)
    sketch = coded(keys, fit(keys))
    _, _, chosen = kernels.step(query, keys, randn(2, *keys.shape), sketch, regions, 8, 1e-3, 0.125)
    of_group = chosen.head_missing.unflatten(1, (2, group)).mean(-1)
    # a sieve estimates the normaliser from one block in eight
    slack = 1e-5 if tokens < 16384 else 0.03
    torch.testing.assert_close(of_group, chosen.missing_mass, rtol=0, atol=1e-5)
    logits = REFERENCE.score(query, sketch, regions.low, regions.high, 0.125)
    near = regions.near[:, None].expand(-1, 2, -1)
    near_lse = REFERENCE.exact_logits(query, keys, near, 0.125).logsumexp(-1)
    shares = (logits - torch.logaddexp(logits.logsumexp(-1), near_lse).unsqueeze(-1)).exp()
    for head in range(2):
        taken = chosen.tokens[0, head, : chosen.counts[0, head]] - regions.low
        left = shares[0, head].sum(-1) - shares[0, head][:, taken].sum(-1)
        torch.testing.assert_close(chosen.head_missing[0, head * group : (head + 1) * group], left, rtol=0, atol=slack)


@given(st.integers(20, 60), st.integers(1, 30), st.integers(0, 25))
def test_the_mean_is_a_function_of_the_values_alone(tokens: int, more: int, back: int) -> None:
    values, rows = randn(5, 1, 2, tokens + more, 8), Rows.full(1, tokens + more - back)
    output, missing = randn(6, 1, 4, 8), torch.rand(1, 4, generator=torch.Generator().manual_seed(1))
    grown, fresh = FarField(2), FarField(2)
    grown.add(output, missing, values[:, :, :tokens], Rows.full(1, tokens))
    grown.add(output, missing, values, Rows.full(1, tokens + more))
    grown.truncate(tokens + more - back)
    kept = values[:, :, : tokens + more - back]
    assert torch.equal(grown.add(output, missing, kept, rows), fresh.add(output, missing, kept, rows))


def test_a_padded_row_gets_what_it_gets_alone() -> None:
    keys, values, query = randn(1, 2, 2, 80, 16), randn(2, 2, 2, 80, 20), randn(0, 2, 6, 16)
    mask = left_padded(50, 80)
    together = decode_step(query, layer_with(keys, values, Rows.from_mask(mask), far_field=1.0),
                           Rows.from_mask(mask), 0.25).output  # fmt: skip
    alone = decode_step(query[:1], layer_with(keys[:1, :, 30:], values[:1, :, 30:], far_field=1.0),
                        Rows.full(1, 50), 0.25).output  # fmt: skip
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


def test_rows_take_their_mean_along() -> None:
    keys, values, query = randn(1, 2, 2, 80, 16), randn(2, 2, 2, 80, 20), randn(0, 2, 6, 16)
    layer = layer_with(keys, values, far_field=1.0)
    before = decode_step(query, layer, Rows.full(2, 80), 0.25).output
    layer.take_rows(torch.tensor([1, 0]))
    after = decode_step(query.flip(0), layer, Rows.full(2, 80), 0.25).output
    torch.testing.assert_close(after, before.flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_packed_values_have_the_mean_of_what_is_or_will_be_stored(kv_dtype: str) -> None:
    layer = layer_with(randn(1, 1, 2, 80, 16), randn(2, 1, 2, 80, 16), kv_dtype=kv_dtype, far_field=1.0)
    output, missing = torch.zeros(1, 6, 16), torch.ones(1, 6)
    found = FarField(2).add(output, missing, layer.buffer.values, Rows.full(1, 80))
    stored = plain(settled(layer.buffer.values))[:, :, 2 : fit_length(80)].mean(2)
    torch.testing.assert_close(found.unflatten(1, (2, 3)), stored.unsqueeze(2).expand(-1, -1, 3, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_generation_goes_back_and_forth_as_a_fresh_one() -> None:
    config = AttentionConfig(**{**SMALL, "far_field": 1.0})
    model = enable(build("llama"), config)
    ids = prompt(1, 90)[0]
    straight, _ = replay(model, config, [(ids[:60], ids[60:])])
    _, cache = replay(model, config, [(ids[:60], ids[60:80])])
    cache.crop(-10)
    again = torch.cat([model(one[None], past_key_values=cache).logits[0] for one in ids[70:].split(1)])
    torch.testing.assert_close(again, straight[-20:], rtol=1e-4, atol=1e-4)


def test_it_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="policy 'quest' has none"):
        AttentionConfig(policy="quest", far_field=1.0)
    with pytest.raises(ConfigError, match="number from 0 "):
        AttentionConfig(far_field=1.5)
    layer = layer_with(randn(1, 1, 2, 80, 16), randn(2, 1, 2, 80, 16), far_field=1.0, backend="triton")
    with pytest.raises(BackendError, match="far_field"):
        decode_step(randn(0, 1, 6, 16), layer, Rows.full(1, 80), 0.25)
