"""Triton's exact attention over listed tokens: as accurate as PyTorch, whatever is listed."""

import math

import pytest
import torch
from cases import SEEDS, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import GROUPS, assert_as_accurate_as_pytorch, assert_lse_is_exact, each_dtype, exact
from test_cpu_tensors import strided
from torch import Tensor
from triton_cases import TRITON, home, laws_of_kernels, on

from sparse_attention_decoder.errors import ShapeError

SCALING = 0.3

pytestmark = laws_of_kernels


def shuffled(seed: int, *shape: int, most: int) -> Tensor:
    """Positions below `most`, any of them, some twice."""
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))


def assert_attends_as_defined(
    query: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, valid: Tensor | None, device: torch.device
) -> None:
    found, lse = home(TRITON.attend(*on(device, (query, keys, values, tokens, valid)), SCALING))
    counts = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    own = [x.gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])) for x in (keys, values)]
    assert_as_accurate_as_pytorch(found, query, *own, counts, SCALING)
    assert_lse_is_exact(lse, exact(query, *own, counts, SCALING)[1], query.shape[-1])
    nothing = ~counts.any(-1).repeat_interleave(query.shape[1] // keys.shape[1], 1)
    assert found[nothing].eq(0).all()
    assert lse[nothing].eq(-math.inf).all()


@each_dtype
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_attention_is_as_accurate_as_pytorch_for_every_group_and_head_size(device, dim, dtype):
    for group in GROUPS:
        keys, values = (randn(group + n, 1, 2, 70, dim, dtype=dtype) for n in range(2))
        query = 2 * dim**-0.5 * randn(group + 2, 1, 2 * group, dim, dtype=dtype)
        assert_attends_as_defined(query, keys, values, shuffled(group, 1, 2, 70, most=70), None, device)


@each_dtype
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 16), (16, 96), (80, 24), (24, 256), (248, 128)])
def test_values_may_have_another_width_than_keys(device, dtype, dim, value_dim):
    keys, values = randn(0, 2, 1, 90, dim, dtype=dtype), randn(1, 2, 1, 90, value_dim, dtype=dtype)
    query, valid = randn(2, 2, 3, dim, dtype=dtype), randn(3, 2, 1, 90) < 0.5
    assert_attends_as_defined(query, keys, values, shuffled(0, 2, 1, 90, most=90), valid, device)


@each_dtype
@pytest.mark.parametrize("listed", [0, 1, 63, 64, 65, 200])
def test_lists_of_any_length_marked_or_not_are_read(device, dtype, listed):
    keys, values = randn(0, 2, 2, 40, 24, dtype=dtype), randn(1, 2, 2, 40, 32, dtype=dtype)
    query, tokens = randn(2, 2, 6, 24, dtype=dtype), shuffled(listed, 2, 2, listed, most=40)
    valid = randn(listed, 2, 2, listed) < 0.5
    # one head whose whole list does not count
    valid[1, 0] = False
    for marks in (None, valid, torch.zeros_like(valid)):
        assert_attends_as_defined(query, keys, values, tokens, marks, device)


@settings(max_examples=25)
@given(st.integers(1, 2), st.integers(1, 2), st.sampled_from(GROUPS), st.integers(0, 130), st.booleans(), SEEDS)
@example(1, 1, 1, 130, True, 0)
def test_attention_over_random_lists_is_as_accurate_as_pytorch(device, batch, heads, group, listed, marked, seed):
    keys, values = (randn(seed + n, batch, heads, 40, 24) for n in range(2))
    query, tokens = randn(seed + 2, batch, heads * group, 24), shuffled(seed, batch, heads, listed, most=40)
    valid = randn(seed, batch, heads, listed) < randn(seed + 1, batch, heads, 1) if marked else None
    assert_attends_as_defined(query, keys, values, tokens, valid, device)


@each_dtype
def test_a_list_that_several_programs_share_is_read_as_a_whole(device, dtype):
    # the largest logit lies in one share, another share counts nothing, and the last is cut short
    keys, values, query = (randn(n, 1, 1, size, 64, dtype=dtype) for n, size in enumerate((700, 700, 3)))
    keys[0, 0, 430] = 2 * query[0, 0, 0]
    valid = torch.ones(1, 1, 700, dtype=torch.bool)
    valid[..., 90:300] = False
    assert_attends_as_defined(query[:, 0], keys, values, torch.arange(700).expand(1, 1, -1), valid, device)


@each_dtype
def test_the_order_of_the_list_matters_only_to_rounding(device, dtype):
    keys, values = (randn(n, 1, 2, 150, 64, dtype=torch.float64).to(dtype) for n in range(2))
    query, order = randn(2, 1, 8, 64, dtype=dtype) / 8, torch.randperm(150, generator=torch.Generator().manual_seed(0))
    results = [
        home(TRITON.attend(*on(device, (query, keys, values, tokens.expand(1, 2, -1))), None, SCALING))
        for tokens in (torch.arange(150), order)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-6)


