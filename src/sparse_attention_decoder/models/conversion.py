"""A GGUF file as the float32 model directory that transformers reads, converted once."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_attention_decoder.errors import ModelLoadError
from sparse_attention_decoder.models.kept import identity, keep, reason

# raise it when _convert writes something else: what older versions left is then converted again
_FORMAT = 1
# what transformers raises on a damaged or unknown model
ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, KeyError, ImportError, EOFError)
ERRORS += (pickle.UnpicklingError, SafetensorError, StrictDataclassError)
# a GGUF is read without any argument of the caller, so there these too come from the file
GGUF_ERRORS: tuple[type[Exception], ...] = (*ERRORS, IndexError, TypeError, AttributeError, AssertionError)


def converted(file: Path, stage: Callable[[str], None]) -> Path:
    """The directory that holds this GGUF as safetensors; converts it unless an undamaged one is there."""

    def write(draft: Path) -> None:
        check_gguf(file)
        stage(f"converting {file.name}, once")
        _convert(file, draft)

    return keep(f"{file.stem[:40]}-{_identity(file)}", write)


def _identity(file: Path) -> str:
    """12 hex digits that change with the file, with what _convert writes, and with transformers' major version."""
    return identity([file], _FORMAT, transformers.__version__.split(".")[0])


def check_gguf(file: Path) -> None:
    """Refuse what is no whole GGUF file."""
    try:
        gguf.GGUFReader(file)
    # all it raises when its offsets lead nowhere
    except (ValueError, IndexError, KeyError) as error:
        raise ModelLoadError(f"{file} is no GGUF file, or only part of one: {reason(error)}; get it again") from error


def require_complete(info: dict[str, Any], name: str) -> None:
    """Refuse a model with weights missing: transformers only warns of these, and fills them with random numbers."""
    missing = sorted(info["missing_keys"])
    if missing:
        some = ", ".join(missing[:3])
        raise ModelLoadError(f"{name} lacks {len(missing)} of the model's weights, such as {some}; get all of it")


def _convert(source: Path, target: Path) -> None:
    """Write a GGUF's weights, in float32, and its tokenizer into `target`, as transformers keeps them."""
    # newer versions may keep weights packed, which save_pretrained refuses
    packing = getattr(transformers, "GgufConfig", None)
    kwargs = {"quantization_config": packing(dequantize=True)} if packing else {}
    # the whole path: transformers looks for a bare name in the current directory first
    file = str(source.absolute())
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=file, dtype=torch.float32, output_loading_info=True, **kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=file)
    except GGUF_ERRORS as error:
        raise ModelLoadError(f"transformers cannot read {source}: {reason(error)}") from error
    require_complete(info, str(source))
    # older versions leave these behind although the weights are plain by now
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    vars(model).pop("is_quantized", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
