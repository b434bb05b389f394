"""Common words: a numbered list in which ten words stand more often than all others.

Source: common_words_extraction of RULER, arXiv:2404.06654, behind one solved example as there.
"""

from dataclasses import dataclass
from random import Random

from sparse_attention_decoder.measure.tasks.fit import fit
from sparse_attention_decoder.measure.tasks.protocol import Count, Example
from sparse_attention_decoder.measure.tasks.words import vocabulary

_COMMON = 10
_INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_NEW_TOKENS = 80


@dataclass(frozen=True)
class _Repeats:
    """How often a common word and another stand in the task and in its solved example, which has so many words."""

    common: int
    other: int
    example_words: int
    example_common: int
    example_other: int


# RULER's, and what it takes for texts too short for that
_LONG, _SHORT = _Repeats(30, 3, 40, 10, 3), _Repeats(6, 1, 20, 3, 1)
# RULER changes at 4096; a chat template takes some of that away before a task sees it
_LONG_FROM = 4000


class CommonWords:
    """Which ten words are the most common?"""

    def example(self, tokens: int, count: Count, rng: Random, sample: int, samples: int) -> Example:
        """See `Task`."""
        repeats = _LONG if tokens >= _LONG_FROM else _SHORT
        every = vocabulary()
        words, seed = rng.sample(every, repeats.example_words), rng.getrandbits(64)
        solved = (
            f"{_INSTRUCTION}\n{_list(words, repeats.example_common, repeats.example_other, seed)}"
            f"{_QUESTION} {_PREFIX} {_numbered(words[:_COMMON])}\n"
        )
        words, seed = rng.sample(every, len(every)), rng.getrandbits(64)
        context = fit(
            lambda number: f"{solved}{_INSTRUCTION}\n{_list(words[:number], repeats.common, repeats.other, seed)}",
            count,
            tokens - _NEW_TOKENS - count(f"{_QUESTION} {_PREFIX}"),
            # one that is not common, or there is nothing to tell apart
            _COMMON + 1,
            len(words),
        )
        return Example(context, _QUESTION, _PREFIX, tuple(words[:_COMMON]), _NEW_TOKENS, None)


def _list(words: list[str], common: int, other: int, seed: int) -> str:
    listed = words[:_COMMON] * common + words[_COMMON:] * other
    Random(seed).shuffle(listed)
    return _numbered(listed)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
