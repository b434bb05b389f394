"""Keys and values in 8 and 4 bits: how they are stored, what a buffer does with them, and what kernels read of them."""

import math

import numpy as np
import pytest
import torch
from cases import (
    FLOATS,
    REFERENCE,
    SEEDS,
    assert_error_within,
    attention_over,
    chosen_sets,
    coded,
    fit,
    masks,
    randn,
    skewed_keys,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cache import MISFITS, OPS, check_sketch, pair, run_history
from torch import Tensor

from sparse_attention_decoder.cache import NEWEST_NAMES, KVBuffer, Sketch
from sparse_attention_decoder.cache.newest import BACK, ROOM, packed_of
from sparse_attention_decoder.errors import BackendError, ConfigError, NonFiniteError, ShapeError
from sparse_attention_decoder.kernels import Kernels, Packed, stored_bytes
from sparse_attention_decoder.kernels.cpu import CpuKernels, operations
from sparse_attention_decoder.kernels.rotation import rotate, unrotate
from sparse_attention_decoder.selection import Rows
from sparse_attention_decoder.tables import KV_BITS

DIMS = (8, 24, 64, 80, 96, 128, 256)
MOST = {"int8": 128, "int4": 8}

pytestmark = pytest.mark.usefixtures("poison")

each_kv_dtype = pytest.mark.parametrize("kv_dtype", KV_BITS)
each_dim = pytest.mark.parametrize("dim", DIMS)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def packed(x: Tensor, kv_dtype: str, kernels: Kernels = REFERENCE) -> Packed:
    stored = Packed.room(x, kv_dtype)
    kernels.pack(x, stored)
    return stored


def mixed(x: Tensor, kv_dtype: str, whole: int) -> Packed:
    """Packed but for the newest tokens."""
    first = x.shape[-2] - whole
    return packed(x[..., :first, :], kv_dtype).before(x[..., first:, :])


def steps_of(stored: Packed) -> np.ndarray:
    """Unpack by the documented layout: channel 2j in the low bits of byte j, channel 2j + 1 in the high ones."""
    codes = stored.codes.numpy().astype(int)
    if stored.codes.dtype == torch.int8:
        return codes
    return np.stack([(codes[..., c // 2] >> (4 * (c % 2))) % 16 - 8 for c in range(stored.shape[-1])], axis=-1)


# --- what is stored


@pytest.mark.parametrize("dim", [1, 3, 20, *DIMS])
def test_unrotating_undoes_a_rotation(dim):
    x = randn(dim, 2, 3, dim, dtype=torch.float64)
    torch.testing.assert_close(unrotate(rotate(x)), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotate(unrotate(x)), x, rtol=0, atol=1e-14)


@each_kv_dtype
@each_dim
@each_dtype
def test_what_is_stored_is_within_half_a_step_of_the_rotated_channel(kv_dtype, dim, dtype):
    x = skewed_keys(dim, 2, 2, 9, dim, dtype=dtype)
    stored, turned = packed(x, kv_dtype), rotate(x)
    steps, size = torch.from_numpy(steps_of(stored)), stored.scales.float().unsqueeze(-1)
    assert (stored.shape, stored.ndim, stored.dtype, stored.bits) == (x.shape, 4, dtype, KV_BITS[kv_dtype])
    assert stored.nbytes == 36 * stored_bytes(dim, kv_dtype, dtype)
    assert torch.equal(stored.rotated(), steps * size)
    # the largest channel is the lowest number; one as large on the other side is a step off
    assert steps.amin(-1).eq(-MOST[kv_dtype]).all()
    off = (stored.rotated() - turned).abs()
    bound = torch.where(turned / size > MOST[kv_dtype] - 1, 1.0, 0.5) * size.abs() * 1.01
    assert (off <= bound).all()
    assert_error_within(
        stored.unpack(),
        unrotate(stored.rotated().double()),
        1e-6 + float(x.abs().max()) * 2e-7 if dtype == torch.float32 else float(x.abs().max()) * 2**-7,
    )


@each_kv_dtype
def test_nothing_is_stored_as_nothing_and_what_is_not_finite_as_nan(kv_dtype):
    x = torch.zeros(1, 1, 5, 8)
    x[0, 0, 1], x[0, 0, 2, 3], x[0, 0, 3, 0] = 1e-30, math.nan, -math.inf
    x[0, 0, 4] = 3e38
    numbers = packed(x, kv_dtype).unpack()[0, 0]
    assert numbers[:2].eq(0).all()
    assert numbers[2:].isnan().all()


@each_kv_dtype
def test_views_and_selections_of_packed_tokens_are_those_of_the_tensor(kv_dtype):
    x = packed(randn(0, 3, 2, 7, 8), kv_dtype)
    whole = x.unpack()
    assert torch.equal(x[:, :, 2:5].unpack(), whole[:, :, 2:5])
    assert torch.equal(x[1].unpack(), whole[1])
    assert torch.equal(x[:, 1, None].unpack(), whole[:, 1, None])
    assert torch.equal(x.index_select(2, torch.tensor([6, 0])).unpack(), whole[:, :, [6, 0]])
    x[:, :, 2:5].codes.zero_()
    assert not torch.equal(x.unpack(), whole)


# --- a buffer of them


def stored_like(buffer: KVBuffer, keys: Tensor, values: Tensor, first: int | None = None) -> None:
    """The buffer holds these: packed up to `first`, where that depends on their number alone, and whole from there."""
    first = packed_of(keys.shape[2]) if first is None else first
    assert buffer.whole == keys.shape[2] - first
    for held, plain, x in ((buffer.keys, buffer.plain_keys, keys), (buffer.values, buffer.plain_values, values)):
        expected = packed(x[:, :, :first], buffer.kv_dtype)
        assert (held.dtype, held.shape) == (x.dtype, x.shape)
        assert torch.equal(held.codes, expected.codes)
        assert torch.equal(held.scales, expected.scales)
        assert torch.equal(held.newest, x[:, :, first:])
        assert torch.equal(plain, torch.cat([expected.unpack(), x[:, :, first:]], 2))


def buffer_of(kv_dtype: str | None, keys: Tensor, values: Tensor) -> KVBuffer:
    buffer = KVBuffer(kv_dtype)
    buffer.append(keys, values)
    return buffer


@each_kv_dtype
@each_dtype
@settings(max_examples=10)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=9))
@example([1] * 200)
@example([300, 1, 40, 40])
def test_tokens_appended_in_pieces_are_stored_as_tokens_appended_at_once(kv_dtype, dtype, pieces):
    keys, values = (both.to(dtype) for both in pair(sum(pieces)))
    buffer = KVBuffer(kv_dtype)
    for key_piece, value_piece in zip(keys.split(pieces, 2), values.split(pieces, 2), strict=True):
        buffer.append(key_piece, value_piece)
    stored_like(buffer, keys, values)


@each_kv_dtype
def test_a_packed_buffer_truncates_takes_rows_and_resets(kv_dtype):
    keys, values = pair(150, rows=3)
    more = pair(80, rows=4, seed=7)
    buffer = buffer_of(kv_dtype, keys, values)
    buffer.truncate(145)
    buffer.take_rows(torch.tensor([2, 0, 0, 1]))
    buffer.append(*more)
    rows = [2, 0, 0, 1]
    stored_like(buffer, torch.cat([keys[rows, :, :145], more[0]], 2), torch.cat([values[rows, :, :145], more[1]], 2))
    buffer.take_rows(torch.tensor([3, 2, 1, 0]))
    assert buffer.shape == (4, 2, 225, 4)
    buffer.reset()
    assert (buffer.is_allocated, buffer.length, buffer.capacity, buffer.tensors()) == (False, 0, 0, {})
    buffer.append(keys, values)
    stored_like(buffer, keys, values)


@each_kv_dtype
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 150), st.integers(0, BACK)), min_size=1, max_size=6))
@example([(95, 0), (1, 1), (1, 0)])
def test_going_back_a_little_is_as_never_having_been_further(kv_dtype, steps):
    buffer, held, furthest = KVBuffer(kv_dtype), pair(0), 0
    for seed, (more, undone) in enumerate(steps):
        new = pair(more, seed=seed)
        buffer.append(*new)
        furthest = max(furthest, buffer.length)
        length = max(0, buffer.length - undone, furthest - BACK)
        held = tuple(torch.cat(both, 2)[:, :, :length] for both in zip(held, new, strict=True))
        buffer.truncate(length)
        stored_like(buffer, *held)


