"""Frequent words: made-up words whose numbers fall with the square of their rank; dots are the noise.

Source: freq_words_extraction of RULER, arXiv:2404.06654, with alpha = 2.
"""

import math
import string
from random import Random

from sparse_attention_decoder.measure.tasks.fit import fit
from sparse_attention_decoder.measure.tasks.protocol import Count, Example

_INSTRUCTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_NEW_TOKENS = 50
_LETTERS = 6
_TOKENS_A_WORD = 50
# the fewest for which the third and the fourth word differ in number
_LEAST_WORDS = 100
# zeta(2): the sum of 1 / rank ** 2
_ZETA = math.pi**2 / 6


class FrequentWords:
    """Which three words are the most frequent?"""

    def example(self, tokens: int, count: Count, rng: Random, sample: int, samples: int) -> Example:
        """See `Task`."""
        ranked: dict[str, None] = {"...": None}
        while len(ranked) < max(6, tokens // _TOKENS_A_WORD):
            ranked["".join(rng.choices(string.ascii_lowercase, k=_LETTERS))] = None
        words, seed = list(ranked), rng.getrandbits(64)
        context = fit(
            lambda number: f"{_INSTRUCTION} {_text(words, number, seed)}",
            count,
            tokens - _NEW_TOKENS - count(f"{_QUESTION} {_PREFIX}"),
            _LEAST_WORDS,
            # a sixth of the words sampled are ranks that round to none
            2 * tokens,
        )
        return Example(context, _QUESTION, _PREFIX, tuple(words[1:4]), _NEW_TOKENS, None)


def _text(words: list[str], number: int, seed: int) -> str:
    coded: list[str] = []
    for rank, word in enumerate(words, start=1):
        coded += [word] * int(number / (_ZETA * rank**2))
    Random(seed).shuffle(coded)
    return " ".join(coded)
