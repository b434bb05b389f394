"""Several queries of the newest tokens: by definition each gets what it would get alone."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sparse_attention_decoder.kernels.packed import Packed

if TYPE_CHECKING:
    from sparse_attention_decoder.kernels.protocol import Kernels


class OneByOne:
    """`attend_causal` for backends that have no kernel of their own for it: a dense pass a query."""

    def attend_causal(self, query: Tensor, keys: Tensor | Packed, values: Tensor | Packed, scaling: float) -> Tensor:
        """Attention of the newest N tokens, causal among themselves.

        Args:
            query: [B, Hq, N, D]; keys [B, Hkv, T, D]; values [B, Hkv, T, Dv], any strides, N from 1 to T.
        Returns:
            [B, Hq, N, Dv]; query n has seen the first T - N + n + 1 tokens, none of which is padding.
        """
        before = keys.shape[2] - query.shape[2] + 1
        kernels = cast("Kernels", self)
        seen = (slice(0, before + n) for n in range(query.shape[2]))
        outputs = [
            kernels.attend_all(query[:, :, n], keys[:, :, own], values[:, :, own], None, scaling)
            for n, own in enumerate(seen)
        ]
        return torch.stack(outputs, 2)
