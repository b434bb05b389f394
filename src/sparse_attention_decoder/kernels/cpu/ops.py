"""The operations as torch ops, so that `torch.compile(fullgraph=True)` takes a decode step with them.

`torch.ops.sparse_attention_decoder.step` is the whole decode step of one layer, append included;
the others are its parts. Eager code calls `operations` directly: the dispatcher costs as much as a
small step. Shapes of results depend on shapes alone, so `select` fills its tokens behind the counts.
"""

import torch
from torch import Tensor

import sparse_attention_decoder.kernels.cpu.operations as operations
from sparse_attention_decoder.kernels.cpu.products import multiply
from sparse_attention_decoder.kernels.protocol import Coded, Statistics
from sparse_attention_decoder.selection import Rows

NAMESPACE = "sparse_attention_decoder"

_library = torch.library.Library(NAMESPACE, "DEF")

_SKETCH = "Tensor codes, Tensor factors, Tensor mean, Tensor deviation"
_KV = "Tensor query, Tensor keys, Tensor values"
_library.define(
    "encode(Tensor keys, Tensor(a!) codes, Tensor(b!) factors, Tensor mean, Tensor deviation, int start) -> ()"
)
_library.define(f"score(Tensor query, {_SKETCH}, int low, int high, float scaling) -> Tensor")
_library.define(
    "select(Tensor logits, Tensor near_lse, int low, Tensor? middle, int floor, float threshold, int? cap) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(f"attend({_KV}, Tensor tokens, Tensor? valid, float scaling) -> (Tensor, Tensor)")
_library.define(f"attend_all({_KV}, Tensor? valid, float scaling) -> (Tensor, Tensor)")
_library.define(
    "step(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) codes, "
    "Tensor(d!) factors, Tensor mean, Tensor deviation, int sinks, int window, int floor, float threshold, "
    "float scaling) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define("multiply(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _encode(keys: Tensor, codes: Tensor, factors: Tensor, mean: Tensor, deviation: Tensor, start: int) -> None:
    operations.encode(keys, Coded(codes, factors, Statistics(mean, deviation)), start)


def _score(
    query: Tensor,
    codes: Tensor,
    factors: Tensor,
    mean: Tensor,
    deviation: Tensor,
    low: int,
    high: int,
    scaling: float,
) -> Tensor:
    return operations.score(query, Coded(codes, factors, Statistics(mean, deviation)), low, high, scaling)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    codes: Tensor,
    factors: Tensor,
    mean: Tensor,
    deviation: Tensor,
    sinks: int,
    window: int,
    floor: int,
    threshold: float,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coded = Coded(codes, factors, Statistics(mean, deviation))
    regions = Rows.full(keys.shape[0], keys.shape[2]).regions(sinks, window, keys.device)
    output, lse, _, counts, missing, _, _ = operations.step(
        query, keys, values, coded, regions, floor, threshold, scaling, (key, value)
    )
    return output, lse, counts, missing


def _select(
    logits: Tensor, near_lse: Tensor, low: int, middle: Tensor | None, floor: int, threshold: float, cap: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, counts, missing, _ = operations.select(logits, near_lse, low, middle, floor, threshold, cap)
    return tokens, counts, missing


def _results(query: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads = query.shape[:2]
    return query.new_empty(batch, heads, values.shape[3]), query.new_empty(batch, heads, dtype=torch.float32)


def _chosen(like: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(batch, heads, dtype=torch.int64), like.new_empty(batch, heads, dtype=torch.float32)


def _fake_score(query: Tensor, codes: Tensor, factors: Tensor, mean: Tensor, deviation: Tensor, low: int, high: int,
                scaling: float) -> Tensor:  # fmt: skip
    batch, heads = codes.shape[:2]
    return query.new_empty(batch, heads, query.shape[1] // heads, high - low, dtype=torch.float32)


def _fake_select(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    batch, heads, _group, width = logits.shape
    return (logits.new_empty(batch, heads, width, dtype=torch.int64), *_chosen(logits, batch, heads))


def _fake_attend(query: Tensor, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _results(query, values)


def _fake_step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *_: object) -> tuple[
    Tensor, ...
]:  # fmt: skip
    return (*_results(query, values), *_chosen(query, *keys.shape[:2]))


def _fake_multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


for _name, _real, _fake in (
    ("encode", _encode, lambda *_: None),
    ("score", _score, _fake_score),
    ("select", _select, _fake_select),
    ("attend", operations.attend, _fake_attend),
    ("attend_all", operations.attend_all, _fake_attend),
    ("step", _step, _fake_step),
    ("multiply", multiply, _fake_multiply),
):
    _library.impl(_name, _real, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
