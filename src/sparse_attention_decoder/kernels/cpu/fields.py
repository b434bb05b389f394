"""What the struct of a call says of a cache and of a sketch: addresses and strides, looked up once."""

from functools import lru_cache

from torch import Tensor

from sparse_attention_decoder.kernels.cpu.library import DTYPES, PACKED
from sparse_attention_decoder.kernels.packed import Packed
from sparse_attention_decoder.kernels.protocol import Coded
from sparse_attention_decoder.kernels.rotation import rotation_parts

# where a sketch keeps what kernels are told of it
_FIELDS = "_cpu_fields"


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
            fields["rotation"], fields["value_rotation"] = at(rotation_of(dim)), at(rotation_of(values.shape[3]))
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
            "deviation": coded.statistics.deviation.data_ptr(), "rotation": rotation_of(mean.shape[2]).data_ptr(),
        }  # fmt: skip
    return known


def at(tensor: Tensor | None) -> int:
    """The address of a tensor; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=16)
def rotation_of(dim: int) -> Tensor:
    """The rotation of so many channels, as kernels read it."""
    return rotation_parts(dim)
