"""The dial: a closed loop that moves the threshold so that the estimated missing attention mass stays at a target.

The sketch's estimate ranks steps well and is biased low. Where a sample of the tail is read, the sample's exact logits
give a better one, see `unread_of_sample`. An audit reads all keys of one layer, which gives the true missing mass of
that step; audits of a layer correct its estimates, the sketch's by a factor, a sample's by an offset. It is an estimate
of an average and no bound: docs/experiments.md says how far it is off.
"""

import math

import torch
from torch import Tensor

from sparse_attention_decoder.config import LARGEST_THRESHOLD, AttentionConfig
from sparse_attention_decoder.ledger import Dialled
from sparse_attention_decoder.policies import Step
from sparse_attention_decoder.selection import Selection

# policies that say how much attention they miss
ESTIMATING = ("sketch", "oracle")
# one layer is audited every so many steps, the layers in turn
AUDIT_EVERY = 8
# these sparse steps audit one layer in so many, to begin with a factor of this text: at first, and about where the
# loop settles, for the bias depends on the threshold
FIRST_STEPS, FIRST_AUDITS = (1, 5), 5
# what audits found before any were made, and how many of them that counts as; for all layers, and for one
_PRIOR, _PRIOR_WEIGHT, _LAYER_WEIGHT = 1.0, 1.0, 4.0
# audits remembered, about: of all layers, and of one
_MEMORY, _LAYER_MEMORY = 128, 32
# audits without a difference that an offset begins with
_OFFSET_WEIGHT = 0.25
# share of the relative error that a step mends in the logarithm of the threshold, and the errors it believes: what is
# cut off above lets the mean mass come out above its target
_GAIN, _LEAST_ERROR, _MOST_ERROR = 0.2, -0.7, 3.0
_LEAST, _MOST = 1e-8, 0.05
# keys read at a time by an audit
_PIECE = 4096


class Ratio:
    """True over estimated mass, by sums that forget: samples that weigh more count more."""

    def __init__(self, memory: int) -> None:
        self._keep = 1 - 1 / memory
        self.estimated = self.true = 0.0

    def add(self, estimated: float, true: float) -> None:
        """One audit."""
        self.estimated = self._keep * self.estimated + estimated
        self.true = self._keep * self.true + true

    def factor(self, prior: float, weight: float) -> float:
        """The ratio, where `weight` of estimated mass at the ratio `prior` count as samples too."""
        return (prior * weight + self.true) / (weight + self.estimated)


class Offset:
    """True minus estimated mass, a mean that forgets: what a sample does not see where the sketch is far off."""

    def __init__(self, memory: int) -> None:
        self._keep = 1 - 1 / memory
        self._sum = self._count = 0.0

    def add(self, estimated: float, true: float) -> None:
        """One audit."""
        self._sum = self._keep * self._sum + true - estimated
        self._count = self._keep * self._count + 1

    @property
    def value(self) -> float:
        """What is to be added to an estimate."""
        return self._sum / (self._count + _OFFSET_WEIGHT)


class Dial:
    """What the layers of one cache share: the target, the threshold in force, and what all audits found.

    Args:
        target: the missing attention mass to hold, mean over layers, rows and KV heads.
        threshold: where to start; layers whose own threshold is another keep their ratio to it.
    """

    def __init__(self, target: float, threshold: float) -> None:
        self.target, self.start = target, threshold
        self.layers = 0
        self.reset()

    @classmethod
    def of(cls, config: AttentionConfig) -> "Dial | None":
        """The dial that a config asks for; None for a fixed threshold, or a policy that makes no estimate."""
        if config.missing_mass is None or not config.threshold or config.policy not in ESTIMATING:
            return None
        return cls(config.missing_mass, config.threshold)

    def reset(self) -> None:
        """Forget everything but the layers."""
        self.threshold = self.start
        self.found = Ratio(_MEMORY)
        self._steps = self._moves = 0
        self._sum, self._count = 0.0, 0

    @property
    def factor(self) -> float:
        """What the sketch's estimates are to be multiplied by, as far as all layers' audits tell."""
        return self.found.factor(_PRIOR, _PRIOR_WEIGHT * self.target)

    def begin(self, step: int) -> None:
        """A layer begins its sparse step number `step`, from 1 on: the first to do so moves the threshold."""
        if step <= self._steps:
            return
        self._steps = step
        if self._count:
            self._moves += 1
            error = self._sum / self._count / self.target - 1
            gain = max(_GAIN, 1 / (1 + self._moves))
            moved = self.threshold * math.exp(-gain * max(_LEAST_ERROR, min(_MOST_ERROR, error)))
            self.threshold = max(_LEAST, min(_MOST, moved))
        self._sum, self._count = 0.0, 0

    def see(self, estimated: float) -> None:
        """A layer's corrected estimate in the step that runs."""
        self._sum += estimated
        self._count += 1


