"""Tensors as they come to the compiled kernels: strided, within others, damaged, misshapen."""

import copy
import math

import pytest
import torch
from cases import coded, fit, layer_with, randn, skewed_keys
from test_cpu_kernels import CPU, each_dtype, exact
from test_cpu_select import assert_filler_is_a_position
from torch import Tensor

from sparse_attention_decoder.attention import LayerState, decode_step
from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.selection import Rows

SCALING = 0.2
DEVICE = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("isa", "poison")


def strided(x: Tensor) -> list[Tensor]:
    """The same numbers as views: within a larger room, with axes swapped, with every second element."""
    room = torch.full((*x.shape[:-2], x.shape[-2] + 7, x.shape[-1]), torch.nan, dtype=x.dtype)
    room[..., : x.shape[-2], :] = x
    swapped = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    sparse = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
    sparse[..., 0] = x
    return [room[..., : x.shape[-2], :], swapped, sparse[..., 0], x.mT.contiguous().mT]


@each_dtype
def test_views_with_any_strides_give_what_contiguous_tensors_give_bit_for_bit(dtype):
    keys, values = skewed_keys(0, 2, 3, 90, 24, dtype=dtype), randn(1, 2, 3, 90, 32, dtype=dtype)
    query, statistics = randn(2, 2, 6, 24, dtype=dtype), fit(keys)
    mask = torch.arange(90) >= torch.tensor([[0], [31]])
    regions, plain = Rows.from_mask(mask).regions(2, 5, DEVICE), coded(keys, statistics, CPU)
    tokens = torch.arange(90).flip(0).expand(2, 3, -1)

    def everything(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> list[Tensor]:
        sketch = coded(k, statistics, CPU)
        output, lse, chosen = CPU.step(q, k, v, plain, regions, 7, 0.01, SCALING)
        dense = CPU.attend_all(q, k, v, valid, SCALING)
        listed = CPU.attend(q, k, v, tokens, valid[:, None].expand(-1, 3, -1), SCALING)
        scores = CPU.score(q, plain, 5, 80, SCALING)
        return [*CPU.fit(k[0]), sketch.codes, sketch.factors, output, lse, chosen.tokens, dense, *listed, scores]

    expected = everything(query, keys, values, mask)
    wide = torch.stack([mask, ~mask], -1)[..., 0]
    for q, k, v in zip(strided(query), strided(keys), reversed(strided(values)), strict=True):
        assert not (k.is_contiguous() or v.is_contiguous() or wide.is_contiguous())
        for ours, theirs in zip(everything(q, k, v, wide), expected, strict=True):
            assert torch.equal(ours, theirs)


@each_dtype
def test_a_sketch_within_a_larger_one_serves_as_one_of_its_own(dtype):
    keys, query = skewed_keys(0, 2, 2, 90, 24, dtype=dtype), randn(1, 2, 4, 24, dtype=dtype)
    own = coded(keys, fit(keys))
    room = Coded.room(90, Statistics(torch.zeros(2, 5, 24), torch.ones(2, 5, 24)))
    part = Coded(room.codes[:, 1:3], room.factors[:, 1:3], own.statistics)
    CPU.encode(keys, part, 0)
    assert torch.equal(part.codes, own.codes)
    assert room.codes[:, [0, 3, 4]].eq(0).all()
    assert torch.equal(CPU.score(query, part, 3, 90, 0.2), CPU.score(query, own, 3, 90, 0.2))


@each_dtype
def test_statistics_shared_by_heads_serve_as_those_of_each(dtype):
    keys, query = skewed_keys(0, 2, 2, 40, 24, dtype=dtype), randn(1, 2, 4, 24, dtype=dtype)
    mean, deviation = skewed_keys(5, 24), randn(6, 24).exp()
    shared = Statistics(mean.expand(2, 2, -1), deviation.expand(2, 2, -1))
    own = Statistics(shared.mean.contiguous(), shared.deviation.contiguous())
    ours, theirs = (coded(keys, statistics, CPU) for statistics in (shared, own))
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(CPU.score(query, ours, 0, 40, SCALING), CPU.score(query, theirs, 0, 40, SCALING))


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_damage_shows_in_the_output_as_it_does_densely(dtype, bad, where):
    tensors = {name: randn(n, 1, 2, size, 24, dtype=dtype) for n, (name, size) in
               enumerate({"query": 3, "keys": 70, "values": 70}.items())}  # fmt: skip
    tensors[where][0, 0, 1, 3] = bad
    query, keys, values = tensors["query"].flatten(1, 2), tensors["keys"], tensors["values"]
    everything = torch.ones(1, 2, 70, dtype=torch.bool)
    plain, _ = exact(query, keys, values, everything, SCALING)
    grouped = query.double().unflatten(1, (2, -1))
    dense = ((SCALING * grouped @ keys.double().mT).softmax(-1) @ values.double()).flatten(1, 2)
    found = CPU.attend_all(query, keys, values, None, SCALING)
    listed, _ = CPU.attend(query, keys, values, torch.arange(70).expand(1, 2, -1), None, SCALING)
    for output in (found, listed):
        assert torch.equal(output.isnan(), dense.isnan())
        sound = dense.isfinite()
        torch.testing.assert_close(output[sound].double(), plain[sound], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_step_of_a_damaged_query_or_window_gives_nan_and_leaves_other_heads_alone(bad):
    # a logit of minus infinity would do no damage densely either
    keys, values, query = randn(0, 1, 2, 90, 8), randn(1, 1, 2, 90, 8), randn(2, 1, 4, 8).abs()
    sketch, regions = coded(keys, fit(keys)), Rows.full(1, 90).regions(2, 5, DEVICE)
    sound, _, _ = CPU.step(query, keys, values, sketch, regions, 8, 1e-3, SCALING)
    for damaged, place in ((query, (0, 0, 0)), (keys, (0, 0, 88, 0))):
        kept = damaged.clone()
        damaged[place] = bad
        output, _, selection = CPU.step(query, keys, values, sketch, regions, 8, 1e-3, SCALING)
        assert output[0, 0].isnan().all()
        assert torch.equal(output[0, 2:], sound[0, 2:])
        assert_filler_is_a_position(selection, regions.low, regions.high)
        damaged.copy_(kept)


KEYS, QUERY = randn(0, 2, 2, 20, 8), randn(1, 2, 4, 8)
SKETCH = coded(KEYS, fit(KEYS))
TOKENS, ALL = torch.zeros(2, 2, 3, dtype=torch.int64), Rows.full(2, 20).regions(2, 5, DEVICE)
DOUBLE = Statistics(SKETCH.statistics.mean.double(), SKETCH.statistics.deviation.double())
MISFITS = {
    "heads that do not share evenly": lambda: CPU.attend_all(QUERY[:, :3], KEYS, KEYS, None, 1.0),
    "another batch": lambda: CPU.attend_all(QUERY[:1], KEYS, KEYS, None, 1.0),
    "another head size": lambda: CPU.attend_all(QUERY[..., :4], KEYS, KEYS, None, 1.0),
    "a query of two axes": lambda: CPU.attend_all(QUERY[0], KEYS, KEYS, None, 1.0),
    "a query of four axes": lambda: CPU.attend_all(QUERY[None], KEYS, KEYS, None, 1.0),
    "keys of three axes": lambda: CPU.attend_all(QUERY, KEYS[0], KEYS[0], None, 1.0),
    "fewer values than keys": lambda: CPU.attend_all(QUERY, KEYS, KEYS[:, :, :9], None, 1.0),
    "values of another dtype": lambda: CPU.attend_all(QUERY, KEYS, KEYS.half(), None, 1.0),
    "a query of another dtype": lambda: CPU.attend_all(QUERY.half(), KEYS, KEYS, None, 1.0),
    "float64 throughout": lambda: CPU.attend_all(QUERY.double(), KEYS.double(), KEYS.double(), None, 1.0),
    "a mask of another length": lambda: CPU.attend_all(QUERY, KEYS, KEYS, torch.ones(2, 9, dtype=torch.bool), 1.0),
    "a mask of numbers": lambda: CPU.attend_all(QUERY, KEYS, KEYS, torch.ones(2, 20), 1.0),
    "a token beyond the last": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS + 20, None, 1.0),
    "a token before the first": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS - 1, None, 1.0),
    "tokens of int32": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS.int(), None, 1.0),
    "tokens of one head": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS[:, :1], None, 1.0),
    "fewer marks than tokens": lambda: CPU.attend(QUERY, KEYS, KEYS, TOKENS, TOKENS[..., :1] == 0, 1.0),
    "keys beyond the room": lambda: CPU.encode(KEYS, SKETCH, 13),
    "keys before the room": lambda: CPU.encode(KEYS, SKETCH, -1),
    "keys of another head size": lambda: CPU.encode(KEYS.repeat(1, 1, 1, 2), SKETCH, 0),
    "keys of another batch": lambda: CPU.encode(KEYS[:1], SKETCH, 0),
    "keys of float64": lambda: CPU.encode(KEYS.double(), SKETCH, 0),
    "scores beyond the room": lambda: CPU.score(QUERY, SKETCH, 0, 33, 1.0),
    "scores backwards": lambda: CPU.score(QUERY, SKETCH, 9, 8, 1.0),
    "scores of another head size": lambda: CPU.score(QUERY[..., :4], SKETCH, 0, 9, 1.0),
    "scores of float64": lambda: CPU.score(QUERY.double(), SKETCH, 0, 9, 1.0),
    "scores of three heads": lambda: CPU.score(QUERY[:, :3], SKETCH, 0, 9, 1.0),
    "statistics of float64": lambda: CPU.score(QUERY, Coded(SKETCH.codes, SKETCH.factors, DOUBLE), 0, 9, 1.0),
    "codes of another width": lambda: CPU.score(
        QUERY, Coded(SKETCH.codes.repeat(1, 1, 1, 2, 1, 1), SKETCH.factors, SKETCH.statistics), 0, 9, 1.0
    ),
    "fewer codes than factors": lambda: CPU.score(
        QUERY, Coded(SKETCH.codes[:, :, :1], SKETCH.factors, SKETCH.statistics), 0, 20, 1.0
    ),
    "factors of float32": lambda: CPU.score(
        QUERY, Coded(SKETCH.codes, SKETCH.factors.float(), SKETCH.statistics), 0, 9, 1.0
    ),
    "a middle of another length": lambda: CPU.select(
        torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 1), 0, torch.ones(1, 8, dtype=torch.bool), 1, 0.0
    ),
    "a near log-sum-exp of another group": lambda: CPU.select(
        torch.zeros(1, 1, 1, 9), torch.zeros(1, 1, 2), 0, None, 1, 0.0
    ),
    "a step over fewer keys": lambda: CPU.step(QUERY, KEYS[:, :, :9], KEYS[:, :, :9], SKETCH, ALL, 1, 0.0, 1.0),
    "a step over a sketch of fewer tokens": lambda: CPU.step(
        QUERY, KEYS.repeat(1, 1, 3, 1), KEYS.repeat(1, 1, 3, 1), SKETCH,
        Rows.full(2, 60).regions(2, 5, DEVICE), 1, 0.0, 1.0,
    ),
    "a step of another batch": lambda: CPU.step(QUERY[:1], KEYS[:1], KEYS[:1], SKETCH, ALL, 1, 0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_are_refused(misfit):
    with pytest.raises(ShapeError):
        MISFITS[misfit]()


def test_a_copied_cache_reads_its_own_sketch_and_survives_the_original():
    """Prompt caches are deep-copied for each question: addresses remembered from the original must stay behind."""
    keys, values = randn(0, 1, 2, 90, 16), randn(1, 1, 2, 90, 16)
    query, new = randn(2, 1, 4, 16), randn(3, 1, 2, 40, 16)

    def decoded(layer: LayerState) -> Tensor:
        return decode_step(query, layer, Rows.full(1, layer.buffer.length), 0.25).output

    original = layer_with(keys, values, top_k=4, attention_window=8, backend="cpu")
    decoded(original)
    duplicate = copy.deepcopy(original)
    for layer, added in ((original, -new), (duplicate, new)):
        layer.truncate(40)
        layer.buffer.append(added, added)
    theirs = decoded(original)
    fresh = layer_with(duplicate.buffer.keys, duplicate.buffer.values, top_k=4, attention_window=8, backend="cpu")
    expected = decoded(fresh)
    assert torch.equal(decoded(duplicate), expected)
    assert torch.equal(decoded(original), theirs)
