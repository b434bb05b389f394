"""A decode step whose length only the device knows, as two torch ops: a compiled or captured model takes it whole.

Sizes, grids and addresses are the same at every step, and the host is never asked: what changes from step to step lies
in `length`, and in `plan`, which `append_token` writes and `read_tokens` reads. Nothing is allocated but the output.
"""

import torch
from torch import Tensor

from sparse_attention_decoder.kernels.protocol import Coded, Statistics
from sparse_attention_decoder.kernels.triton.shapes import Plan, Scratch, Shape

_library = torch.library.Library("sparse_attention_decoder", "FRAGMENT")

_library.define(
    "append_token(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) codes, Tensor(d!) factors, "
    "Tensor(e!) mean, Tensor(f!) deviation, Tensor(g!) length, Tensor starts, Tensor(h!) plan, int sinks, int window, "
    "int dense_tokens) -> ()"
)
_library.define(
    "read_tokens(Tensor query, Tensor keys, Tensor values, Tensor codes, Tensor factors, Tensor mean, Tensor deviation"
    ", Tensor plan, Tensor(a!) scratch, Tensor(b!) tally, int near, int floor, float threshold, float scaling"
    ") -> Tensor"
)


def _append_token(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    codes: Tensor,
    factors: Tensor,
    mean: Tensor,
    deviation: Tensor,
    length: Tensor,
    starts: Tensor,
    plan: Tensor,
    sinks: int,
    window: int,
    dense_tokens: int,
) -> None:
    from sparse_attention_decoder.kernels.triton.append import append

    written = Plan(plan, key.shape[0], sinks + window)
    coded = Coded(codes, factors, Statistics(mean, deviation))
    append(
        key, value, keys, values, coded, length, starts, written.bounds, written.near, written.turn,
        sinks, window, dense_tokens,
    )  # fmt: skip


def _read_tokens(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    codes: Tensor,
    factors: Tensor,
    mean: Tensor,
    deviation: Tensor,
    plan: Tensor,
    scratch: Tensor,
    tally: Tensor,
    near: int,
    floor: int,
    threshold: float,
    scaling: float,
) -> Tensor:
    from sparse_attention_decoder.kernels.triton.attend import launch_attend
    from sparse_attention_decoder.kernels.triton.score import launch_score
    from sparse_attention_decoder.kernels.triton.select import launch_select

    shape = Shape.of(query, keys.shape[1], values.shape[3])
    query = query.contiguous()
    to_read, left = Plan(plan, shape.batch, near), Scratch(shape, keys.shape[2], near, scratch)
    coded = Coded(codes, factors, Statistics(mean, deviation))
    launch_score(shape, query, coded, keys, to_read.near, None, None, to_read.bounds, left, scaling)
    launch_select(shape, to_read.bounds, None, left, left.tokens, left.counts, left.missing, floor, threshold)
    output, _ = launch_attend(
        shape, query, keys, values, to_read.near, None, left.tokens, left.counts, left.missing, to_read.bounds,
        left.attended, scaling, tally,
    )  # fmt: skip
    return output


def _fake_read(query: Tensor, keys: Tensor, values: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:2], values.shape[3])


for _name, _real, _fake in (
    ("append_token", _append_token, lambda *_: None),
    ("read_tokens", _read_tokens, _fake_read),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_attention_decoder::{_name}", _fake, lib=_library)

append_token = torch.ops.sparse_attention_decoder.append_token
read_tokens = torch.ops.sparse_attention_decoder.read_tokens
