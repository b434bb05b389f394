"""The operations of the compiled library on tensors. `reference` says what each computes."""

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
from sparse_attention_decoder.kernels.cpu.fields import at, cache_fields, rotation_of, sketch_fields
from sparse_attention_decoder.kernels.cpu.library import DTYPES, call
from sparse_attention_decoder.kernels.packed import Packed, settled
from sparse_attention_decoder.kernels.protocol import Coded
from sparse_attention_decoder.selection import Regions

Held = TypeVar("Held", Tensor, Packed, Tensor | Packed)


def pack(x: Tensor, into: Packed) -> None:
    """Write keys or values [B, Hkv, N, D] into a packed view of N tokens."""
    check_keys(x, 4)
    check_keys(into, 4)
    if x.shape != into.shape or into.whole:
        raise ShapeError(f"{tuple(x.shape)} does not fit a packed view of {tuple(into.shape)}")
    x = x.contiguous()
    call(
        "sad_pack", cache_fields(into, None), new_key=at(x), query_type=DTYPES[x.dtype], count=x.shape[2],
        rotation=at(rotation_of(x.shape[3])),
    )  # fmt: skip


def fit(keys: Tensor | Packed) -> tuple[Tensor, Tensor]:
    """Mean and deviation [Hkv, D] of one row's keys [Hkv, N, D] after rotation; N may be 0."""
    check_keys(keys, 3)
    keys = settled(keys)
    heads, tokens, dim = keys.shape
    mean, deviation = torch.empty(heads, dim), torch.empty(heads, dim)
    held = _rows(keys)[None]
    call(
        "sad_fit", cache_fields(held, None), count=tokens, mean=at(mean), deviation=at(deviation),
        rotation=at(rotation_of(dim)),
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
            high=high, scaling=scaling, logits=at(logits),
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
        "sad_select", batch=batch, kv_heads=heads, group=group, dim=8, value_dim=8, logits=at(logits),
        near_lse=at(near_lse), low=low, high=low + width, middle=at(middle), floor=floor,
        cap=-1 if cap is None else cap, threshold=threshold, tokens=at(tokens), tokens_room=width,
        counts=at(counts), missing=at(missing), head_missing=at(of_heads),
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
    listed = tokens.data_ptr() or at(rotation_of(8))
    return _attend(query, keys, values, scaling, listed, tokens.shape[2], at(valid), 0)


def attend_all(
    query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, valid: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, Hq, Dv] and its log-sum-exp [B, Hq] over every token, `valid` [B, T] marking those that count."""
    check_cache(query, keys, values)
    check_shape("valid", valid, (keys.shape[0], keys.shape[2]), torch.bool)
    valid = None if valid is None else valid.contiguous()
    return _attend(query, keys, values, scaling, 0, 0, 0, at(valid))


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
        "sad_verify", _query(together, kv_heads), cache_fields(keys, values), output=at(output), lse=at(lse),
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
        "sad_step", _query(query, heads), cache_fields(keys, values), sketch_fields(coded), output=at(output),
        lse=at(lse), near=at(near), near_valid=at(near_valid), near_count=regions.near.shape[1], low=regions.low,
        high=regions.high, middle=at(middle), floor=floor, cap=-1, threshold=threshold, scaling=scaling,
        tokens=at(tokens), tokens_room=width, counts=at(counts), missing=at(missing), head_missing=at(of_heads),
        new_key=at(key), new_value=at(value), count=int(appended is not None), sampled=int(log_weights is not None),
        log_weights=at(log_weights),
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
        "sad_attend", _query(query, keys.shape[1]), cache_fields(keys, values), output=at(output),
        lse=at(lse), scaling=scaling, tokens=tokens, tokens_room=count, tokens_valid=listed, middle=valid,
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


def _query_rows(query: Tensor, kv_heads: int) -> Tensor:
    check_query(query, kv_heads)
    return _rows(query)


def _rows(x: Held) -> Held:
    # kernels walk the last axis element by element, any other by its stride; packed rows are checked
    if isinstance(x, Packed):
        return x
    return x if x.stride(-1) == 1 else x.contiguous()