class LayerDial:
    """One layer's part: its own factor, and whose turn it is to be audited.

    threshold: that of the layer, where the dial starts.
    """

    def __init__(self, dial: Dial, threshold: float) -> None:
        self._dial, self._number, self._scale = dial, dial.layers, threshold / dial.start
        dial.layers += 1
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._dial.reset()
        self._step, self._found, self._offset = 0, Ratio(_LAYER_MEMORY), Offset(_LAYER_MEMORY)

    @property
    def threshold(self) -> float:
        """In force now."""
        return min(self._scale * self._dial.threshold, LARGEST_THRESHOLD)

    @property
    def factor(self) -> float:
        """For the sketch's estimates of this layer; with few audits near what all layers' audits say."""
        return self._found.factor(self._dial.factor, _LAYER_WEIGHT * self._dial.target)

    @property
    def is_audited(self) -> bool:
        """Whether the step that has begun is audited in this layer."""
        if self._step in FIRST_STEPS:
            return self._number % FIRST_AUDITS == self._step % min(FIRST_AUDITS, self._dial.layers)
        turn, rest = divmod(self._step, AUDIT_EVERY)
        return rest == 0 and self._number == turn * _stride(self._dial.layers) % self._dial.layers

    def begin(self) -> float:
        """A sparse step begins; its threshold."""
        self._step += 1
        self._dial.begin(self._step)
        return self.threshold

    def follow(self, step: Step, selection: Selection, dense: list[bool]) -> Dialled:
        """The step is done: learn from it.

        Args:
            selection: what it read, with the mass that the sketch estimates to be missing.
            dense: rows that were read whole in place of this; they do not count.
        """
        assert selection.missing_mass is not None
        sparse = [row for row, is_dense in enumerate(dense) if not is_dense]
        # a list at once: indexing a tensor costs more than the sum
        by_row = selection.missing_mass.mean(-1).tolist()
        estimated = sum(by_row[row] for row in sparse) / len(sparse)
        is_sampled = selection.log_weights is not None
        factor, offset = (1.0, self._offset.value) if is_sampled else (self.factor, 0.0)
        true, tokens = None, 0
        self._dial.see(max(0.0, factor * estimated + offset))
        if self.is_audited:
            true = float(true_missing(step, selection)[sparse].mean())
            tokens = sum(step.rows.counts) * step.buffer.shape[1]
            for found in (self._offset,) if is_sampled else (self._found, self._dial.found):
                found.add(estimated, true)
        return Dialled(step.threshold, factor, offset, true, tokens)


def unread_of_sample(step: Step, selection: Selection, lse: Tensor) -> Tensor:
    """[B, Hkv], what tokens of a sampled tail stand for beside themselves: shares of attention, mean over query heads.

    A token is read with a probability that the sketch made up, and stands for so many by its exact logit: expected over
    samples that is the attention on tokens not read, however wrong the sketch is (Horvitz and Thompson, 1952).

    Args:
        selection: what was read beside sinks and window, with log_weights.
        lse: [B, Hq], log-sum-exp of all that was read, weights included.
    """
    assert selection.log_weights is not None
    logits = step.kernels.exact_logits(step.query, step.buffer.keys, selection.tokens, step.scaling)
    logits = logits - lse.unflatten(1, (logits.shape[1], -1)).unsqueeze(-1)
    unread: Tensor = (logits + selection.log_weights.unsqueeze(2)).exp() - logits.exp()
    return unread.masked_fill(~selection.chosen.unsqueeze(2), 0).sum(-1).mean(2)


def true_missing(step: Step, selection: Selection) -> Tensor:
    """[B, Hkv], share of the attention (mean over the query heads) on tokens that a step does not read; reads all keys.

    Args:
        selection: what it reads beside sinks and window.
    """
    keys, valid = step.buffer.keys, step.rows.valid
    batch, heads, length, _ = keys.shape
    pieces = []
    for start in range(0, length, _PIECE):
        tokens = torch.arange(start, min(start + _PIECE, length), device=keys.device).expand(batch, heads, -1)
        pieces.append(step.kernels.exact_logits(step.query, keys, tokens, step.scaling))
    logits = torch.cat(pieces, -1)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -math.inf)
    shares = logits.softmax(-1).mean(2)
    tokens, counted = step.regions.with_chosen(selection)
    # added, not set: filler may repeat a position that counts
    once = torch.ones_like(tokens) if counted is None else counted.long()
    read = torch.zeros(shares.shape, dtype=torch.int64, device=shares.device).scatter_add_(-1, tokens, once)
    return shares.masked_fill(read > 0, 0).sum(-1)


def _stride(layers: int) -> int:
    """Steps through the layers so that neighbours in time are far apart in depth, and all have their turn."""
    stride = max(1, round(0.382 * layers))
    while math.gcd(stride, layers) > 1:
        stride += 1
    return stride
