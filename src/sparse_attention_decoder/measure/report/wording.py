"""Numbers as words: one way of writing each quantity, in pictures, tables and sentences."""

from collections.abc import Iterable

ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def percent(share: float | None, digits: int = 1) -> str:
    """0.176 as 17.6%."""
    return ABSENT if share is None else f"{100 * share:.{digits}f}%"


def change(share: float | None, digits: int = 1) -> str:
    """0.0038 as +0.4%."""
    return ABSENT if share is None else f"{signed(100 * share, digits)}%"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def plain(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point."""
    return ABSENT if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def small(value: float | None) -> str:
    """Two digits that count, down to 0.0001."""
    if value is None:
        return ABSENT
    if abs(value) < 5e-5:
        return "0" if value == 0 else "< 0.0001"
    return f"{value:.4f}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}"


def milliseconds(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ABSENT
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def gigabytes(value: float | None) -> str:
    """Bytes as GB (10^9)."""
    return ABSENT if value is None else f"{value / 1e9:.2f}"


def tokens(count: int) -> str:
    """7000 as 7,000."""
    return f"{count:,}"


def between(ends: tuple[float, float] | None, digits: int = 1, scale: float = 1.0) -> str:
    """An interval: `0.2 to 0.6`."""
    return ABSENT if ends is None else " to ".join(plain(scale * end, digits) for end in ends)


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *some, last = words
    return f"{', '.join(some)} and {last}" if some else last
