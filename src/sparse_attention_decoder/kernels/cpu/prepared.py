"""The call of a decode step that comes again and again: filled in once, but for what changes from token to token."""

import ctypes

import torch
from torch import Tensor

from sparse_attention_decoder.kernels.cpu.fields import cache_fields, sketch_fields
from sparse_attention_decoder.kernels.cpu.library import DTYPES, FIELDS, filled, run
from sparse_attention_decoder.kernels.packed import Packed
from sparse_attention_decoder.kernels.protocol import Coded

_AT = {name: number for number, name in enumerate(FIELDS)}
_QUERY, _OUTPUT, _LSE, _LENGTH, _KEY, _VALUE, _THREADS = (
    _AT[name] for name in ("query", "output", "lse", "length", "new_key", "new_value", "threads")
)
_NEAR, _HIGH, _COUNTS, _MISSING = (_AT[name] for name in ("near", "high", "counts", "missing"))
_THRESHOLD = _AT["threshold"]
# steps whose counts lie in one tensor
_STEPS = 64


class PreparedStep:
    """A layer's decode step: appends the new token, then attends, densely or to what a sketch chooses.

    Holds addresses: good as long as the tensors that it was made of are where they were, and queries lie as the first
    one did. Everything else was checked when it was made.

    Args:
        query: [B, Hq, 1, D], as every one to come will lie.
        keys, values: views of what is held, of a buffer that has room for what will be appended.
        coded: the sketch of the middle's tokens; None attends densely.
        low, near_count, floor: of a sparse step's regions, and how many tokens it retrieves at least.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor | Packed,
        values: Tensor | Packed,
        scaling: float,
        coded: Coded | None = None,
        low: int = 0,
        near_count: int = 0,
        floor: int = 0,
    ) -> None:
        batch, heads, _, _ = query.shape
        self._shape, self._strides = (batch, 1, heads, values.shape[3]), query.stride()
        self._dtype, self._units = query.dtype, keys.shape[:2]
        lse = torch.empty(batch, heads)
        # missing mass of each query head [B, Hq] in the newest sparse step
        self.head_missing = torch.empty(batch, heads)
        # the call holds their addresses
        self._held = (keys, values, coded, lse)
        self._operation = "sad_attend" if coded is None else "sad_step"
        self._used = _STEPS
        fields = {
            "group": heads // keys.shape[1], "query_type": DTYPES[query.dtype], "query_row": self._strides[0],
            "query_head": self._strides[1], "lse": lse.data_ptr(), "low": low, "near_count": near_count,
            "floor": floor, "cap": -1, "scaling": scaling, "head_missing": self.head_missing.data_ptr(),
        }  # fmt: skip
        struct = bytearray(filled(fields, cache_fields(keys, values), {} if coded is None else sketch_fields(coded)))
        # two views of the same bytes
        self._words = (ctypes.c_int64 * len(FIELDS)).from_buffer(struct)
        self._numbers = (ctypes.c_double * len(FIELDS)).from_buffer(struct)
        self._address = ctypes.addressof(self._words)

    def takes(self, query: Tensor) -> bool:
        """Whether a query [B, Hq, 1, D] lies as the first one did."""
        return query.stride() == self._strides and query.dtype == self._dtype

    def attend(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Append key [B, Hkv, 1, D] and value [B, Hkv, 1, Dv] as the last of `length` tokens; attention [B, 1, Hq, Dv].

        The query must be one that it takes.
        """
        words, output = self._words, torch.empty(self._shape, dtype=self._dtype)
        key, value = key.contiguous(), value.contiguous()
        words[_QUERY], words[_OUTPUT], words[_LENGTH] = query.data_ptr(), output.data_ptr(), length
        words[_KEY], words[_VALUE], words[_THREADS] = key.data_ptr(), value.data_ptr(), torch.get_num_threads()
        run(self._operation, self._address)
        return output

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, length: int, near: Tensor, high: int, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, attending to the near tokens [B, N] int64 and to what is chosen of those below `high`.

        Returns also how many were chosen [B, Hkv] int64 and the missing mass [B, Hkv].
        """
        if self._used == _STEPS:
            self._counts = torch.empty(_STEPS, *self._units, dtype=torch.int64)
            self._missing, self._used = torch.empty(_STEPS, *self._units), 0
        counts, missing = self._counts[self._used], self._missing[self._used]
        self._used += 1
        near = near.contiguous()
        words = self._words
        words[_NEAR], words[_HIGH], self._numbers[_THRESHOLD] = near.data_ptr(), high, threshold
        words[_COUNTS], words[_MISSING] = counts.data_ptr(), missing.data_ptr()
        return self.attend(query, key, value, length), counts, missing
