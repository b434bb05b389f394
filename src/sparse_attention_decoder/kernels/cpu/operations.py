"""The operations of the compiled library on tensors. `reference` says what each computes."""

from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.checks import (
    check_cache,
    check_keys,
    check_query,
    check_regions,
    check_shape,
    checked_sketch,
)
from sparse_attention_decoder.kernels.cpu.library import DTYPES, PACKED, call
from sparse_attention_decoder.kernels.packed import Packed, settled
from sparse_attention_decoder.kernels.protocol import Coded
from sparse_attention_decoder.kernels.rotation import rotation_parts
from sparse_attention_decoder.selection import Regions

Held = TypeVar("Held", Tensor, Packed, Tensor | Packed)

# where a sketch keeps what kernels are told of it
_FIELDS = "_cpu_fields"


def pack(x: Tensor, into: Packed) -> None:
    """Write keys or values [B, Hkv, N, D] into a packed view of N tokens."""
    check_keys(x, 4)
    check_keys(into, 4)
    if x.shape != into.shape or into.whole:
        raise ShapeError(f"{tuple(x.shape)} does not fit a packed view of {tuple(into.shape)}")
    x = x.contiguous()
    call(
        "sad_pack", cache_fields(into, None), new_key=_at(x), query_type=DTYPES[x.dtype], count=x.shape[2],
        rotation=_at(_rotation(x.shape[3])),
    )  # fmt: skip


def fit(keys: Tensor | Packed) -> tuple[Tensor, Tensor]:
    """Mean and deviation [Hkv, D] of one row's keys [Hkv, N, D] after rotation; N may be 0."""
    check_keys(keys, 3)
    keys = settled(keys)
    heads, tokens, dim = keys.shape
    mean, deviation = torch.empty(heads, dim), torch.empty(heads, dim)
    held = _rows(keys)[None]
    call(
        "sad_fit", cache_fields(held, None), count=tokens, mean=_at(mean), deviation=_at(deviation),
        rotation=_at(_rotation(dim)),
    )  # fmt: skip
    return mean, deviation


def encode(keys: Tensor | Packed, coded: Coded, start: int) -> None:
    """Code keys [B, Hkv, N, D] into tokens start .. start + N - 1."""
    check_keys(keys, 4)
    coded = checked_sketch(coded, keys.shape[0], keys.shape[1], keys.shape[3])
    if start < 0 or start + keys.shape[2] > coded.factors.shape[2]:
        raise ShapeError(
            f"tokens {start} to {start + keys.shape[2]} do not fit a sketch of {coded.factors.shape[2]} tokens"
        )
    keys = _rows(settled(keys))
    call("sad_encode", cache_fields(keys, None), sketch_fields(coded), start=start, count=keys.shape[2])