@each_kv_dtype
@given(st.integers(0, 300), st.integers(1, 120))
def test_going_back_far_leaves_what_was_packed_packed(kv_dtype, length, more):
    keys, values = pair(300)
    buffer = buffer_of(kv_dtype, keys, values)
    buffer.truncate(length)
    first = min(length, max(packed_of(length), packed_of(300) - BACK))
    stored_like(buffer, keys[:, :, :length], values[:, :, :length], first)
    new = pair(more, seed=3)
    for at in range(more):
        buffer.append(*(x[:, :, at : at + 1] for x in new))
    keys, values = (torch.cat([old[:, :, :length], x], 2) for old, x in zip((keys, values), new, strict=True))
    stored_like(buffer, keys, values, max(first, packed_of(length + more)))


@each_kv_dtype
@settings(max_examples=40)
@given(st.integers(1, 200), st.data())
def test_heads_that_keep_different_tokens_hold_those(kv_dtype, tokens, data):
    keys, values = pair(tokens, rows=1)
    buffer = buffer_of(kv_dtype, keys, values)
    first, count = packed_of(tokens), data.draw(st.integers(1, tokens))
    near = data.draw(st.integers(0, count))
    keep = [sorted(data.draw(st.permutations(range(tokens - near)))[: count - near]) for _ in range(2)]
    keep = torch.tensor([[[*own, *range(tokens - near, tokens)] for own in keep]])
    buffer.take_tokens(keep, tokens + 7)
    assert (buffer.length, buffer.evicted, buffer.capacity) == (count, tokens - count, tokens + 7)
    for plain, x in ((buffer.plain_keys, keys), (buffer.plain_values, values)):
        rounded = packed(x, kv_dtype).unpack()
        # as many are whole as are left in every head
        assert buffer.whole == min(int((own >= first).sum()) for own in keep[0])
        for head, own in enumerate(keep[0]):
            split = count - buffer.whole
            assert torch.equal(plain[0, head, :split], rounded[0, head, own[:split]])
            assert torch.equal(plain[0, head, split:], x[0, head, own[split:]])
    buffer.append(*pair(100, rows=1, seed=9))
    assert buffer.whole == count + 100 - packed_of(count + 100)


