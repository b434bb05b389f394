"""Long texts to decode: files, or what every Python has."""

import hashlib
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparse_attention_decoder.errors import InputError

# more characters than any token of these texts has
_CHARACTERS = 6


def texts(paths: list[Path]) -> dict[str, str]:
    """The files by name; without any, Python's language reference and its standard library's sources.

    Raises:
        InputError: a file that is not UTF-8 text.
    """
    if paths:
        return {path.name: text_of(path) for path in paths}
    # imported here: half a megabyte of text
    from pydoc_data.topics import topics

    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    library = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in modules)
    return {"Python's language reference": "\n\n".join(topics.values()), "Python's standard library": library}


def text_of(path: Path) -> str:
    """A UTF-8 file's text.

    Raises:
        InputError: it cannot be read as such.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from error


def about(found: dict[str, str]) -> list[dict[str, str]]:
    """Name and the start of the SHA-256 of every text, for records."""
    return [{"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]} for name, text in found.items()]


def passages(found: dict[str, str], encode: Callable[[str], list[int]], tokens: int) -> Tensor:
    """One passage of `tokens` ids from the middle of each text, [B, tokens] int64.

    Raises:
        InputError: a text is too short.
    """
    rows = []
    for name, text in found.items():
        start = max(0, len(text) // 2 - tokens * _CHARACTERS // 2)
        # a tokenizer may see fewer characters a token: then take more of them
        ids = encode(text[start : start + tokens * _CHARACTERS])
        if len(ids) < tokens:
            ids = encode(text[: start + tokens * _CHARACTERS * 4])
        if len(ids) < tokens:
            raise InputError(f"{name} has {len(ids)} tokens, {tokens} are needed; give a longer text or less context")
        rows.append(ids[:tokens])
    return torch.tensor(rows)
