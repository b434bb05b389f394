"""The sketch's rotation: random signs, a Hadamard butterfly, a cosine transform over the odd part of D."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def rotate(x: Tensor) -> Tensor:
    """Rotate the last axis: random signs, a Hadamard butterfly, a cosine transform over the odd part of D.

    Returns float32 (float64 for float64). Every element is a chain of single additions in a fixed
    order, so a vector gets the same bits alone and in a batch: codes of keys appended one by one
    equal codes of keys appended together. A matrix product would not promise that.
    """
    size = x.shape[-1]
    power = size & -size
    x = _butterfly(x.to(work_dtype(x)) * _signs(size, x.device), power)
    return x if power == size else _mix(x, _cosine(size // power, x.device))


def unrotate(x: Tensor) -> Tensor:
    """Undo `rotate`, up to rounding; of a vector alone or in a batch it gives the same bits, too."""
    size = x.shape[-1]
    power = size & -size
    x = x.to(work_dtype(x))
    if power != size:
        x = _mix(x, _cosine(size // power, x.device).T)
    undone: Tensor = _butterfly(x, power) * _signs(size, x.device)
    return undone


def _butterfly(x: Tensor, power: int) -> Tensor:
    half = 1
    while half < power:
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return x * power**-0.5


def _mix(x: Tensor, weights: Tensor) -> Tensor:
    # products of blocks [.., P, power] with weights [P, P], summed one by one
    parts = len(weights)
    blocks, weights = x.unflatten(-1, (parts, -1)), weights.to(x.dtype)
    mixed: Tensor = weights[:, :1] * blocks[..., :1, :]
    for part in range(1, parts):
        mixed = mixed + weights[:, part : part + 1] * blocks[..., part : part + 1, :]
    return mixed.flatten(-2)


def rotation_parts(size: int) -> Tensor:
    """What `rotate` is made of, for kernels that do the same: scale, D signs, and the cosines row by row, float32."""
    power, device = size & -size, torch.device("cpu")
    scale = torch.tensor([power**-0.5], dtype=torch.float32)
    return torch.cat([scale, _signs(size, device).float(), _cosine(size // power, device).float().flatten()])


@lru_cache(maxsize=16)
def _signs(size: int, device: torch.device) -> Tensor:
    # drawn from a generator of our own: the same on every machine and in every process
    return (torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)) * 2 - 1).to(device)


@lru_cache(maxsize=16)
def _cosine(size: int, device: torch.device) -> Tensor:
    angles = torch.outer(torch.arange(size), torch.arange(size) + 0.5).double() * math.pi / size
    cosine = torch.cos(angles) * math.sqrt(2 / size)
    cosine[0] /= math.sqrt(2)
    return cosine.to(device)


def work_dtype(x: Tensor) -> torch.dtype:
    """What tensors like x are computed in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
