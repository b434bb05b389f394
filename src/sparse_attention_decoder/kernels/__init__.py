"""Kernel backends: `resolve` finds the one that serves."""

import logging
from functools import cache

from sparse_attention_decoder.errors import BackendError
from sparse_attention_decoder.kernels.packed import Packed, plain, settled, stored_bytes
from sparse_attention_decoder.kernels.protocol import BLOCK, Coded, Kernels, Request, Statistics
from sparse_attention_decoder.tables import BACKENDS, load

__all__ = [
    "BLOCK",
    "Coded",
    "Kernels",
    "Packed",
    "Request",
    "Statistics",
    "plain",
    "resolve",
    "settled",
    "stored_bytes",
]

logger = logging.getLogger(__name__)


def resolve(name: str, request: Request) -> Kernels:
    """The backend called `name`, or with "auto" the first of the table that does not refuse.

    Raises:
        BackendError: the named backend refuses (its reason is in the message), or none serves.
    """
    reasons: list[str] = []
    for candidate, row in BACKENDS.items():
        if name not in ("auto", candidate):
            continue
        kernels: Kernels = load(row)()
        reason = kernels.refuses(request)
        if reason is None:
            if name == "auto":
                _say_once(candidate, request, "; ".join(reasons))
            return kernels
        reasons.append(f"{candidate}: {reason}")
    raise BackendError(f"backend {name!r} cannot serve {request}: {'; '.join(reasons) or 'no such backend'}")


@cache
def _say_once(name: str, request: Request, refused: str) -> None:
    why = f" ({refused})" if refused else ""
    logger.info(
        "backend auto took %s for %s %s, head_dim %d%s", name, request.device, request.dtype, request.head_dim, why
    )
