"""How long a draft should be: one token more as long as it is worth its time."""

from sparse_attention_decoder.models.verifying import MOST_VERIFIED

# chances that a token is accepted are counted by the probability that its draft gave it
_EDGES = (0.25, 0.5, 0.75, 0.95)
# what is counted before anything was seen: so many tokens, so many of them accepted
_PRIOR = (5.0, 4.0)
# older measurements fade by this factor
_FADE = 0.9
# rounds after which drafting has to have paid, and tokens drafted in each of them at least: few, for luck decides them
_TRIAL, _TRIED = 4, 2
# tokens decoded without drafts before they are tried again, the first time, and how much longer it is each time
_PAUSE, _LONGER = 16, 3
# time per token, relative to that without drafts, from which drafting is given up; and dense passes' time lost at most
_WORTH, _LOSS = 0.98, 1.5
# a round that took more than so many times what its steps and pass take was disturbed: it counts as so many times that
_DISTURBED = 1.5
# a token without a draft now and then, for what drafts are compared with grows with the context
_CALIBRATION = 128


class Pace:
    """Measured times and acceptance in, the length of drafts out.

    drafts: how many tokens to draft always; None adapts.
    """

    def __init__(self, drafts: int | None = None) -> None:
        self._drafts = drafts
        # seconds of: a draft step, a dense pass over one token, each further token in it; a token when drafting
        self._step: float | None = None
        self._alone: float | None = None
        self._further: float | None = None
        self._spent, self._gained, self._rounds = 0.0, 0.0, 0
        self._tries = [_PRIOR[0]] * (len(_EDGES) + 1)
        self._hits = [_PRIOR[1]] * (len(_EDGES) + 1)
        self._paused, self._pause, self._since = 0, _PAUSE, 0

    @property
    def pays(self) -> bool:
        """Whether drafting is worth its time, as far as is known."""
        return self._drafts is not None or self._paused == 0

    def goes_on(self, drafted: int, chance: float) -> bool:
        """Whether to draft another token, all `drafted` so far being right with this chance."""
        if drafted >= MOST_VERIFIED - 1:
            return False
        if self._drafts is not None:
            return drafted < self._drafts
        if self._paused or self._alone is None or self._since >= _CALIBRATION:
            return False
        if drafted < _TRIED and self._rounds < _TRIAL:
            return True
        # what a token is worth is the time that it takes otherwise
        return self._is_worth(chance, self._alone if not self._rounds else min(self._alone, self._spent / self._gained))

    def _is_worth(self, chance: float, worth: float) -> bool:
        if self._step is None or self._further is None:
            return False
        return chance * sum(self._hits) / sum(self._tries) * worth > self._step + self._further

    def chance(self, probability: float) -> float:
        """How likely a drafted token of this probability is accepted."""
        place = _place(probability)
        return self._hits[place] / self._tries[place]

    def record_step(self, seconds: float) -> None:
        """A draft step took so long."""
        self._step = _least(self._step, seconds)

    def record_pass(self, tokens: int, seconds: float) -> None:
        """A dense pass over so many tokens took so long."""
        if tokens == 1:
            declined = not self._paused and self._rounds >= _TRIAL and self._since < _CALIBRATION
            self._alone = _least(self._alone, seconds)
            self._since = 0
            self._paused = max(0, self._paused - 1)
            if declined:
                # what a token took is of other times; a draft may still be worth it beside tokens without
                self._spent, self._gained = self._alone, 1.0
                if not self._is_worth(1.0, self._alone):
                    self._rest()
        elif self._alone is not None:
            self._further = _least(self._further, max(0.0, seconds - self._alone) / (tokens - 1))

    def record_round(self, probabilities: list[float], accepted: int, seconds: float) -> None:
        """A draft of tokens with these probabilities was verified: the first `accepted` of them were right."""
        for number, probability in enumerate(probabilities[: accepted + 1]):
            place = _place(probability)
            self._tries[place] = self._tries[place] * 0.99 + 1
            self._hits[place] = self._hits[place] * 0.99 + (number < accepted)
        self._rounds += 1
        self._since += accepted + 1
        if self._step is not None and self._alone is not None and self._further is not None:
            usual = len(probabilities) * (self._step + self._further) + self._alone
            seconds = min(seconds, _DISTURBED * usual)
        self._spent, self._gained = self._spent * _FADE + seconds, self._gained * _FADE + accepted + 1
        if self._drafts is not None or self._alone is None:
            return
        has_lost = self._spent - self._gained * self._alone > _LOSS * self._alone
        if has_lost or (self._rounds >= _TRIAL and self._spent > _WORTH * self._gained * self._alone):
            self._rest()

    def _rest(self) -> None:
        self._paused, self._pause = self._pause, _LONGER * self._pause
        self._rounds, self._spent, self._gained = 0, 0.0, 0.0

    def __str__(self) -> str:
        times = (self._step, self._alone, self._further)
        step, alone, further = (f"{1e3 * (seconds or 0):.0f} ms" for seconds in times)
        return f"a draft step takes {step}, a dense pass {alone} and {further} for each token more"


def _place(probability: float) -> int:
    return sum(probability >= edge for edge in _EDGES)


def _least(before: float | None, now: float) -> float:
    """A measurement that follows slower ones slowly: some are those of memory that was never touched."""
    return now if before is None else min(now, before / _FADE)
