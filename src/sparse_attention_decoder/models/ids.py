"""Token ids that a model can read, checked before it does."""

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ContextLengthError, InputError


def check_ids(ids: Tensor, vocabulary: int, limit: int | None, past: int = 0, new_tokens: int = 0) -> None:
    """Refuse ids [B, T] that a model cannot read behind `past` tokens and before `new_tokens`.

    Args:
        limit: tokens the model was made for; None where nobody knows.
    Raises:
        InputError: empty, not integer, out of vocabulary. ContextLengthError: too long.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.numel() == 0:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids have shape {shape}; expected [B, T] with at least one token")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"input_ids are {ids.dtype}; expected integers, as a tokenizer gives them")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise InputError(
            f"token id {wrong} is outside the vocabulary of {vocabulary}; was another model's tokenizer used?"
        )
    total = past + ids.shape[1]
    if limit is not None and total + new_tokens > limit:
        way_out = f"shorten the prompt by {total + max(1, new_tokens) - limit} tokens"
        if total < limit:
            way_out += f" or use max_new_tokens={limit - total}"
        asked = f" and {new_tokens} new ones" if new_tokens else ""
        raise ContextLengthError(f"{total} tokens{asked} exceed the model's context of {limit}; {way_out}")
