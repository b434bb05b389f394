"""English prose that every Python has: its language reference, as sentences.

RULER hides its needles in essays that cannot be shipped. The reference grows with Python, so another
minor version gives another text around the same needles.
"""

import re
from functools import cache
from itertools import chain, cycle
from random import Random

_SENTENCE_END = re.compile(r"(?<=[.!?:]) (?=[A-Z])")
# longer ones are tables, and shorter ones are rests of lists
_WORDS = range(4, 41)


def sentences(rng: Random, words: int) -> list[str]:
    """Sentences of at least so many words together, chapter by chapter in an order of `rng`'s.

    All chapters come before one comes again.
    """
    chapters = list(_chapters())
    rng.shuffle(chapters)
    # chapters repeat parts of each other
    different = dict.fromkeys(chain.from_iterable(chapters))
    taken: list[str] = []
    for sentence in cycle(different):
        taken.append(sentence)
        words -= len(sentence.split())
        if words <= 0:
            return taken
    return taken


@cache
def _chapters() -> tuple[tuple[str, ...], ...]:
    # imported here: half a megabyte of text
    from pydoc_data.topics import topics

    return tuple(tuple(_prose(text)) for _, text in sorted(topics.items()))


def _prose(chapter: str) -> list[str]:
    # code and grammar do not start with a capital; what ends with a colon leads to them
    paragraphs = [" ".join(paragraph.split()) for paragraph in chapter.split("\n\n")]
    found = chain.from_iterable(_SENTENCE_END.split(paragraph) for paragraph in paragraphs if paragraph[:1].isupper())
    return [sentence for sentence in found if sentence.endswith(".") and len(sentence.split()) in _WORDS]
