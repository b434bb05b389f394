"""English words, from the package wonderwords as in RULER."""

from functools import cache
from random import Random

from sparse_attention_decoder.measure.tasks.extra import extra


@cache
def words(kind: str) -> tuple[str, ...]:
    """All words of a kind, sorted: "NOUNS", "ADJECTIVES" or "VERBS".

    Raises:
        UnsupportedError: wonderwords is not installed.
    """
    wonderwords = extra("wonderwords")
    found = wonderwords.RandomWord(kind=getattr(wonderwords.Defaults, kind)).filter()
    return tuple(sorted(set(found)))


def vocabulary() -> list[str]:
    """Nouns, adjectives and verbs, sorted, each word once."""
    return sorted({*words("NOUNS"), *words("ADJECTIVES"), *words("VERBS")})


def pairs(rng: Random, number: int) -> list[str]:
    """So many different pairs of an adjective and a noun, such as "quick-harbor"."""
    adjectives, nouns = words("ADJECTIVES"), words("NOUNS")
    drawn = rng.sample(range(len(adjectives) * len(nouns)), number)
    return [f"{adjectives[at // len(nouns)]}-{nouns[at % len(nouns)]}" for at in drawn]
