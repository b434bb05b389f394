"""The compiled kernels, one by one: each against its definition, and as accurate as PyTorch."""

import math

import pytest
import torch
from cases import FLOATS, REFERENCE, SEEDS, coded, fit, randn, skewed_keys
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cache import ENDED, OPS, REGROWN, TRIMMED, check_sketch, new_sketch, run_history
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attention_decoder.errors import NonFiniteError
from sparse_attention_decoder.kernels import Coded, Request, Statistics, resolve
from sparse_attention_decoder.kernels.cpu import CpuKernels
from sparse_attention_decoder.selection import Rows

CPU = CpuKernels()
DIMS = (8, 24, 64, 80, 96, 128, 256)
GROUPS = (1, 3, 4, 7, 16)
EPS = 2.0**-23

pytestmark = pytest.mark.usefixtures("isa", "poison")

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_dim = pytest.mark.parametrize("dim", DIMS)


# --- coding


@each_dim
@each_dtype
def test_statistics_are_those_of_float64(dim, dtype):
    keys = skewed_keys(dim, 3, 77, dim, dtype=dtype)
    for ours, exact in zip(CPU.fit(keys), REFERENCE.fit(keys.double()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_statistics_of_no_keys_and_of_keys_that_never_varied_are_those_of_the_definition():
    for keys in (randn(0, 2, 0, 24), randn(0, 2, 1, 24).expand(2, 37, 24), torch.full((2, 90, 24), 1e4)):
        ours, theirs = CPU.fit(keys), REFERENCE.fit(keys)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
        assert ours[1].eq(1).all()
    # one channel of a power-of-two block that moves: the others get a hundredth of the typical deviation
    keys = torch.zeros(1, 50, 8)
    keys[0, :, :] = randn(1, 50, 1) * REFERENCE_ROW
    mean, deviation = CPU.fit(keys)
    torch.testing.assert_close(deviation, REFERENCE.fit(keys)[1], rtol=1e-4, atol=0)


# a vector that the rotation turns into a single channel
REFERENCE_ROW = torch.linalg.inv(torch.stack([REFERENCE.fit(vector.view(1, 1, 8))[0][0] for vector in torch.eye(8)]))[0]


@each_dim
@each_dtype
def test_codes_equal_those_of_the_definition_bit_for_bit_and_factors_to_the_last_place(dim, dtype):
    for start, tokens in ((0, 1), (0, 130), (5, 40), (15, 2), (16, 16), (17, 700)):
        keys = skewed_keys(dim + start, 2, 2, tokens, dim, dtype=dtype)
        ours, theirs = (Coded.room(start + tokens + 20, fit(keys)) for _ in range(2))
        for kernels, sketch in ((CPU, ours), (REFERENCE, theirs)):
            # what lies before and behind has to stay as it was
            sketch.codes.fill_(0xA5)
            sketch.factors.fill_(7.0)
            kernels.encode(keys, sketch, start)
        assert torch.equal(ours.codes, theirs.codes)
        places = ours.factors.view(torch.int16).int() - theirs.factors.view(torch.int16).int()
        assert places.abs().max() <= 1


def test_keys_far_out_and_keys_at_the_mean_are_coded_as_the_definition_says():
    keys = skewed_keys(0, 1, 1, 20, 64)
    statistics = fit(keys)
    far = torch.cat([keys * 1e-6, keys * 1e6, keys * 1e20, torch.zeros_like(keys)], 2)
    flat = Statistics(torch.zeros(1, 1, 64), torch.ones(1, 1, 64))
    for moments in (statistics, flat):
        ours, theirs = coded(far, moments, CPU), coded(far, moments)
        assert torch.equal(ours.codes, theirs.codes)
        torch.testing.assert_close(ours.factors, theirs.factors, rtol=2.0**-10, atol=2.0**-24)


@settings(max_examples=20)
@given(OPS, st.sampled_from([2, 3]), SEEDS, st.sampled_from(FLOATS))
@example(REGROWN, 2, 0, torch.float32)
@example(TRIMMED, 2, 0, torch.bfloat16)
@example(ENDED, 2, 0, torch.float16)
def test_a_sketch_is_bit_equal_to_a_fresh_one_whatever_happened_before(ops, rows, seed, dtype):
    mask = torch.ones(rows, 30, dtype=torch.bool)
    mask[1, :7] = False

    def check(*case: object) -> None:
        check_sketch(*case, kernels=CPU)

    run_history(lambda: new_sketch(CPU), check, ops, mask, 24, seed, dtype)


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("token", [0, 5, 39])
def test_a_key_that_is_not_finite_is_refused_by_the_sketch(dtype, bad, token):
    keys = randn(0, 1, 2, 40, 8, dtype=dtype)
    keys[0, 1, token, 3] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        new_sketch(CPU).catch_up(keys, Rows.full(1, 40), 40)


# --- scores


def assert_scores_equal(query: Tensor, sketch: Coded, low: int, high: int) -> None:
    """The same integers, so that only the few float operations on them may round apart."""
    ours, theirs = (kernels.score(query, sketch, low, high, 0.3) for kernels in (CPU, REFERENCE))
    assert (ours.shape, ours.dtype) == (theirs.shape, torch.float32)
    without_mean = Coded(
        sketch.codes,
        sketch.factors,
        Statistics(torch.zeros_like(sketch.statistics.mean), sketch.statistics.deviation),
    )
    plain, expected = (kernels.score(query, without_mean, low, high, 0.3) for kernels in (CPU, REFERENCE))
    torch.testing.assert_close(plain, expected, rtol=4 * EPS, atol=0)
    # the mean's share is a sum of D products, in any order
    heads, dim = sketch.codes.shape[1], query.shape[-1]
    terms = (
        0.3 * query.float().norm(dim=-1).unflatten(1, (heads, -1)) * sketch.statistics.mean.norm(dim=-1, keepdim=True)
    )
    limit = 8 * EPS * (plain.abs() + math.sqrt(dim) * terms.unsqueeze(-1))
    assert ((ours - theirs).abs() <= limit).all()


@each_dim
@each_dtype
def test_scores_are_those_of_the_definition_but_for_a_few_roundings(dim, dtype):
    for group in GROUPS:
        keys = skewed_keys(group, 2, 2, 130, dim, dtype=dtype)
        query = randn(dim + group, 2, 2 * group, dim, dtype=dtype)
        assert_scores_equal(query, coded(keys, fit(keys)), 3, 130)


@given(st.integers(0, 130), st.integers(0, 130), st.sampled_from(GROUPS), SEEDS)
@example(0, 0, 1, 0)
@example(130, 130, 1, 0)
def test_scores_of_every_stretch_are_those_of_the_definition(one, other, group, seed):
    keys, query = skewed_keys(seed, 2, 2, 130, 24), randn(seed, 2, 2 * group, 24)
    assert_scores_equal(query, coded(keys, fit(keys)), min(one, other), max(one, other))


def test_a_stretch_scores_what_it_scores_within_a_longer_one_bit_for_bit():
    keys, query = skewed_keys(0, 1, 2, 3000, 64), randn(1, 1, 6, 64)
    sketch = coded(keys, fit(keys))
    whole = CPU.score(query, sketch, 0, 3000, 0.125)
    assert_scores_equal(query, sketch, 0, 3000)
    for low, high in ((4, 2744), (255, 257), (2990, 3000), (1024, 2048)):
        assert torch.equal(CPU.score(query, sketch, low, high, 0.125), whole[..., low:high])


def test_a_query_of_zeros_scores_zero_and_one_of_nan_scores_nan():
    keys = skewed_keys(0, 1, 1, 20, 8)
    query = torch.stack([torch.zeros(8), torch.full((8,), math.nan)])[None]
    scores = CPU.score(query, coded(keys, fit(keys)), 0, 20, 1.0)
    assert scores[0, 0, 0].eq(0).all()
    assert scores[0, 0, 1].isnan().all()


# --- attention


def exact(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp in float64 over tokens that are `valid` [B, Hkv, T]; 0 and -inf where none is."""
    grouped = query.double().unflatten(1, (keys.shape[1], -1))
    logits = (scaling * grouped @ keys.double().mT).masked_fill(~valid.unsqueeze(2), -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return (weights @ values.double()).flatten(1, 2), lse.flatten(1, 2)


def assert_as_accurate_as_pytorch(
    found: Tensor, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scaling: float
) -> None:
    expected, _ = exact(query, keys, values, valid, scaling)
    assert (found.dtype, found.shape) == (query.dtype, expected.shape)
    plain = scaled_dot_product_attention(
        query.unflatten(1, (keys.shape[1], -1)), keys, values, attn_mask=valid.unsqueeze(2), scale=scaling
    ).flatten(1, 2)
    some = valid.any(-1).repeat_interleave(query.shape[1] // keys.shape[1], 1)
    worst = (plain.double() - expected)[some].abs().max().item() if some.any() else 0.0
    # the worst of a few numbers is a matter of luck, so one place of the largest value on top
    largest = values.abs().max().item() if values.numel() else 0.0
    error = (found.double() - expected).abs().max().item() if found.numel() else 0.0
    assert error <= 2 * worst + torch.finfo(query.dtype).eps * max(1.0, largest)


def assert_lse_is_exact(lse: Tensor, expected: Tensor, dim: int) -> None:
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isinf(), expected.isinf())
    real = ~expected.isinf()
    torch.testing.assert_close(lse[real].double(), expected[real], rtol=8 * EPS, atol=8 * EPS * dim**0.5)


def attend_both_ways(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """Dense attention, and attention over a shuffled list of all tokens, with [B, T] mask or none."""
    batch, heads, length, dim = keys.shape
    valid = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    wide, scaling = valid[:, None].expand(-1, heads, -1), dim**-0.5
    found = CPU.attend_all(query, keys, values, mask, scaling)
    assert_as_accurate_as_pytorch(found, query, keys, values, wide, scaling)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length)).expand(batch, heads, -1)
    listed = None if mask is None else wide.gather(-1, order)
    found, lse = CPU.attend(query, keys, values, order, listed, scaling)
    assert_as_accurate_as_pytorch(found, query, keys, values, wide, scaling)
    assert_lse_is_exact(lse, exact(query, keys, values, wide, scaling)[1], dim)


@each_dim
@each_dtype
def test_attention_is_as_accurate_as_pytorch_for_every_group_and_head_size(dim, dtype):
    for group in GROUPS:
        keys, values = (randn(group + n, 2, 2, 75, dim, dtype=dtype) for n in range(2))
        query = 2 * randn(group + 2, 2, 2 * group, dim, dtype=dtype)
        attend_both_ways(query, keys, values, None)
        attend_both_ways(query, keys, values, torch.arange(75) >= torch.tensor([[0], [31]]))


@each_dtype
def test_attention_is_as_accurate_as_pytorch_for_every_length(dtype):
    for length in range(131):
        keys, values = randn(0, 1, 2, length, 24, dtype=dtype), randn(1, 1, 2, length, 40, dtype=dtype)
        attend_both_ways(randn(2, 1, 6, 24, dtype=dtype), keys, values, None)


@each_dtype
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 8), (8, 96), (80, 24), (24, 256), (192, 128), (1024, 8)])
def test_values_may_have_another_width_than_keys(dtype, dim, value_dim):
    keys, values = randn(0, 2, 1, 700, dim, dtype=dtype), randn(1, 2, 1, 700, value_dim, dtype=dtype)
    attend_both_ways(randn(2, 2, 3, dim, dtype=dtype), keys, values, torch.rand(2, 700) > 0.3)


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from(GROUPS), st.integers(0, 130), st.sampled_from(FLOATS), SEEDS
)
def test_attention_over_random_lists_is_as_accurate_as_pytorch(batch, heads, group, listed, dtype, seed):
    keys, values = (randn(seed + n, batch, heads, 40, 24, dtype=dtype) for n in range(2))
    query = randn(seed + 2, batch, heads * group, 24, dtype=dtype)
    random = torch.Generator().manual_seed(seed)
    # a token may be listed twice, and a head may have none that counts
    tokens = torch.randint(0, 40, (batch, heads, listed), generator=random)
    valid = torch.rand(batch, heads, listed, generator=random) < torch.rand(batch, heads, 1, generator=random) - 0.2
    for which in (None, valid):
        found, lse = CPU.attend(query, keys, values, tokens, which, 0.3)
        counts = torch.ones_like(valid) if which is None else which
        own = [x.gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, 24)) for x in (keys, values)]
        assert_as_accurate_as_pytorch(found, query, *own, counts, 0.3)
        assert_lse_is_exact(lse, exact(query, *own, counts, 0.3)[1], 24)


# --- backends


@each_dtype
@pytest.mark.parametrize("dim", [*DIMS, 1024])
def test_auto_takes_the_compiled_kernels(dtype, dim):
    assert resolve("auto", Request(torch.device("cpu"), dtype, dim, 8)).name == "cpu"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(torch.device("meta"), torch.float32, 64), "device meta is not a CPU"),
        (Request(torch.device("cpu"), torch.float64, 64), "dtype torch.float64 is none of"),
        (Request(torch.device("cpu"), torch.float32, 20), "head_dim 20 is no multiple of 8"),
        (Request(torch.device("cpu"), torch.float32, 1032), "head_dim 1032 is no multiple of 8 up to 1024"),
        (Request(torch.device("cpu"), torch.float32, 64, 12), "head_dim 12 is no multiple of 8"),
    ],
)
def test_what_the_compiled_kernels_cannot_serve_is_refused_with_the_reason(request_, reason):
    assert reason in (CPU.refuses(request_) or "")