@each_kv_dtype
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_packed_buffer_refuses_what_a_plain_one_refuses(kv_dtype, misfit):
    keys, values = pair(5)
    buffer = buffer_of(kv_dtype, keys, values)
    with pytest.raises(ShapeError, match=r"cache holds|do not match"):
        buffer.append(*MISFITS[misfit])
    stored_like(buffer, keys, values)


@pytest.mark.parametrize("kv_dtype", [None, *KV_BITS])
def test_what_is_stored_is_listed_with_tokens_as_the_third_axis(kv_dtype):
    buffer = buffer_of(kv_dtype, *pair(150))
    listed = buffer.tensors()
    whole = {name: x.shape[2] for name, x in listed.items() if name in NEWEST_NAMES}
    assert whole == (dict.fromkeys(NEWEST_NAMES, buffer.whole) if kv_dtype else {})
    assert {x.shape[:3] for name, x in listed.items() if name not in whole} == {(2, 2, 150 - buffer.whole)}
    assert buffer.token_bytes(None) == (4 + 6) * 4
    held = (150 - buffer.whole) * buffer.token_bytes(buffer.kv_dtype) + buffer.whole * buffer.token_bytes(None)
    assert sum(x.nbytes for x in listed.values()) == 2 * 2 * held
    listed["keys"].zero_()
    assert buffer.plain_keys[:, :, : 150 - buffer.whole].eq(0).all() == (kv_dtype != "int4")