def test_logits_far_apart_do_not_overflow(device):
    keys, query = 100 * randn(0, 1, 1, 70, 16), 100 * randn(1, 1, 2, 16)
    output, lse = TRITON.attend(*on(device, (query, keys, keys, torch.arange(70).expand(1, 1, -1))), None, SCALING)
    assert output.isfinite().all()
    assert lse.isfinite().all()


@each_dtype
def test_views_with_any_strides_give_what_contiguous_tensors_give_bit_for_bit(device, dtype):
    keys, values = randn(0, 2, 2, 70, 24, dtype=dtype), randn(1, 2, 2, 70, 32, dtype=dtype)
    query, tokens = randn(2, 2, 6, 24, dtype=dtype), torch.arange(70).flip(0).expand(2, 2, -1)
    valid = tokens % 3 > 0
    query, keys, values, tokens, valid = on(device, (query, keys, values, tokens.contiguous(), valid))
    expected = TRITON.attend(query, keys, values, tokens, valid, SCALING)
    with device:
        views = zip(strided(query), strided(keys), reversed(strided(values)), strict=True)
        other, wide = torch.stack([tokens] * 2, -1)[..., 0], torch.stack([valid, ~valid], -1)[..., 0]
        for q, k, v in views:
            assert not any(x.is_contiguous() for x in (k, v, other, wide))
            for ours, theirs in zip(TRITON.attend(q, k, v, other, wide, SCALING), expected, strict=True):
                assert torch.equal(ours, theirs)


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_damage_shows_in_the_output_as_it_does_densely(device, dtype, bad, where):
    tensors = {name: randn(n, 1, 2, size, 24, dtype=dtype) for n, (name, size) in
               enumerate({"query": 3, "keys": 70, "values": 70}.items())}  # fmt: skip
    tensors[where][0, 0, 1, 3] = bad
    query, keys, values = tensors["query"].flatten(1, 2), tensors["keys"], tensors["values"]
    grouped = query.double().unflatten(1, (2, -1))
    dense = ((SCALING * grouped @ keys.double().mT).softmax(-1) @ values.double()).flatten(1, 2)
    tokens = torch.arange(70).expand(1, 2, -1)
    output, _ = home(TRITON.attend(*on(device, (query, keys, values, tokens)), None, SCALING))
    sound = dense.isfinite()
    assert torch.equal(output.isfinite(), sound)
    torch.testing.assert_close(output[sound].double(), dense[sound], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("where", ["keys", "values"])
def test_tokens_that_are_not_listed_or_do_not_count_are_not_read(device, where):
    keys, values, query = randn(0, 1, 2, 90, 24), randn(1, 1, 2, 90, 24), randn(2, 1, 6, 24)
    tokens, valid = torch.arange(10, 80).expand(1, 2, -1), torch.arange(70).expand(1, 2, -1) % 7 != 3
    expected = TRITON.attend(*on(device, (query, keys, values, tokens, valid)), SCALING)
    damaged = {"keys": keys, "values": values}[where]
    damaged[:, :, :10] = damaged[:, :, 80:] = math.nan
    damaged[:, :, tokens[0, 0][~valid[0, 0]]] = math.inf
    found = TRITON.attend(*on(device, (query, keys, values, tokens, valid)), SCALING)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


KEYS, QUERY, TOKENS = torch.zeros(2, 2, 20, 24), torch.zeros(2, 4, 24), torch.zeros(2, 2, 3, dtype=torch.int64)
MISFITS = {
    "not all of the 20 cached": {"tokens": TOKENS + 20},
    "tokens -1 to": {"tokens": TOKENS - 1},
    "tokens is torch.int32": {"tokens": TOKENS.int()},
    r"tokens is .*\(2, 1, 3\)": {"tokens": TOKENS[:, :1]},
    "valid is torch.uint8": {"valid": torch.ones(2, 2, 3, dtype=torch.uint8)},
    r"valid is .*\(2, 2, 2\)": {"valid": torch.ones(2, 2, 2, dtype=torch.bool)},
    "expected one dtype": {"query": QUERY.half()},
    "do not share 2 KV heads evenly": {"query": torch.zeros(2, 3, 24)},
    "do not fit": {"query": QUERY[:1]},
    r"expected \[B, Hq, D\], \[B, Hkv, T, D\]": {"values": KEYS[:, :, :19]},
    "D and Dv multiples of 8": {"values": KEYS[..., :20]},
    "keys are torch.float64": {"keys": KEYS.double()},
    "257 query heads share a KV head": {"query": torch.zeros(2, 514, 24)},
}


@pytest.mark.parametrize("reason", MISFITS)
def test_tensors_that_do_not_fit_together_are_refused(device, reason):
    case = {"query": QUERY, "keys": KEYS, "values": KEYS, "tokens": TOKENS, "valid": None, **MISFITS[reason]}
    with pytest.raises(ShapeError, match=reason):
        TRITON.attend(*on(device, tuple(case.values())), SCALING)
