"""Sizes the kernels are compiled for, how many programs share a row, and the scratch they leave results in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sparse_attention_decoder.errors import ShapeError
from sparse_attention_decoder.kernels.protocol import BLOCK, Coded, Statistics
from sparse_attention_decoder.kernels.rotation import rotation_parts

P = ParamSpec("P")
R = TypeVar("R")

LOG2E = 1.4426950408889634
# programs per multiprocessor at most: as many as there is room for, or fewer where one sums up what all have done
SCORING, WEIGHING, SELECTING, ATTENDING = 3, 8, 2, 2
# tokens a step of each kernel takes; on a GPU many are in flight at once
SELECT_TILE, ATTEND_TILE, NEAR_TILE, ENCODE_TILE = 1024, 64, 64, 16
# near tokens that one program of the score kernel weighs
NEAR_SHARE = 128
# bins of a row's coarse histogram, and candidates of a row that its last program holds in registers
HISTOGRAM, CANDIDATES = 128, 2048


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Make the GPU of the first argument (a tensor or a Shape) the current one, as Triton launches on that."""

    @wraps(launch)
    def launched(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        if first.device.type != "cuda":
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return launched


def power_of_two(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, count - 1).bit_length()


@dataclass(frozen=True)
class Shape:
    """What a layer's tensors are like: B, Hkv, G = Hq / Hkv, D, Dv, dtype, device."""

    batch: int
    heads: int
    group: int
    dim: int
    value_dim: int
    device: torch.device

    @classmethod
    def of(cls, query: Tensor, heads: int, value_dim: int) -> "Shape":
        """Of queries [B, Hq, D] on this many KV heads."""
        batch, query_heads, dim = query.shape
        return cls(batch, heads, query_heads // heads, dim, value_dim, query.device)

    @property
    def rows(self) -> int:
        """Rows of the batch times KV heads."""
        return self.batch * self.heads

    @property
    def words(self) -> int:
        """32-bit words of code a token."""
        return -(-self.dim // 16)

    @property
    def code_bytes(self) -> int:
        """Bytes of code a token, padded to what an integer tensor core takes."""
        return max(32, power_of_two(4 * self.words))

    @property
    def stored_group(self) -> int:
        """Heads that a token's logits are stored for."""
        return power_of_two(self.group)

    @property
    def scored_group(self) -> int:
        """Heads that a tensor core scores at once."""
        return max(8, self.stored_group)

    @property
    def score_tile(self) -> int:
        """Tokens scored at once: as many as shared memory, for three tiles of codes, and registers allow."""
        return 512 if self.code_bytes == 32 and self.scored_group == 8 else 256

    @cached_property
    def multiprocessors(self) -> int:
        """Of the device; a few where the interpreter plays one."""
        if self.device.type != "cuda":
            return 4
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @property
    def fit_tile(self) -> int:
        """Keys that statistics are fitted on at once: what registers hold."""
        return 32 if self.dim <= 128 else 16

    def attend_tile(self, item_bytes: int) -> int:
        """Tokens attended to at once: three tiles of keys and values fit where a block has 99 KB of shared memory."""
        row_bytes = (power_of_two(self.dim) + power_of_two(self.value_dim)) * item_bytes
        return ATTEND_TILE * 512 // min(2048, max(512, power_of_two(row_bytes)))

    def programs(self, busy: int, least: int, tokens: int) -> int:
        """Programs for each row and head: at most `busy` a multiprocessor in all, of `least` tokens each at least."""
        return max(1, min(busy * self.multiprocessors // self.rows, -(-tokens // least), 64))

    def splits(self, busy: int, least: int, tokens: int) -> int:
        """The same, a power of two: where one program looks at what all of them left."""
        return 1 << (self.programs(busy, least, tokens).bit_length() - 1)


class Scratch:
    """What one kernel of a step leaves for the next: views of one buffer, sized for `room` tokens and `near` near ones.

    Histogram and turns are 0 between kernels. Layers may share a buffer if their steps run one after the other,
    as those of a stream do.
    """

    logits: Tensor
    base: Tensor
    peaks: Tensor
    masses: Tensor
    lse: Tensor
    blocks: Tensor
    listed: Tensor
    found: Tensor
    found_bits: Tensor
    reals: Tensor
    part_masses: Tensor
    kept: Tensor
    outputs: Tensor
    output_peaks: Tensor
    output_masses: Tensor
    tokens: Tensor
    counts: Tensor
    missing: Tensor
    histogram: Tensor
    turn: Tensor

    def __init__(self, shape: Shape, room: int, near: int, memory: Tensor | None = None) -> None:
        tile = shape.score_tile
        self.room = -(-(room + BLOCK) // tile) * tile
        self.score_splits = shape.programs(SCORING, tile, self.room)
        self.near_splits = -(-near // NEAR_SHARE)
        self.weigh_splits = shape.splits(WEIGHING, 2 * tile, self.room)
        self.select_splits = shape.splits(SELECTING, 2 * SELECT_TILE, self.room)
        self.attend_splits = shape.splits(ATTENDING, ATTEND_TILE, self.room)
        layout = self._layout(shape)
        if memory is None:
            size = sum(_aligned(torch.Size(sizes).numel() * dtype.itemsize) for dtype, sizes in layout.values())
            memory = torch.empty(size, dtype=torch.uint8, device=shape.device)
            # histogram and counters come last
            memory[-_aligned(4 * HISTOGRAM * shape.rows) - _aligned(4 * shape.rows) :] = 0
        self.memory = memory
        at = 0
        for name, (dtype, sizes) in layout.items():
            size = torch.Size(sizes).numel() * dtype.itemsize
            setattr(self, name, memory[at : at + size].view(dtype).view(sizes))
            at += _aligned(size)

    def _layout(self, shape: Shape) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        rows, stored, scored = shape.rows, shape.stored_group, shape.scored_group
        partials = self.score_splits + self.near_splits
        real, whole = torch.float32, torch.int32
        return {
            "logits": (torch.float16, (rows, self.room, stored)),
            "base": (real, (rows, self.room // shape.score_tile, scored)),
            "peaks": (real, (rows, partials, scored)),
            "masses": (real, (rows, partials, scored)),
            "lse": (real, (rows, stored)),
            "blocks": (whole, (rows, self.room // BLOCK)),
            "listed": (whole, (rows, self.room // BLOCK)),
            "found": (whole, (rows, self.room)),
            "found_bits": (whole, (rows, self.room)),
            "reals": (whole, (rows, self.weigh_splits)),
            "part_masses": (real, (rows, self.weigh_splits)),
            "kept": (whole, (rows, self.select_splits)),
            "outputs": (real, (rows, self.attend_splits, stored, power_of_two(shape.value_dim))),
            "output_peaks": (real, (rows, self.attend_splits, stored)),
            "output_masses": (real, (rows, self.attend_splits, stored)),
            "tokens": (whole, (rows, self.room)),
            "counts": (whole, (rows,)),
            "missing": (real, (rows,)),
            "histogram": (whole, (rows, HISTOGRAM)),
            "turn": (whole, (rows,)),
        }

    @property
    def attended(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the programs of the attend kernel leave for the last of them."""
        return self.outputs, self.output_peaks, self.output_masses, self.turn


class Plan:
    """What attention reads in a step, as `append_kernel` writes it: views of one int32 buffer.

    bounds: [B, 4].  near: [B, near].  turn: [1], a counter that is 0 between kernels.
    """

    def __init__(self, memory: Tensor, batch: int, near: int) -> None:
        self.bounds = memory[: 4 * batch].view(batch, 4)
        self.near = memory[4 * batch : (4 + near) * batch].view(batch, near)
        self.turn = memory[(4 + near) * batch :]

    @classmethod
    def empty(cls, batch: int, near: int, device: torch.device) -> Tensor:
        """The buffer."""
        return torch.zeros((4 + near) * batch + 1, dtype=torch.int32, device=device)


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def row_major(coded: Coded) -> tuple[Tensor, Tensor, Statistics]:
    """Codes, factors and statistics of a sketch, one KV head behind the other, as kernels walk them."""
    codes, factors = coded.codes, coded.factors
    of_row = codes.shape[1] * codes.stride(1), factors.shape[1] * factors.stride(1)
    if codes.shape[0] > 1 and (codes.stride(0), factors.stride(0)) != of_row:
        raise ShapeError("the rows of a sketch must lie behind each other, one KV head after the other")
    return codes, factors, coded.statistics


@lru_cache(maxsize=16)
def parts_on(dim: int, device: torch.device) -> Tensor:
    """`rotation_parts(dim)` on a device."""
    return rotation_parts(dim).to(device)


# every layer of every step asks the same
@lru_cache(maxsize=16)
def threshold_bits(threshold: float) -> int:
    """Bits of a float32: a share is above the threshold where its own are larger. Off is above every share."""
    if threshold <= 0:
        return 0x7F800000
    return int(torch.tensor(threshold, dtype=torch.float32).view(torch.int32))
