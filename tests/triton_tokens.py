"""A layer whose length the device counts, as the torch ops of Triton's kernels take it, for their tests."""

import math

import torch
from cases import REFERENCE, randn, skewed_keys
from torch import Tensor
from triton_cases import home, on

from sparse_attention_decoder.cache import Sketch
from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.kernels.triton import ops
from sparse_attention_decoder.kernels.triton.shapes import Plan, Scratch, Shape
from sparse_attention_decoder.selection import Rows

OPS = ops


class Tokens:
    """Room for `room` tokens, damaged where nothing was written; a text to fill it with; and what ops need beside."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        room: int,
        starts: tuple[int, ...] = (0,),
        heads: int = 2,
        group: int = 3,
        dim: int = 24,
        value_dim: int = 32,
        sinks: int = 2,
        window: int = 5,
        dense: int = 7,
    ) -> None:
        self.sinks, self.window, self.dense, self.room, self.device = sinks, window, dense, room, device
        batch, self.heads, self.first = len(starts), heads, starts
        # the text to come, with a token for which there is no room
        self.text = (
            randn(2, batch, heads * group, room + 1, dim, dtype=dtype) / 4,
            skewed_keys(0, batch, heads, room + 1, dim, dtype=dtype),
            randn(1, batch, heads, room + 1, value_dim, dtype=dtype),
        )
        self.text_there = on(device, self.text)
        self.keys = torch.full((batch, heads, room, dim), math.nan, dtype=dtype, device=device)
        self.values = torch.full((batch, heads, room, value_dim), math.nan, dtype=dtype, device=device)
        moments = Statistics(torch.zeros(batch, heads, dim), torch.ones(batch, heads, dim))
        self.coded = on(device, Coded.room(room, moments))
        self.coded.codes.fill_(0xA5)
        self.coded.factors.fill_(math.nan)
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self.plan = Plan.empty(batch, sinks + window, device)
        self.shape = Shape(batch, heads, group, dim, value_dim, device)
        self.scratch = Scratch(self.shape, room, sinks + window).memory
        self.tally = torch.zeros(batch * heads, 6, dtype=torch.float64, device=device)

    @property
    def sketch(self) -> tuple[Tensor, ...]:
        moments = self.coded.statistics
        return self.coded.codes, self.coded.factors, moments.mean, moments.deviation

    @property
    def written(self) -> tuple[Tensor, ...]:
        """All that an append may change."""
        return self.keys, self.values, *self.sketch, self.length, self.plan

    def rows(self, tokens: int) -> Rows:
        """The first tokens of the text, padded on the left as the starts say."""
        return Rows.from_mask(torch.arange(tokens) >= torch.tensor(self.first).unsqueeze(-1))

    def defined(self, tokens: int) -> Coded:
        """The sketch that the definition makes of the first tokens of the text."""
        sketch = Sketch(REFERENCE, self.sinks)
        sketch.catch_up(self.text[1][:, :, :tokens], self.rows(tokens), tokens)
        return sketch.coded

    def prefill(self, tokens: int) -> None:
        """Hold the first tokens of the text."""
        _, keys, values = self.text_there
        self.keys[:, :, :tokens], self.values[:, :, :tokens] = keys[:, :, :tokens], values[:, :, :tokens]
        moments = self.defined(tokens).statistics
        self.coded.statistics.mean.copy_(moments.mean)
        self.coded.statistics.deviation.copy_(moments.deviation)
        REFERENCE.encode(self.keys[:, :, :tokens], self.coded, 0)
        self.length.fill_(tokens)

    def append_arguments(self, at: int) -> tuple[object, ...]:
        _, keys, values = self.text_there
        new = keys[:, :, at], values[:, :, at]
        return (
            *new, self.keys, self.values, *self.sketch, self.length, self.starts, self.plan,
            self.sinks, self.window, self.dense,
        )  # fmt: skip

    def read_arguments(self, at: int, floor: int, tau: float, scaling: float) -> tuple[object, ...]:
        return (
            self.text_there[0][:, :, at], self.keys, self.values, *self.sketch, self.plan, self.scratch, self.tally,
            self.sinks + self.window, floor, tau, scaling,
        )  # fmt: skip

    def append(self, at: int) -> None:
        """Append token `at` of the text, which is where the device should be."""
        OPS.append_token(*self.append_arguments(at))

    def read(self, at: int, floor: int, tau: float, scaling: float) -> Tensor:
        """Attend the query of token `at` to what is held."""
        return OPS.read_tokens(*self.read_arguments(at, floor, tau, scaling))

    @property
    def divided(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds [B, 4], near [B, sinks + window] and turn [1], as the last append left them."""
        plan = Plan(home(self.plan), len(self.first), self.sinks + self.window)
        return plan.bounds, plan.near, plan.turn
