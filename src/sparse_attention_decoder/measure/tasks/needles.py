"""Needles in a haystack: sentences that give a key its value, hidden in a long text; some keys are asked for.

Source: niah of RULER, arXiv:2404.06654, with its sentences, its numbers of needles and its 40 depths.
"""

import uuid
from collections.abc import Callable
from random import Random

from sparse_attention_decoder.measure.tasks import prose
from sparse_attention_decoder.measure.tasks.fit import fit
from sparse_attention_decoder.measure.tasks.protocol import Count, Example
from sparse_attention_decoder.measure.tasks.words import pairs

_DEPTHS = 40
# no needle has fewer tokens
_NEEDLE_TOKENS = 8


class Needles:
    """keys, values: keys with a needle, and needles of each; asked: how many keys the question names.

    named: what the values are called, "numbers" (of seven digits; the keys are words) or "uuids" (the keys too).
    new_tokens: what the values take, punctuation between them included.
    """

    keys, values, asked = 1, 1, 1
    named = "numbers"
    new_tokens = 32

    def example(self, tokens: int, count: Count, rng: Random, sample: int, samples: int) -> Example:
        """See `Task`."""
        keys = self._drawn_keys(rng, self.keys)
        values = self._drawn_values(rng, self.keys * self.values)
        values_of = {key: values[at :: self.keys] for at, key in enumerate(keys)}
        asked = keys[: self.asked]
        needles = [(key, self._needle(key, value)) for key in keys for value in values_of[key]]
        depths = self._depths(rng, len(needles), sample, samples)
        hidden = sorted((depth, needle) for depth, (_, needle) in zip(depths, needles, strict=True))

        answers = tuple(value for key in asked for value in values_of[key])
        instruction, question, prefix = self._asking(asked, len(answers) == 1)
        build = self._haystack(tokens, rng, hidden, taken={*keys, *values})
        room = tokens - self.new_tokens - count(f"{question} {prefix}")
        context = fit(lambda units: f"{instruction}\n{build(units)}", count, room, 2 * len(hidden), tokens)
        return Example(context, question, prefix, answers, self.new_tokens, depths[0] if len(answers) == 1 else None)

    def _haystack(
        self, tokens: int, rng: Random, hidden: list[tuple[float, str]], taken: set[str]
    ) -> Callable[[int], str]:
        """The text of n sentences with the needles at their depths."""
        sentences = prose.sentences(rng, tokens)
        return lambda units: " ".join(_hide(sentences[:units], hidden))

    def _depths(self, rng: Random, number: int, sample: int, samples: int) -> list[float]:
        return [depth / (_DEPTHS - 1) for depth in rng.sample(range(_DEPTHS), number)]

    def _drawn_keys(self, rng: Random, number: int) -> list[str]:
        return pairs(rng, number) if self.named == "numbers" else _uuids(rng, number)

    def _drawn_values(self, rng: Random, number: int) -> list[str]:
        if self.named == "uuids":
            return _uuids(rng, number)
        return [str(value) for value in rng.sample(range(10**6, 10**7), number)]

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.named} for {key} is: {value}."

    def _asking(self, asked: list[str], is_single: bool) -> tuple[str, str, str]:
        """Instruction, question and the beginning of the answer."""
        listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        if is_single:
            some, name, hidden, which, verb = "A", self.named[:-1], "is", "What is", "is"
        else:
            some, name, hidden, which, verb = "Some", self.named, "are", "What are all", "are"
        return (
            f"{some} special magic {name} {hidden} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {name} afterwards.",
            f"\n{which} the special magic {name} for {listed} mentioned in the provided text?",
            f"The special magic {name} for {listed} mentioned in the provided text {verb}",
        )


class Single(Needles):
    """One needle in prose, number i of n samples at depth i / (n - 1): niah_single_2 of RULER."""

    def _depths(self, rng: Random, number: int, sample: int, samples: int) -> list[float]:
        return [sample / (samples - 1) if samples > 1 else 0.5]


class MultiKey1(Needles):
    """Four needles in prose, one of them asked for."""

    keys = 4


class MultiKey2(Needles):
    """The haystack is needles too, of other keys."""

    def _haystack(
        self, tokens: int, rng: Random, hidden: list[tuple[float, str]], taken: set[str]
    ) -> Callable[[int], str]:
        number = tokens // _NEEDLE_TOKENS
        # as many more as could be those taken
        keys = [key for key in self._drawn_keys(rng, number + len(taken)) if key not in taken]
        values = [value for value in self._drawn_values(rng, number + len(taken)) if value not in taken]
        hay = [self._needle(key, value) for key, value in zip(keys[:number], values[:number], strict=True)]
        return lambda units: "\n".join(_hide(hay[:units], hidden))


class MultiKey3(MultiKey2):
    """Keys and values are UUIDs, and so is all the hay."""

    named = "uuids"
    new_tokens = 64


class MultiValue(Needles):
    """One key with four values, all asked for."""

    values = 4
    new_tokens = 80


class MultiQuery(Needles):
    """Four keys, all asked for."""

    keys, asked = 4, 4
    new_tokens = 80


def _hide(hay: list[str], hidden: list[tuple[float, str]]) -> list[str]:
    """The hay with the needles, sorted by depth, put where their depths say."""
    parts: list[str] = []
    done = 0
    for depth, needle in hidden:
        until = round(len(hay) * depth)
        parts += [*hay[done:until], needle]
        done = until
    return parts + hay[done:]


def _uuids(rng: Random, number: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(number)]
