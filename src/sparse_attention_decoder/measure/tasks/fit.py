"""The longest text that fits, found with few counts: a long text takes a while to tokenise."""

from collections.abc import Callable

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.tasks.protocol import Count

# a text this close to the room is long enough to stop searching, and one this far from it is no such length
_CLOSE, _FAR = 0.97, 0.9
# the guesses aim between close and full
_AIM = 0.985
# after so many guesses the text is too uneven for a straight line: halve what is left
_GUESSES = 6


def fit(build: Callable[[int], str], count: Count, room: int, least: int, most: int) -> str:
    """`build(n)` of as many units n, from `least` to `most`, as fit into `room` tokens.

    Args:
        build: the text of n units; more units are more text, and the same n gives the same text.
    Returns:
        A text of at least 90 % of the room, and 97 % where units are that short.
    Raises:
        InputError: the shortest text does not fit, or the longest falls short.
    """
    best = build(least)
    shortest = size = count(best)
    if shortest > room:
        raise InputError(
            f"the shortest text has {shortest} tokens where {room} are left; ask for {shortest - room} more"
        )
    low, high, guess = least, most, least + 16
    guesses = 0
    while low < high and size < _CLOSE * room:
        guess = min(max(guess, low + 1), high)
        text = build(guess)
        counted = count(text)
        if counted <= room:
            low, best, size = guess, text, counted
        else:
            high = guess - 1
        guesses += 1
        slope = max((counted - shortest) / (guess - least), 0.01)
        guess = least + int((_AIM * room - shortest) / slope) if guesses < _GUESSES else (low + high + 1) // 2
    if size < _FAR * room:
        raise InputError(f"the longest text has {size} tokens where {room} are to be filled; ask for fewer tokens")
    return best
