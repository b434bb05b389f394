"""What an index over the keys must do to stay in step with them."""

from typing import Protocol

from torch import Tensor

from sparse_attention_decoder.kernels import Packed
from sparse_attention_decoder.selection import Rows


class Index(Protocol):
    """A summary of one layer's keys that is a function of the keys alone.

    However the keys came to be there (at once, one by one, after a truncation), `catch_up` leaves
    the same index. It is called when a decode step first needs it, so prefill pays nothing.
    The exception is `Survivors`: what a policy threw away depends on when.
    """

    def catch_up(self, keys: Tensor | Packed, rows: Rows, needed: int) -> None:
        """Cover at least the first `needed` of the keys [B, Hkv, T, D]."""

    def truncate(self, length: int) -> None:
        """Forget what was summed up of tokens from `length` on."""

    def take_rows(self, rows: Tensor) -> None:
        """Let row i hold what row `rows[i]` [B'] int64 held."""