@pytest.mark.parametrize("kv_dtype", [None, *KV_BITS])
@pytest.mark.parametrize("held", [0, 3])
def test_room_reserved_is_room_in_which_nothing_moves(kv_dtype, held):
    buffer = KVBuffer(kv_dtype)
    if held:
        buffer.append(*pair(held))
    buffer.reserve(50)
    buffer.append(*pair(7))
    places = {name: x.data_ptr() for name, x in buffer.tensors().items()}
    assert buffer.capacity == 50
    for _ in range(43 - held):
        buffer.append(*pair(1))
    assert {name: x.data_ptr() for name, x in buffer.tensors().items()} == places
    buffer.append(*pair(1))
    assert buffer.capacity == 75
    buffer.reserve(10)
    assert (buffer.capacity, buffer.length) == (75, 51)
    buffer.reset()
    buffer.append(*pair(4))
    assert buffer.capacity == 6


@pytest.mark.parametrize("path", [["int8"], ["int4"], ["int8", "int4"]], ids=str)
@each_dtype
def test_a_converted_buffer_holds_what_was_held_in_fewer_bits(path, dtype):
    keys, values = (x.to(dtype) for x in pair(5000, dim=8))
    buffer = buffer_of(None, keys, values)
    for kv_dtype in path:
        keys, values, capacity = buffer.plain_keys, buffer.plain_values, buffer.capacity
        buffer.convert(kv_dtype)
        stored_like(buffer, keys, values)
        assert buffer.capacity == capacity
    more = pair(3, dim=8)
    buffer.append(*(x.to(dtype) for x in more))
    assert buffer.shape == (2, 2, 5003, 8)


def test_an_empty_buffer_converts_and_a_buffer_does_not_convert_to_as_many_bits_or_more():
    buffer = KVBuffer()
    buffer.convert("int8")
    buffer.append(*pair(3))
    stored_like(buffer, *pair(3))
    for kv_dtype in ("int8", "int2"):
        with pytest.raises(ConfigError, match="it converts to int4"):
            buffer.convert(kv_dtype)
    buffer.convert("int4")
    with pytest.raises(ConfigError, match="nothing smaller"):
        buffer.convert("int8")


@each_kv_dtype
def test_a_backend_that_reads_no_packed_cache_refuses_it_before_anything_is_stored(kv_dtype):
    buffer = KVBuffer(kv_dtype, "triton")
    with pytest.raises(BackendError, match=f"{kv_dtype} are read by the backends cpu and reference alone"):
        buffer.append(*pair(3))
    assert not buffer.is_allocated


def test_four_bits_of_an_odd_number_of_channels_are_refused():
    with pytest.raises(BackendError, match="two channels in a byte"):
        KVBuffer("int4", "reference").append(*pair(3, dim=5))
    KVBuffer("int8", "reference").append(*pair(3, dim=5))


