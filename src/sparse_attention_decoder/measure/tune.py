"""The cheapest config that holds a target on a text: searched for by rehearsal, claimed by decoding held-out text."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import TargetError
from sparse_attention_decoder.measure.interval import of_tokens
from sparse_attention_decoder.measure.rehearsal import Rehearsal, Rehearsed

# thresholds looked at; below the least everything of weight is read
LEAST, MOST = 1e-7, 2e-2
# rehearsals of one shape of config, and how near to the target is near enough
TRIES, NEAR = 7, 0.88
# about the power of the threshold that the KL goes with: where to look next
_POWER = 1.4
# a layer is rehearsed this much above and below the threshold that serves all of them
_ASIDE = 2.5
# a change that saves less than this share of the bytes is not worth an odd config
_WORTH = 0.01
STRENGTHS, WINDOWS, FLOORS = (0.5, 0.75, 1.0), (64, 128), (8,)


@dataclass(frozen=True)
class Target:
    """What must hold: one of the two.

    max_kl: mean KL divergence of the next-token distributions from dense ones, nats.
    max_change: of perplexity, either way, as a share: 0.01 is one percent.
    """

    max_kl: float | None = None
    max_change: float | None = None

    def strain(self, kl: Tensor, ce_change: Tensor) -> float:
        """How much of the target the upper end of the 95 % interval takes up, of values [N, B]; above 1 is missed."""
        if self.max_kl is not None:
            return max(0.0, of_tokens(kl)[1]) / self.max_kl
        assert self.max_change is not None
        low, high = (math.expm1(end) for end in of_tokens(ce_change))
        return max(abs(low), abs(high)) / self.max_change

    def is_met(self, kl: float, ce_change: float) -> bool:
        """Whether means hold the target."""
        if self.max_kl is not None:
            return kl <= self.max_kl
        assert self.max_change is not None
        return abs(math.expm1(ce_change)) <= self.max_change

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"KL {self.max_kl:g}"
        return f"perplexity change {self.max_change:.2%}"


@dataclass(frozen=True)
class Tried:
    """A config that was rehearsed, and what came of it."""

    config: AttentionConfig
    found: Rehearsed
    strain: float


class Search:
    """Coordinate descent from the default: the threshold is dialled to the target, then the rest is changed in turn.

    Args:
        rehearsal: of the text to tune on.
        target: what the upper end of each interval must hold.
        on_stage: told in words what is tried. on_pass: called after each rehearsal, with how many there were.
    tried: everything that was dialled to the target, in order: the plain rule first.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        target: Target,
        on_stage: Callable[[str], None] = lambda words: None,
        on_pass: Callable[[int], None] = lambda passes: None,
    ) -> None:
        self._rehearsal, self._target = rehearsal, target
        self._on_stage, self._on_pass = on_stage, on_pass
        self._passes = 0
        self.tried: list[Tried] = []

    @property
    def most_passes(self) -> int:
        """Rehearsals it takes at most."""
        return TRIES * (2 + len(STRENGTHS) + len(WINDOWS) + len(FLOORS)) + 2 * self._rehearsal.layers

    def run(self, start: AttentionConfig) -> Tried:
        """The cheapest config found.

        Raises:
            TargetError: not even the least threshold holds the target.
        """
        best = self.dial(start, "one threshold for all layers")
        if best is None:
            raise TargetError(
                f"{self._target} cannot be held on this text: even a threshold of {LEAST:g} loses more, by the upper "
                f"end of the interval of {self._rehearsal.tokens} tokens; ask for less, or give more text or tokens"
            )
        for strength in STRENGTHS:
            best = self._better(best, replace(best.config, far_field=strength), f"the far field times {strength:g}")
        best = self._better(best, replace(best.config, layer_scales=self.scales(best.config)), "thresholds by layer")
        for window in WINDOWS:
            if window < best.config.attention_window:
                best = self._better(best, replace(best.config, attention_window=window), f"a window of {window}")
        for floor in FLOORS:
            best = self._better(best, replace(best.config, top_k=floor), f"a floor of {floor}")
        return best

    def dial(self, config: AttentionConfig, words: str) -> Tried | None:
        """The config with the largest threshold that holds the target; None if there is none."""
        self._on_stage(words)
        low, high, guess = LEAST, MOST, min(max(config.threshold or 1e-4, LEAST), MOST)
        best: Tried | None = None
        for _ in range(TRIES):
            tried = self._try(replace(config, threshold=guess))
            if tried.strain <= 1:
                best = tried if best is None or tried.found.share_read < best.found.share_read else best
                low = max(low, guess)
            else:
                high = min(high, guess)
            if NEAR <= tried.strain <= 1 or (best is None and guess == LEAST) or guess == MOST:
                break
            step = guess * (0.95 / max(tried.strain, 1e-3)) ** (1 / _POWER)
            step = min(max(step, LEAST), MOST)
            guess = step if low < step < high or step in (LEAST, MOST) else math.sqrt(low * high)
        if best is not None:
            self.tried.append(best)
        return best

    def scales(self, config: AttentionConfig) -> tuple[float | None, ...]:
        """Thresholds by layer, over a common one, that ought to cost least at the KL of this config.

        Every layer is rehearsed alone at two thresholds. KL and tokens are taken to be powers of the threshold, and the
        KL of all layers to be the sum; then a nat buys the same number of tokens in every layer.
        """
        self._on_stage("what each layer loses on its own")
        base = config.threshold or 1e-4
        plain, layers = replace(config, layer_scales=None), []
        for number in range(self._rehearsal.layers):
            pair = [self._layer(plain, number, threshold) for threshold in (base * _ASIDE, base / _ASIDE)]
            layers.append(_Layer(base * _ASIDE, base / _ASIDE, pair[0], pair[1]))
        wanted = sum(layer.at(base)[0] for layer in layers)
        low, high = 1.0, 1e12
        for _ in range(60):
            price = math.sqrt(low * high)
            chosen = [layer.cheapest(price) for layer in layers]
            if sum(layer.at(one)[0] for layer, one in zip(layers, chosen, strict=True)) > wanted:
                low = price
            else:
                high = price
        return tuple(round(one / base, 3) for one in chosen)

    def _layer(self, config: AttentionConfig, number: int, threshold: float) -> tuple[float, float]:
        """KL and tokens retrieved when this layer alone is sparse."""
        found = self._run(replace(config, threshold=threshold), number)
        return float(found.kl.mean()), found.retrieved[number]

    def _better(self, best: Tried, config: AttentionConfig, words: str) -> Tried:
        other = self.dial(config, words)
        worth = best.found.share_read * (1 - _WORTH)
        return other if other is not None and other.found.share_read < worth else best

    def _try(self, config: AttentionConfig) -> Tried:
        found = self._run(config)
        return Tried(config, found, self._target.strain(found.kl, found.ce_change))

    def _run(self, config: AttentionConfig, only: int | None = None) -> Rehearsed:
        found = self._rehearsal.run(config, only)
        self._passes += 1
        self._on_pass(self._passes)
        return found


