"""The compiled library: found, loaded with ctypes, given torch's threads, called with one struct."""

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from struct import Struct
from typing import cast

import torch

from sparse_attention_decoder.errors import BackendError

logger = logging.getLogger(__name__)

# forces an instruction set, for tests: portable, avx2 or avx512
ISA_VARIABLE = "SPARSE_ATTENTION_DECODER_ISA"
ISAS = ("avx512", "avx2", "portable")

# sad_call of csrc/sparse_decode.h, field for field
FIELDS = [
    "batch",
    "kv_heads",
    "group",
    "dim",
    "value_dim",
    "threads",
    "cache_type",
    "query_type",
    "query",
    "query_row",
    "query_head",
    "output",
    "lse",
    "keys",
    "key_row",
    "key_head",
    "key_token",
    "values",
    "value_row",
    "value_head",
    "value_token",
    "length",
    "new_key",
    "new_value",
    "codes",
    "code_row",
    "code_head",
    "factors",
    "factor_row",
    "factor_head",
    "start",
    "count",
    "mean",
    "deviation",
    "rotation",
    "near",
    "near_valid",
    "near_count",
    "low",
    "high",
    "middle",
    "floor",
    "cap",
    "threshold",
    "scaling",
    "logits",
    "near_lse",
    "tokens",
    "tokens_room",
    "counts",
    "missing",
    "head_missing",
    "tokens_valid",
    "key_scales",
    "key_scale_row",
    "key_scale_head",
    "value_scales",
    "value_scale_row",
    "value_scale_head",
    "value_rotation",
    "whole_from",
    "whole_keys",
    "whole_key_row",
    "whole_key_head",
    "whole_key_token",
    "whole_values",
    "whole_value_row",
    "whole_value_head",
    "whole_value_token",
    "sampled",
    "log_weights",
]
_LAYOUT = Struct("=" + "".join("d" if name in ("threshold", "scaling") else "q" for name in FIELDS))
# sad_product, whose fields are all integers and addresses
PRODUCT = Struct("=10q")
_NOTHING: dict[str, float] = dict.fromkeys(FIELDS, 0)

# of queries and of a cache; the last two are codes of a packed one
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PACKED = {torch.int8: 3, torch.uint8: 4}


@cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none, which is logged once."""
    library = _open()
    if isinstance(library, str):
        logger.warning("decoding on a CPU takes PyTorch kernels, which are slower: %s", library)
    return library


def _open() -> ctypes.CDLL | str:
    path = Path(__file__).with_name("libsparse_decode.so")
    if not path.exists():
        return "its kernels were not compiled when the package was installed (a wheel has them, or install a compiler)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    library.sad_isa.restype = ctypes.c_char_p
    library.sad_call_size.restype = ctypes.c_int64
    library.sad_product_size.restype = ctypes.c_int64
    if (library.sad_call_size(), library.sad_product_size()) != (_LAYOUT.size, PRODUCT.size):
        return f"{path.name} is of another version of this package; install it anew"
    _share_threads(library)
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and not library.sad_use_isa(wanted.encode()):
        return f"{ISA_VARIABLE} asks for {wanted!r}, which this machine does not have; known are {', '.join(ISAS)}"
    return library


def _share_threads(library: ctypes.CDLL) -> None:
    # torch's own pool: no second OpenMP runtime, no oversubscription
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    except OSError as error:
        logger.warning("the CPU kernels run on one thread: %s", error)
        return
    parallel_for = getattr(torch_library, "torch_parallel_for", None)
    if parallel_for is None:
        logger.warning(
            "the CPU kernels run on one thread: torch %s has no torch_parallel_for (2.10 has)", torch.__version__
        )
        return
    library.sad_use_threads(ctypes.cast(parallel_for, ctypes.c_void_p))


def isa() -> str:
    """The instruction set in use."""
    library = load()
    if isinstance(library, str):
        raise BackendError(library)
    return str(library.sad_isa().decode())


def call(operation: str, *groups: dict[str, int], **fields: float) -> int:
    """Run one operation with the struct's fields, some in groups, those left out being 0; what it answers.

    Raises:
        MemoryError: no memory for its scratch.
    """
    return run(operation, filled(fields, *groups, {"threads": torch.get_num_threads()}))


def filled(*groups: Mapping[str, float]) -> bytes:
    """The struct with these fields, those left out being 0."""
    numbers = dict(_NOTHING)
    for group in groups:
        numbers.update(group)
    return _LAYOUT.pack(*numbers.values())


def run(operation: str, struct: bytes | int) -> int:
    """Run one operation with a filled struct, or with the one at an address; what it answers.

    Raises:
        MemoryError: no memory for its scratch.
    """
    answer = _function(operation)(struct)
    if answer < 0:
        raise MemoryError(f"{operation}: no memory for scratch")
    return answer


@cache
def _function(operation: str) -> Callable[[bytes | int], int]:
    library = load()
    assert not isinstance(library, str)
    found = getattr(library, operation)
    found.argtypes = [ctypes.c_void_p]
    return cast("Callable[[bytes | int], int]", found)
