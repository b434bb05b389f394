"""StreamingLLM: keep sinks and window, throw the rest away."""

from typing import ClassVar

from sparse_attention_decoder.policies.window import WindowPolicy


class StreamingPolicy(WindowPolicy):
    """StreamingLLM (arXiv:2309.17453) without its renumbering of positions: reads what `window` reads, and evicts."""

    evicts: ClassVar[bool] = True
