"""Variable tracking: a value handed from variable to variable, in lines strewn over a text of noise.

Source: variable_tracking of RULER, arXiv:2404.06654: one chain of four hops, behind one solved example.
"""

import string
from random import Random

from sparse_attention_decoder.measure.tasks.fit import fit
from sparse_attention_decoder.measure.tasks.protocol import Count, Example

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text."
_VARIABLES = 5
# of a variable's name in the task, and in the solved example
_LETTERS, _EXAMPLE_LETTERS = 5, 3
_EXAMPLE_NOISE = 10
_NEW_TOKENS = 40


class VariableTracking:
    """Which variables have the value? All five of the chain."""

    def example(self, tokens: int, count: Count, rng: Random, sample: int, samples: int) -> Example:
        """See `Task`."""
        solved_value, solved_names, seed = _value(rng), _names(rng, _EXAMPLE_LETTERS), rng.getrandbits(64)
        solved = (
            f"{_INSTRUCTION}\n\n{_text(_EXAMPLE_NOISE, solved_value, solved_names, seed)}"
            f"{_question(solved_value)} {_prefix(solved_value)} {' '.join(solved_names)}\n\n"
        )
        value, names, seed = _value(rng), _names(rng, _LETTERS), rng.getrandbits(64)
        while value == solved_value:
            value = _value(rng)
        room = tokens - _NEW_TOKENS - count(f"{_question(value)} {_prefix(value)}")
        context = fit(
            lambda lines: f"{solved}{_INSTRUCTION}\n\n{_text(lines, value, names, seed)}",
            count,
            room,
            _VARIABLES,
            tokens,
        )
        return Example(context, _question(value), _prefix(value), tuple(names), _NEW_TOKENS, None)


def _text(lines: int, value: str, names: list[str], seed: int) -> str:
    """Lines of noise, with the chain between them in its order."""
    given = [value, *(f"VAR {name}" for name in names)]
    parts = [_NOISE] * lines
    places = sorted(Random(seed).sample(range(lines), len(names)))
    # from the last to the first, so that the places before stay where they are
    for place, name, source in reversed(list(zip(places, names, given, strict=False))):
        parts.insert(place, f"VAR {name} = {source}")
    return "\n".join(parts)


def _question(value: str) -> str:
    return f"\nQuestion: Find all variables that are assigned the value {value} in the text above."


def _prefix(value: str) -> str:
    return (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_VARIABLES} variables are assigned the value {value}, they are:"
    )


def _value(rng: Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _names(rng: Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < _VARIABLES:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)
