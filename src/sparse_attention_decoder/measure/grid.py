"""What to compare: policies times budgets, as configs. The same grid for speed and for quality."""

from collections.abc import Iterable, Iterator

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.record import thresholds
from sparse_attention_decoder.tables import POLICIES, QUALITIES

DEFAULT = "default"
# their budget is a longer window
_WINDOWS = ("window", "streaming")


def configs(policies: Iterable[str], budgets: Iterable[str], window: int | None = None) -> list[AttentionConfig]:
    """One config per policy and budget, none twice, dense first if asked for.

    Args:
        policies: names of `tables.POLICIES`.
        budgets: each `default` (the thresholds of `AttentionConfig()`), a number of tokens such as `256`, a threshold
            such as `1e-4`, a name of `tables.QUALITIES`, or a missing attention mass for `balanced` to hold, such as
            `5%`. A policy without a threshold takes the numbers alone.
        window: newest tokens always read; the default's if left out.
    Raises:
        InputError: an unknown policy, or a budget that is none of these.
    """
    found: list[AttentionConfig] = []
    for policy in policies:
        if policy not in POLICIES:
            raise InputError(f"policy {policy!r} is unknown; choose from {', '.join(POLICIES)}")
        for budget in budgets:
            found.extend(one for one in _configs(policy, budget, window) if one not in found)
    return sorted(found, key=lambda config: config.policy != "dense")


def _configs(policy: str, budget: str, window: int | None) -> Iterator[AttentionConfig]:
    plain = AttentionConfig()
    near = plain.attention_window if window is None else window
    if policy == "dense":
        yield AttentionConfig(policy=policy)
        return
    if budget in QUALITIES or budget.endswith("%"):
        if thresholds(policy):
            yield _dialled(policy, budget)
        return
    top_k, threshold = _budget(budget)
    if threshold is not None:
        if thresholds(policy):
            yield AttentionConfig(plain.top_k, threshold, near, policy=policy, dense_below=0)
    elif policy in _WINDOWS:
        yield AttentionConfig(plain.top_k, None, near + top_k, policy=policy, dense_below=0)
    else:
        yield AttentionConfig(top_k, None, near, policy=policy, dense_below=0)


def _dialled(policy: str, budget: str) -> AttentionConfig:
    """A preset, which has a window of its own; with a missing mass to hold, that of `balanced`."""
    if budget in QUALITIES:
        return AttentionConfig(policy=policy, quality=budget, dense_below=0)
    try:
        missing = float(budget.removesuffix("%")) / 100
    except ValueError:
        raise InputError(f"budget {budget!r} is none; a missing attention mass is written such as 5%") from None
    return AttentionConfig(policy=policy, quality="balanced", dense_below=0, missing_mass=missing)


def _budget(text: str) -> tuple[int, float | None]:
    """(tokens, threshold); the threshold is None for a number of tokens."""
    plain = AttentionConfig()
    if text == DEFAULT:
        return plain.top_k, plain.threshold
    if text.isdecimal() and int(text) > 0:
        return int(text), None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise InputError(
            f"budget {text!r} is none; expected {DEFAULT}, tokens such as 256, a threshold such as 1e-4, a missing "
            f"mass such as 5%, or {', '.join(QUALITIES)}"
        )
    return plain.top_k, share
