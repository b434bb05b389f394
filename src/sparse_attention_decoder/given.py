"""Values that someone gives, checked: a count, a JSON object, scales of layers."""

import json
import math
from typing import Any

from sparse_attention_decoder.errors import ConfigError


def object_of(text: str) -> dict[str, Any]:
    """The object that JSON text holds, or a ConfigError."""
    try:
        values = json.loads(text)
    # beside malformed text: numbers of thousands of digits, and nesting deeper than Python's stack
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}; expected an object as AttentionConfig.to_json writes it") from error
    if not isinstance(values, dict):
        raise ConfigError(f'JSON holds a {type(values).__name__}; expected an object such as {{"top_k": 32}}')
    return values


def scales_of(values: object) -> tuple[float | None, ...]:
    """What the threshold is multiplied by in each layer, or a ConfigError."""
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError(f"layer_scales is {values!r}; expected a number for each full-attention layer, or None")
    for number, value in enumerate(values):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ConfigError(
                f"layer_scales has {value!r} for layer {number}; expected a finite number above 0, or None to read "
                "that layer whole"
            )
    return tuple(values)


def require_count(name: str, value: object, least: int, hint: str, unit: str = "tokens") -> None:
    """Raise ConfigError unless the value is an integer of at least so much."""
    # True and False are ints to Python, but nobody means them as a count
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; expected a whole number of {unit}, {least} or more ({hint})")
    if value < least:
        raise ConfigError(f"{name} is {value}; use {least} or more ({hint})")