@each_kv_dtype
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_a_buffer_takes_over_what_another_listed_with_or_without_newest_tokens(kv_dtype, tokens):
    keys, values = pair(tokens, dim=8)
    buffer, other = buffer_of(kv_dtype, keys, values), KVBuffer()
    other.adopt(buffer.tensors(), tokens, torch.float32)
    stored_like(other, keys, values)
    more = pair(100, dim=8, seed=5)
    other.append(*more)
    stored_like(other, torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2))
    # as files were before there were any
    stored = {"keys": (a := packed(keys, kv_dtype)).codes, "key_scales": a.scales}
    stored |= {"values": (b := packed(values, kv_dtype)).codes, "value_scales": b.scales}
    other.adopt(stored, tokens, torch.float32)
    stored_like(other, keys, values, tokens)
    with pytest.raises(ShapeError, match="no room for"):
        other.adopt(buffer.tensors(), tokens + 1, torch.float32)
    listed = {**buffer.tensors(), **dict.fromkeys(NEWEST_NAMES, randn(0, 2, 2, ROOM + 1, 8))}
    with pytest.raises(ShapeError, match="at most"):
        other.adopt(listed, tokens, torch.float32)


@each_kv_dtype
@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(0, 40), st.data())
def test_views_and_selections_of_tokens_partly_whole_are_those_of_the_tensor(kv_dtype, stored, whole, data):
    x = mixed(randn(0, 2, 3, stored + whole, 8), kv_dtype, whole)
    plain, low = x.unpack(), data.draw(st.integers(0, stored + whole))
    high = data.draw(st.integers(low, stored + whole))
    assert (x.shape, x.whole) == (plain.shape, whole)
    for index in ((slice(None), slice(None), slice(low, high)), (1, 2, slice(low, None)), (1,), (slice(0, 1),),
                  (slice(None), 1, None, slice(None, high))):  # fmt: skip
        assert torch.equal(x[index].unpack(), plain[index])
    picked = torch.arange(low, high)
    assert torch.equal(x[1].index_select(1, picked).unpack(), plain[1].index_select(1, picked))
    assert torch.equal(x.index_select(0, torch.tensor([1, 1])).unpack(), plain[[1, 1]])
    torch.testing.assert_close(x.rotated(), rotate(plain), rtol=1e-5, atol=1e-5)
    settled = x.settled()
    assert torch.equal(settled.unpack()[:, :, :stored], plain[:, :, :stored])
    assert torch.equal(settled.unpack()[:, :, stored:], packed(plain[:, :, stored:], kv_dtype).unpack())


# --- the sketch of packed keys


@each_kv_dtype
@settings(max_examples=10)
@given(OPS, SEEDS, st.sampled_from(FLOATS))
def test_a_sketch_of_packed_keys_is_a_function_of_what_is_stored(kv_dtype, ops, seed, dtype):
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :7] = False

    class OfPacked(Sketch):
        def catch_up(self, keys: Tensor, rows: Rows, needed: int) -> None:
            super().catch_up(packed(keys, kv_dtype), rows, needed)

    def check(index: Sketch, keys: Tensor, rows: Rows, needed: int) -> None:
        check_sketch(index, packed(keys, kv_dtype), rows, needed)

    run_history(lambda: OfPacked(REFERENCE, 2), check, ops, mask, 16, seed, dtype)


@each_kv_dtype
def test_a_packed_key_is_coded_as_the_rotated_numbers_it_is_stored_as(kv_dtype):
    keys = skewed_keys(0, 2, 2, 40, 24)
    stored = packed(keys, kv_dtype)
    statistics, near = fit(stored), coded(stored, fit(stored))
    mean = stored.rotated().mean(2)
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-5, atol=1e-5)
    # unrotated and rotated again it is the same but for rounding
    plain = coded(stored.unpack(), statistics)
    assert (plain.codes != near.codes).float().mean() < 0.01