class _Layer:
    """KL and tokens of one layer as powers of its threshold, through two rehearsals (KL, tokens)."""

    def __init__(self, above: float, below: float, many: tuple[float, float], few: tuple[float, float]) -> None:
        self._above, self._most, self._least = above, above * _ASIDE**2, below / _ASIDE**2
        # both grow with fewer tokens; noise must not turn that round
        self._values = [max(value, 1e-12) for value in many]
        ratio = math.log(above / below)
        self._powers = [
            math.log(max(one, 1e-12) / max(other, 1e-12)) / ratio for one, other in zip(many, few, strict=True)
        ]
        self._powers = [max(self._powers[0], 0.3), min(self._powers[1], -0.05)]

    def at(self, threshold: float) -> tuple[float, float]:
        """KL and tokens."""
        kl, tokens = (value * (threshold / self._above) ** power
                      for value, power in zip(self._values, self._powers, strict=True))  # fmt: skip
        return kl, tokens

    def cheapest(self, price: float) -> float:
        """The threshold at which tokens + price * KL are least, within what two rehearsals can tell."""
        grid = torch.logspace(math.log10(self._least), math.log10(self._most), 200, dtype=torch.float64).tolist()
        return float(min(grid, key=lambda one: self.at(one)[1] + price * self.at(one)[0]))
