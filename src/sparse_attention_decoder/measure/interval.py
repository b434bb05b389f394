"""95 % intervals of means, by bootstrap with a fixed seed."""

import torch
from torch import Tensor

RESAMPLES = 2000
# neighbouring tokens are alike: they are drawn together
BLOCK = 16


def of_tokens(values: Tensor) -> tuple[float, float]:
    """Interval of the mean of values [steps, B] that follow each other in B texts, drawn in blocks of 16 steps."""
    steps, texts = values.shape
    size = min(BLOCK, steps)
    blocks = values[: steps // size * size].reshape(-1, size, texts).mean(1)
    return of_samples(blocks.flatten())


def of_samples(values: Tensor) -> tuple[float, float]:
    """Interval of the mean of independent values [N]."""
    draws = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=draws)
    low, high = values.double()[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