@pytest.mark.parametrize("kernels", [REFERENCE, CpuKernels()], ids=["reference", "cpu"])
@each_kv_dtype
def test_a_key_that_is_still_whole_is_coded_as_it_will_be_stored(kv_dtype, kernels):
    keys = skewed_keys(0, 2, 2, 100, 24)
    early, late = mixed(keys, kv_dtype, 70), packed(keys, kv_dtype)
    for ours, theirs in zip(kernels.fit(early[0]), kernels.fit(late[0]), strict=True):
        assert torch.equal(ours, theirs)
    statistics = fit(late)
    ours, theirs = coded(early, statistics, kernels), coded(late, statistics, kernels)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.factors, theirs.factors)
    part = coded(late, statistics, kernels)
    part.codes[:, :, 20 // 16 :], part.factors[:, :, 20:] = 0, 0
    kernels.encode(early[:, :, 16:], part, 16)
    assert torch.equal(part.codes, theirs.codes)


@each_kv_dtype
def test_packed_keys_that_are_not_finite_are_refused(kv_dtype):
    keys = randn(0, 1, 2, 40, 8)
    keys[0, 1, 17, 3] = math.inf
    with pytest.raises(NonFiniteError):
        Sketch(REFERENCE, 2).catch_up(packed(keys, kv_dtype), Rows.full(1, 40), 40)


# --- what kernels read of them


def check_reads(
    kernels: Kernels, kv_dtype: str, dtype: torch.dtype, dim: int, group: int, tokens: int, whole: int
) -> None:
    """Attention to all, to the valid and to listed tokens, against float64 over the numbers that are stored."""
    value_dim = dim + 8
    query = randn(0, 2, 2 * group, dim, dtype=dtype)
    whole = min(whole, tokens)
    keys = mixed(skewed_keys(1, 2, 2, tokens, dim, dtype=dtype), kv_dtype, whole)
    values = mixed(randn(2, 2, 2, tokens, value_dim, dtype=dtype), kv_dtype, whole)
    exact_keys, exact_values = (
        torch.cat([unrotate(x[:, :, : tokens - whole].settled().rotated().double()), x.newest.double()], 2)
        for x in (keys, values)
    )
    scaling = dim**-0.5
    # logits of float32 grow with the keys, and with them what rounding does to a weight
    wide = 1e-5 if dtype == torch.float32 else 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    valid = randn(3, 2, tokens) > 0
    valid[0, 0] = True
    listed = torch.stack(
        [torch.randperm(tokens, generator=torch.Generator().manual_seed(n))[: tokens // 2 + 1] for n in range(4)]
    )
    listed, counts = listed.view(2, 2, -1), randn(4, 2, 2, tokens // 2 + 1) > 0

    def check(output: Tensor, chosen: list[list[set[int]]], lse: Tensor | None = None) -> None:
        exact, exact_lse = attention_over(query, exact_keys, exact_values, chosen, scaling)
        assert output.dtype == dtype
        assert_error_within(output, exact, wide * (1 + float(exact.abs().max())) * 4)
        if lse is not None:
            torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)

    everything = [[set(range(tokens))] * 2] * 2
    check(kernels.attend_all(query, keys, values, None, scaling), everything)
    real = [[set(row.nonzero().flatten().tolist())] * 2 for row in valid]
    check(kernels.attend_all(query, keys, values, valid, scaling), real)
    output, lse = kernels.attend(query, keys, values, listed, None, scaling)
    check(output, [[set(head.tolist()) for head in row] for row in listed], lse)
    output, lse = kernels.attend(query, keys, values, listed, counts, scaling)
    pairs = zip(listed, counts, strict=True)
    check(output, [[set(h[c].tolist()) for h, c in zip(heads, own, strict=True)] for heads, own in pairs], lse)
    output, lse = kernels.attend(query, keys, values, listed[..., :0], None, scaling)
    assert output.eq(0).all()
    assert lse.eq(-math.inf).all()
    logits = kernels.exact_logits(query, keys, listed, scaling)
    wanted = REFERENCE.exact_logits(query.double(), exact_keys, listed, scaling)
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-4)


@each_kv_dtype
@each_dtype
@pytest.mark.parametrize(
    ("dim", "group", "tokens"), [(8, 1, 1), (24, 3, 17), (64, 3, 1500), (80, 4, 65), (128, 7, 200)]
)
@pytest.mark.parametrize("whole", [0, 70])
def test_attention_to_a_packed_cache_is_attention_to_what_is_stored(kv_dtype, dtype, dim, group, tokens, whole):
    check_reads(REFERENCE, kv_dtype, dtype, dim, group, tokens, whole)


@each_kv_dtype
@given(masks(min_tokens=20), SEEDS, st.integers(0, 20))
def test_the_sparse_step_reads_a_packed_cache_as_its_parts_do(kv_dtype, mask, seed, whole):
    rows = Rows.from_mask(mask)
    regions = rows.regions(2, 4, mask.device)
    if regions.high <= regions.low:
        return
    batch, length = mask.shape
    query, keys = randn(seed, batch, 6, 24), mixed(skewed_keys(seed, batch, 2, length, 24), kv_dtype, whole)
    values = mixed(randn(seed, batch, 2, length, 16), kv_dtype, whole)
    sketch = coded(keys, fit(keys))
    output, lse, selection = REFERENCE.step(query, keys, values, sketch, regions, 5, 1e-3, 0.25)
    logits = REFERENCE.score(query, sketch, regions.low, regions.high, 0.25)
    near = regions.near[:, None].expand(-1, 2, -1)
    near_logits = REFERENCE.exact_logits(query, keys, near, 0.25)
    if regions.near_valid is not None:
        near_logits = near_logits.masked_fill(~regions.near_valid[:, None, None], -math.inf)
    again = REFERENCE.select(logits, near_logits.logsumexp(-1), regions.low, regions.middle, 5, 1e-3)
    assert chosen_sets(selection) == chosen_sets(again)
    expected = REFERENCE.attend(query, keys, values, *regions.with_chosen(again), 0.25)
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])