def score(query: Tensor, coded: Coded, low: int, high: int, scaling: float, out: Tensor | None = None) -> Tensor:
    """Estimated logits [B, Hkv, G, high - low] of queries [B, Hq, D] against coded keys.

    out: a contiguous float32 tensor to write them to: fresh memory costs more than a scan.
    """
    heads = coded.codes.shape[1]
    query = _query_rows(query, heads)
    coded = checked_sketch(coded, query.shape[0], heads, query.shape[2])
    if not 0 <= low <= high <= coded.factors.shape[2]:
        raise ShapeError(f"tokens {low} to {high} are not all within a sketch of {coded.factors.shape[2]} tokens")
    shape = (query.shape[0], heads, query.shape[1] // heads, high - low)
    check_shape("out", out, shape, torch.float32)
    logits = torch.empty(shape) if out is None else out
    if high > low:
        call(
            "sad_score", _query(query, heads), sketch_fields(coded), kv_heads=heads, dim=query.shape[2], low=low,
            high=high, scaling=scaling, logits=_at(logits),
        )  # fmt: skip
    return logits


def select(
    logits: Tensor, near_lse: Tensor, low: int, middle: Tensor | None, floor: int, threshold: float, cap: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [B, Hkv, M], the first counts [B, Hkv] of them chosen; missing mass [B, Hkv], and of each head [B, Hq]."""
    batch, heads, group, width = logits.shape
    check_shape("near_lse", near_lse, (batch, heads, group), torch.float32)
    check_shape("logits", logits, (batch, heads, group, width), torch.float32)
    check_shape("middle", middle, (batch, width), torch.bool)
    logits, near_lse = logits.contiguous(), near_lse.contiguous()
    middle = None if middle is None else middle.contiguous()
    tokens, counts, missing, of_heads = _chosen(batch, heads, group, width)
    call(
        "sad_select", batch=batch, kv_heads=heads, group=group, dim=8, value_dim=8, logits=_at(logits),
        near_lse=_at(near_lse), low=low, high=low + width, middle=_at(middle), floor=floor,
        cap=-1 if cap is None else cap, threshold=threshold, tokens=_at(tokens), tokens_room=width,
        counts=_at(counts), missing=_at(missing), head_missing=_at(of_heads),
    )  # fmt: skip
    return tokens, counts, missing, of_heads


def attend(
    query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, tokens: Tensor, valid: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, Hq, Dv] and its log-sum-exp [B, Hq] over the listed tokens [B, Hkv, N]."""
    check_cache(query, keys, values)
    check_shape("tokens", tokens, (*keys.shape[:2], tokens.shape[-1]), torch.int64)
    check_shape("valid", valid, tuple(tokens.shape), torch.bool)
    tokens = tokens.contiguous()
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < keys.shape[2]:
        raise ShapeError(f"tokens {int(tokens.min())} to {int(tokens.max())} are not all of the {keys.shape[2]} cached")
    valid = None if valid is None else valid.contiguous()
    # an empty tensor may have no address, and no list means every token
    listed = tokens.data_ptr() or _at(_rotation(8))
    return _attend(query, keys, values, scaling, listed, tokens.shape[2], _at(valid), 0)


def attend_all(
    query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, valid: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, Hq, Dv] and its log-sum-exp [B, Hq] over every token, `valid` [B, T] marking those that count."""
    check_cache(query, keys, values)
    check_shape("valid", valid, (keys.shape[0], keys.shape[2]), torch.bool)
    valid = None if valid is None else valid.contiguous()
    return _attend(query, keys, values, scaling, 0, 0, 0, _at(valid))


def attend_causal(query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, scaling: float) -> Tensor:
    """Attention [B, Hq, N, Dv] of the newest N tokens' queries [B, Hq, N, D], each to itself and what is before it."""
    if query.ndim != 4 or keys.ndim != 4 or not 0 < query.shape[2] <= keys.shape[2]:
        raise ShapeError(
            f"queries have shape {tuple(query.shape)}, keys {tuple(keys.shape)}; expected [B, Hq, N, D] of the newest "
            "N tokens and [B, Hkv, T, D] of them all"
        )
    batch, heads, count, dim = query.shape
    kv_heads = keys.shape[1]
    check_cache(query[:, :, 0], keys, values)
    check_query(query[:, :, 0], kv_heads)
    # one query after the other, as so many more heads that share a KV head
    together = query.unflatten(1, (kv_heads, -1)).transpose(2, 3).reshape(batch, heads * count, dim)
    check_query(together, kv_heads)
    keys, values = _rows(keys), _rows(values)
    output, lse = _results(together, values)
    call(
        "sad_verify", _query(together, kv_heads), cache_fields(keys, values), output=_at(output), lse=_at(lse),
        scaling=scaling, count=count,
    )  # fmt: skip
    return output.view(batch, kv_heads, count, heads // kv_heads, -1).transpose(2, 3).flatten(1, 2)


def step(
    query: Tensor,
    keys: Tensor | Packed,
    values: Tensor | Packed,
    coded: Coded,
    regions: Regions,
    floor: int,
    threshold: float,
    scaling: float,
    appended: tuple[Tensor, Tensor] | None = None,
    sampled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Append, score, select and attend in one call.

    Gives output, log-sum-exp, tokens, counts, missing mass, log weights, missing mass of each query head.

    appended: key [B, Hkv, D] and value [B, Hkv, Dv] to write (and code) as the last of the cached tokens;
        None where they are there already.
    sampled: read a sample of what lies below the threshold too; without it there are no log weights.
    """
    check_cache(query, keys, values)
    batch, heads, length, dim = keys.shape
    coded = checked_sketch(coded, batch, heads, dim)
    check_regions(regions, batch, length)
    needed = length if appended is not None else regions.high
    if needed > coded.factors.shape[2]:
        raise ShapeError(f"{needed} tokens do not fit a sketch of {coded.factors.shape[2]} and {length} cached tokens")
    if appended is not None:
        if any(isinstance(x, Tensor) and x.stride(-1) != 1 for x in (keys, values)):
            raise ShapeError("keys and values to append to must be contiguous in their last axis")
        check_shape("key", appended[0], (batch, heads, dim), query.dtype)
        check_shape("value", appended[1], (batch, heads, values.shape[3]), query.dtype)
    query, keys, values = _query_rows(query, heads), _rows(keys), _rows(values)
    output, lse = _results(query, values)
    near, near_valid, middle = (None if x is None else x.contiguous() for x in (
        regions.near, regions.near_valid, regions.middle))  # fmt: skip
    key, value = (None, None) if appended is None else (x.contiguous() for x in appended)
    width = max(0, regions.high - regions.low)
    tokens, counts, missing, of_heads = _chosen(batch, heads, query.shape[1] // heads, width)
    log_weights = torch.empty(batch, heads, width) if sampled and threshold > 0 else None
    most = call(
        "sad_step", _query(query, heads), cache_fields(keys, values), sketch_fields(coded), output=_at(output),
        lse=_at(lse), near=_at(near), near_valid=_at(near_valid), near_count=regions.near.shape[1], low=regions.low,
        high=regions.high, middle=_at(middle), floor=floor, cap=-1, threshold=threshold, scaling=scaling,
        tokens=_at(tokens), tokens_room=width, counts=_at(counts), missing=_at(missing), head_missing=_at(of_heads),
        new_key=_at(key), new_value=_at(value), count=int(appended is not None), sampled=int(log_weights is not None),
        log_weights=_at(log_weights),
    )  # fmt: skip
    weights = None if log_weights is None else log_weights[..., :most]
    return output, lse, tokens[..., :most], counts, missing, weights, of_heads


def _attend(
    query: Tensor,
    keys: Tensor | Packed,
    values: Tensor | Packed,
    scaling: float,
    tokens: int,
    count: int,
    listed: int,
    valid: int,
) -> tuple[Tensor, Tensor]:
    query, keys, values = _query_rows(query, keys.shape[1]), _rows(keys), _rows(values)
    output, lse = _results(query, values)
    call(
        "sad_attend", _query(query, keys.shape[1]), cache_fields(keys, values), output=_at(output),
        lse=_at(lse), scaling=scaling, tokens=tokens, tokens_room=count, tokens_valid=listed, middle=valid,
    )  # fmt: skip
    return output, lse


def _results(query: Tensor, values: Tensor | Packed) -> tuple[Tensor, Tensor]:
    batch, heads, _ = query.shape
    return torch.empty((batch, heads, values.shape[3]), dtype=query.dtype), torch.empty((batch, heads))


def _chosen(batch: int, heads: int, group: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(batch, heads, width, dtype=torch.int64),
        torch.empty(batch, heads, dtype=torch.int64),
        torch.empty(batch, heads),
        torch.empty(batch, heads * group),
    )


def _query(query: Tensor, kv_heads: int) -> dict[str, int]:
    batch, heads, _ = query.shape
    row, head, _ = query.stride()
    return {
        "batch": batch, "group": heads // kv_heads, "query_type": DTYPES[query.dtype], "query": query.data_ptr(),
        "query_row": row, "query_head": head,
    }  # fmt: skip


def cache_fields(keys: Tensor | Packed, values: Tensor | Packed | None) -> dict[str, int]:
    """The struct's fields of a cache."""
    batch, heads, length, dim = keys.shape
    kind = PACKED[keys.codes.dtype] if isinstance(keys, Packed) else DTYPES[keys.dtype]
    fields = {"batch": batch, "kv_heads": heads, "dim": dim, "cache_type": kind, "length": length}
    fields.update(_held("key", keys))
    if values is not None:
        fields["value_dim"] = values.shape[3]
        fields.update(_held("value", values))
        if isinstance(values, Packed):
            fields["rotation"], fields["value_rotation"] = _at(_rotation(dim)), _at(_rotation(values.shape[3]))
    return fields


def _held(name: str, x: Tensor | Packed) -> dict[str, int]:
    if isinstance(x, Packed):
        return _packed(name, x)
    row, head, token, _ = x.stride()
    return {f"{name}s": x.data_ptr(), f"{name}_row": row, f"{name}_head": head, f"{name}_token": token}


def _packed(name: str, x: Packed) -> dict[str, int]:
    # as for a sketch
    known: dict[str, int] | None = vars(x.stored).get(name)
    if known is None or known[f"{name}s"] != x.codes.data_ptr():
        row, head, _ = x.scales.stride()
        known = vars(x.stored)[name] = {
            **_held(name, x.codes), f"{name}_scales": x.scales.data_ptr(), f"{name}_scale_row": row,
            f"{name}_scale_head": head, "whole_from": x.codes.shape[2],
        }  # fmt: skip
    return known if x.newest is None else known | _held(f"whole_{name}", x.newest)


def sketch_fields(coded: Coded) -> dict[str, int]:
    """The struct's fields of a sketch."""
    # the same sketch comes back at every step: its addresses are looked up once, and anew in a deep copy
    known: dict[str, int] | None = vars(coded).get(_FIELDS)
    if known is None or known["codes"] != coded.codes.data_ptr():
        codes, factors, mean = coded.codes, coded.factors, coded.statistics.mean
        code_row, code_head, *_ = codes.stride()
        factor_row, factor_head, _ = factors.stride()
        known = vars(coded)[_FIELDS] = {
            "codes": codes.data_ptr(), "code_row": code_row, "code_head": code_head, "factors": factors.data_ptr(),
            "factor_row": factor_row, "factor_head": factor_head, "mean": mean.data_ptr(),
            "deviation": coded.statistics.deviation.data_ptr(), "rotation": _rotation(mean.shape[2]).data_ptr(),
        }  # fmt: skip
    return known


def _query_rows(query: Tensor, kv_heads: int) -> Tensor:
    check_query(query, kv_heads)
    return _rows(query)


def _rows(x: Held) -> Held:
    # kernels walk the last axis element by element, any other by its stride; packed rows are checked
    if isinstance(x, Packed):
        return x
    return x if x.stride(-1) == 1 else x.contiguous()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=16)
def _rotation(dim: int) -> Tensor:
    return rotation_parts(dim)
