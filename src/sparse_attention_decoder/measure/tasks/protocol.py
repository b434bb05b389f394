"""What a task gives: an Example, made from a seed alone."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

# tokens of a text
Count = Callable[[str], int]


@dataclass(frozen=True)
class Example:
    """A long text, what is asked about it, and what has to come out.

    context: instruction and text, everything before the question.
    question: what is asked, with the line break that parts it from the context.
    prefix: how the answer begins; the model writes on from there.
    answers: the strings expected.
    new_tokens: how many tokens an answer may have.
    depth: where in the text the answer is, 0 at its start and 1 at its end; None where it is all over.
    """

    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    new_tokens: int
    depth: float | None


class Task(Protocol):
    """Makes examples of one kind, of any length."""

    def example(self, tokens: int, count: Count, rng: Random, sample: int, samples: int) -> Example:
        """Sample number `sample` (from 0) of `samples`.

        Args:
            tokens: what prompt and answer may have together; at least 90 % of it is used.
            count: tokens of a text, special tokens left out.
            rng: from `seeded`; everything random is drawn from it.
        Raises:
            InputError: fewer tokens than the task can be put in.
            UnsupportedError: a package of the extra `measure` is missing.
        """
        ...


def seeded(seed: int, task: str, tokens: int, sample: int) -> Random:
    """The generator for one example: the same numbers on every machine and Python version."""
    return Random(f"{seed}/{task}/{tokens}/{sample}")