# --- the compiled kernels, against the definition

CPU = CpuKernels()


@pytest.mark.usefixtures("isa")
@each_kv_dtype
@each_dim
@each_dtype
def test_compiled_codes_are_those_of_the_definition_bit_for_bit(kv_dtype, dim, dtype):
    for tokens in (1, 5, 130):
        x = skewed_keys(dim + tokens, 2, 3, tokens, dim, dtype=dtype)
        x[0, 0, 0] = 0
        ours, theirs = packed(x, kv_dtype, CPU), packed(x, kv_dtype)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales, theirs.scales)
        # a sketch of packed keys, too
        ours, theirs = coded(theirs, fit(theirs), CPU), coded(theirs, fit(theirs))
        assert torch.equal(ours.codes, theirs.codes)
        torch.testing.assert_close(ours.factors, theirs.factors, rtol=2.0**-10, atol=0)


@pytest.mark.usefixtures("isa")
@each_kv_dtype
def test_compiled_codes_of_what_is_not_finite_are_nan_and_of_the_smallest_as_defined(kv_dtype):
    x = randn(0, 1, 1, 12, 24)
    for token, scale in enumerate((1e-30, 1e-6, 1e-4, 1e3, 1e6, 1e7, 3e38)):
        x[0, 0, token] *= scale
    x[0, 0, 8, 3], x[0, 0, 9, 0], x[0, 0, 10, 23] = math.nan, math.inf, -math.inf
    ours, theirs = (packed(x, kv_dtype, kernels).unpack() for kernels in (CPU, REFERENCE))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.usefixtures("isa")
@each_kv_dtype
@each_dim
def test_compiled_statistics_of_packed_keys_are_those_of_float64(kv_dtype, dim):
    for tokens in (0, 1, 77):
        stored = packed(skewed_keys(dim, 1, 3, tokens, dim), kv_dtype)
        for ours, exact in zip(CPU.fit(stored[0]), REFERENCE.fit(stored[0]), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("isa")
@each_kv_dtype
@each_dtype
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("group", "tokens"), [(1, 1), (3, 65), (4, 64), (7, 1500)])
@pytest.mark.parametrize("whole", [0, 70])
def test_compiled_attention_to_a_packed_cache_is_attention_to_what_is_stored(
    kv_dtype, dtype, dim, group, tokens, whole
):
    check_reads(CPU, kv_dtype, dtype, dim, group, tokens, whole)


