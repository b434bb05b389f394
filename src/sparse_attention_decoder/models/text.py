"""A text as it is generated, and how its next token is chosen: greedily, or with numbers drawn once for each place."""

import sys

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList


class Text:
    """The ids so far, and how the next one is chosen."""

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, samples: bool
    ) -> None:
        self.ids = ids
        self._processors, self._criteria, self._samples = processors, criteria, samples
        # of the places to come, the first of them the next token's
        self._noise: list[Tensor] = []

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        most = self._criteria.max_length
        return sys.maxsize if most is None else int(most) - self.ids.shape[1]

    def choose(self, before: Tensor, logits: Tensor, ahead: int) -> tuple[int, float]:
        """The token that follows ids [1, T], and its probability, by logits [1, V]; `ahead` places from the next."""
        scores = self._processors(before, logits)
        probabilities = scores.softmax(-1)
        if not self._samples:
            token = int(scores.argmax(-1))
            return token, float(probabilities[0, token])
        while len(self._noise) <= ahead:
            self._noise.append(torch.empty_like(probabilities).exponential_(1))
        # as torch.multinomial does, of numbers drawn in the same order
        token = int((probabilities / self._noise[ahead]).argmax(-1))
        return token, float(probabilities[0, token])

    def take(self, token: int) -> bool:
        """Add a token; whether the text ends with it."""
        self.ids = torch.cat([self.ids, torch.tensor([[token]], device=self.ids.device)], 1)
        del self._noise[:1]
        return bool(self._criteria(self.ids, None).all())
