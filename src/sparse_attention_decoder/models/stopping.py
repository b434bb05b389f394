"""Ending a generation from another thread."""

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopWhen(StoppingCriteria):
    """Ends a generation at the next token once `now` is set."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row [B] is done: all or none."""
        return torch.full((input_ids.shape[0],), self.now.is_set(), device=input_ids.device)