@pytest.mark.usefixtures("isa")
@each_kv_dtype
@each_dtype
@pytest.mark.parametrize("tokens", [40, 700])
@pytest.mark.parametrize("whole", [0, 3, 30])
def test_the_compiled_step_is_that_of_the_definition(kv_dtype, dtype, tokens, whole):
    query = randn(0, 2, 6, 24, dtype=dtype)
    keys, values = skewed_keys(1, 2, 2, tokens, 24, dtype=dtype), randn(2, 2, 2, tokens, 32, dtype=dtype)
    regions = Rows.full(2, tokens).regions(2, 4, query.device)
    stored = [mixed(x, kv_dtype, whole) for x in (keys, values)]
    sketch = coded(stored[0], fit(stored[0]))
    ours, theirs = (k.step(query, *stored, sketch, regions, 5, 1e-3, 0.25) for k in (CPU, REFERENCE))
    assert chosen_sets(ours[2]) == chosen_sets(theirs[2])
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-3)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-4)
    # the newest token taken out, and appended by the step itself
    again, blank = (
        [Packed(x.codes.clone(), x.scales.clone(), x.dtype, x.newest.clone()) for x in stored],
        coded(stored[0], sketch.statistics),
    )
    for x in again:
        if whole:
            x.newest[:, :, -1] = math.nan
        else:
            x.codes[:, :, -1], x.scales[:, :, -1] = 85, math.nan
    blank.codes[:, :, (tokens - 1) // 16, :, (tokens - 1) % 16] = 85
    new = (keys[:, :, -1], values[:, :, -1])
    output, lse, *_ = operations.step(query, *again, blank, regions, 5, 1e-3, 0.25, new)
    assert torch.equal(output, ours[0])
    assert torch.equal(lse, ours[1])
    for x, y in zip(again, stored, strict=True):
        assert torch.equal(x.codes, y.codes)
        assert torch.equal(x.scales, y.scales)
        assert torch.equal(x.newest, y.newest)
    assert torch.equal(blank.codes, sketch.codes)


@pytest.mark.usefixtures("isa")
@each_kv_dtype
def test_packed_tensors_that_kernels_would_misread_are_refused(kv_dtype):
    query, keys = randn(0, 1, 2, 16), packed(randn(1, 1, 2, 9, 16), kv_dtype)
    other = packed(randn(1, 1, 2, 9, 16), "int4" if kv_dtype == "int8" else "int8")
    newest = randn(1, 1, 2, 3, 16)
    broken = {
        "3 keys and 2 values are whole": (query, keys[:, :, :8].before(newest), keys.before(newest[:, :, :2])),
        "the query is torch.bfloat16": (query.bfloat16(), *[keys.before(newest)] * 2),
        "newest of packed keys": (query, *[keys.before(newest.half())] * 2),
        "one is packed": (query, keys, keys.unpack()),
        "as many bits": (query, keys, other),
        "float of": (query.double(), keys, keys),
        "do not fit": (query, keys, keys[:, :, :5]),
        "packed keys have": (query, Packed(keys.codes, keys.scales.float(), torch.float32), keys),
        "contiguous": (query, Packed(keys.codes, keys.scales.mT.contiguous().mT, torch.float32), keys),
    }
    for message, inputs in broken.items():
        with pytest.raises(ShapeError, match=message):
            CPU.attend_all(*inputs, None, 0.25)
    with pytest.raises(ShapeError, match="does not fit a packed view"):
        CPU.pack(randn(1, 1, 2, 8, 16), keys)
