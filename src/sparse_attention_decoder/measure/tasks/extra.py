"""Packages of the optional extra `measure`, imported when they are first needed."""

from importlib import import_module
from typing import Any

from sparse_attention_decoder.errors import UnsupportedError


def extra(module: str) -> Any:
    """The module of that name.

    Raises:
        UnsupportedError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this task needs the package {error.name}; pip install 'sparse-attention-decoder[measure]'"
        ) from error
