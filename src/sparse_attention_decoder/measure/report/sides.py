"""What a record's cell says about who decoded: the name, the idea behind it, whether it forgets."""

import re
from dataclasses import dataclass

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.record import OURS, Row, label, thresholds
from sparse_attention_decoder.tables import POLICIES, load

DEFAULT = "sketch, the default"
STOCK = "transformers"
# in the order of tables and legends; engines that are not listed follow
ORDER = (
    STOCK, "llama.cpp", "openvino", "vllm", "dense", "sketch", "oracle", "quest", "window",
    "snapkv", "h2o", "streaming", "kvpress",
)  # fmt: skip
# other engines that forget tokens; the rest of them read everything
_FORGETFUL = ("kvpress",)


@dataclass(frozen=True)
class Side:
    """One way of decoding.

    label: what it is called, `sketch, 256`.
    idea: our policy, or the engine where it is not ours: what colours go by.
    by_threshold: a threshold chose how many tokens are read, not a fixed number.
    is_ours, is_dense, evicts: measured on our engine; reads everything; forgets tokens for good.
    """

    label: str
    idea: str
    by_threshold: bool = False
    is_ours: bool = True
    is_dense: bool = False
    evicts: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with it: dense on our engine."""
        return self.is_ours and self.is_dense

    @property
    def order(self) -> tuple[int, str, bool, str]:
        """Its place among others: by idea, the default first among its own, then by budget."""
        place = ORDER.index(self.idea) if self.idea in ORDER else len(ORDER)
        # padded, so that 64 comes before 256
        return place, self.idea, self.label != DEFAULT, re.sub(r"\d+", lambda digits: digits[0].zfill(9), self.label)


def side_of(cell: Row) -> Side:
    """The side that a record's cell names.

    Raises:
        InputError: a config of other fields than this version's.
        ConfigError: a config that cannot work, or of a policy that this version does not have.
    """
    engine, config = str(cell["engine"]), cell["config"]
    try:
        name = label(cell)
    except TypeError as error:
        raise InputError(f"a record's config {config} is none of this version's ({error}); measure it again") from error
    if engine != OURS:
        forgets = engine in _FORGETFUL
        return Side(f"{name} (evicts)" if forgets else name, engine, False, False, not forgets, forgets)
    ours = AttentionConfig(**config)
    by_threshold = thresholds(ours.policy) and bool(ours.threshold)
    return Side(name, ours.policy, by_threshold, True, ours.policy == "dense", load(POLICIES[ours.policy]).evicts)
