"""Sessions on disk: a safetensors file that is mapped into memory, and refused unless it is what was written.

Every tensor over tokens has room for some more behind those held, so that a question is appended in place; on
most file systems the room is a hole, which takes no disk. The file's last bytes are its checksum.
"""

import json
import math
import os
import secrets
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from sparse_attention_decoder import __version__
from sparse_attention_decoder.cache import NEWEST_NAMES, Sketch
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError, SessionFileError, ShapeError, UnsupportedError
from sparse_attention_decoder.models import identity
from sparse_attention_decoder.models.cache import SparseCache, SparseLayer
from sparse_attention_decoder.models.frame import Frame
from sparse_attention_decoder.selection import Rows

KIND = "sparse-attention-decoder session"
# raise it when a file would be read wrong by the version before; 1 had no newest tokens that are whole, none is missed
FORMAT, READ = 2, ("1", "2")
# tokens of a question and an answer that fit behind a loaded document before its keys and values are copied
SPARE = 1024
# checked whole up to half a gigabyte, 0.3 s; of a larger file evenly spaced samples
_SAMPLES, _SAMPLE_BYTES = 1024, 1 << 19
_CHECKSUM = "checksum"
_LONGEST_HEAD = 100 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_READ_AGAIN = "read the document again"
_Stored = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class Content:
    """What a session is made of.

    cache: holds all but the last of the ids, in one row.
    ids: [1, T] int64, the document and the turns that were remembered.
    frame: what surrounds the next question.
    begun: whether there was a turn, so that the next question follows an answer.
    """

    cache: SparseCache
    ids: Tensor
    frame: Frame
    begun: bool


def save(path: str | os.PathLike[str], model: PreTrainedModel, content: Content) -> None:
    """Write a session in one step: into a draft beside the file, which then takes its place.

    Raises:
        UnsupportedError: a policy or layer that keeps what the file does not hold.
        SessionFileError: the file cannot be written.
    """
    path = Path(path)
    tensors = {"ids": (content.ids, 0)}
    for number, layer in enumerate(content.cache.layers):
        tensors.update({f"{number}.{name}": stored for name, stored in _stored(layer).items()})
    metadata = {
        "kind": KIND,
        "format": str(FORMAT),
        "library": __version__,
        "model": model.config.model_type,
        "architecture": identity.architecture(model.config),
        "weights": identity.weights(model),
        "attention": content.cache.config.to_json(),
        "tokens": str(content.cache.get_seq_length()),
        "frame": json.dumps(asdict(content.frame)),
        "begun": json.dumps(content.begun),
    }
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.draft")
    try:
        try:
            with draft.open("xb+") as file:
                _write(file, tensors, metadata)
                os.fsync(file.fileno())
            os.replace(draft, path)
            _sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise SessionFileError(f"cannot write {path}: {error.strerror or error}") from error


@torch.inference_mode(False)
def load(path: str | os.PathLike[str], model: PreTrainedModel) -> Content:
    """Map a saved session into memory, for this model.

    Raises:
        SessionFileError: another model's, another format's, damaged, cut short or no session at all.
    """
    path = Path(path)
    metadata = _checked(path)
    for part, found in (("architecture", identity.architecture(model.config)), ("weights", identity.weights(model))):
        if metadata[part] != found:
            other = "of another architecture" if part == "architecture" else "with other weights, or in another dtype"
            raise SessionFileError(
                f"{path} was read by a model {other} ({metadata['model']} {metadata[part]}; this one is "
                f"{model.config.model_type} {found}); load it with that model, or {_READ_AGAIN}"
            )
    try:
        cache = SparseCache(model.config, AttentionConfig.from_json(metadata["attention"]))
        tokens = int(metadata["tokens"])
        with safe_open(path, framework="pt") as file:
            # pages come from the file when they are read and are copied when they are written to
            tensors = {name: file.get_tensor(name).to(model.device) for name in file.keys()}  # noqa: SIM118  (no dict)
        for number, layer in enumerate(cache.layers):
            own = {name.partition(".")[2]: held for name, held in tensors.items() if name.startswith(f"{number}.")}
            if tokens:
                _adopt(layer, own, tokens, model.dtype)
        frame = Frame(**json.loads(metadata["frame"]))
        return Content(cache, tensors["ids"], frame, bool(json.loads(metadata["begun"])))
    # its checksum is right, so it was written like this: by a version that says more, or less, under this format
    except (SafetensorError, ShapeError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise SessionFileError(
            f"{path} was written by version {metadata.get('library')}, which this one, {__version__}, does not "
            f"understand ({type(error).__name__}: {error}); {_READ_AGAIN}"
        ) from error


def _stored(layer: Any) -> _Stored:
    """The tensors of a layer by name, each with the rows of axis 2 that are left free behind it."""
    if not isinstance(layer, SparseLayer) and type(layer) is not DynamicSlidingWindowLayer:
        raise UnsupportedError(f"a session cannot be saved with a {type(layer).__name__} of transformers' own")
    if layer.get_seq_length() == 0:
        return {}
    if not isinstance(layer, SparseLayer):
        return {"keys": (layer.keys, 0), "values": (layer.values, 0)}
    state = layer.state
    if state.policy.needs_witness:
        raise UnsupportedError(
            f"a session cannot be saved under policy {state.config.policy}, which keeps what it saw of the prompt's "
            'queries; read the document under another, such as "sketch"'
        )
    # what is whole is copied when it is loaded: it moves as tokens follow
    stored = {name: (held, 0 if name in NEWEST_NAMES else SPARE) for name, held in state.buffer.tensors().items()}
    if state.index is None:
        state.index = state.policy.new_index(state.kernels, state.config)
    # other indexes are made from the keys when they are first needed
    if isinstance(state.index, Sketch):
        batch, _, tokens, _ = state.buffer.shape
        state.index.catch_up(state.buffer.keys, Rows.full(batch, tokens), tokens)
        stored.update(state.index.tensors(SPARE))
    return stored


def _adopt(layer: Any, tensors: dict[str, Tensor], tokens: int, dtype: torch.dtype) -> None:
    """Let a fresh layer hold what `_stored` took from another."""
    keys, values = tensors["keys"], tensors["values"]
    layer.lazy_initialization(keys, values)
    if not isinstance(layer, SparseLayer):
        layer.keys, layer.values, layer.cumulative_length = keys, values, tokens
        return
    state = layer.state
    state.buffer.adopt(tensors, tokens, dtype)
    layer.dtype = dtype
    layer.crop(0)
    state.index = state.policy.new_index(state.kernels, state.config)
    if isinstance(state.index, Sketch):
        state.index.adopt(tensors, state.buffer.keys)


def _write(file: IO[bytes], tensors: _Stored, metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    # wide numbers first: all then begin at multiples of their own size
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][0].element_size()))
    tensors[_CHECKSUM] = (torch.zeros(4, dtype=torch.uint8), 0)
    end = 0
    for name, (tensor, spare) in tensors.items():
        shape = [size + spare * (axis == 2) for axis, size in enumerate(tensor.shape)]
        begin, end = end, end + math.prod(shape) * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % 64)
    file.write(len(head).to_bytes(8, "little") + head)
    for tensor, spare in tensors.values():
        for row in tensor.flatten(0, 1) if spare else [tensor]:
            file.write(row.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            file.seek(math.prod(row.shape[1:]) * spare * row.element_size(), os.SEEK_CUR)
    checksum = _checksum(file)
    file.seek(-4, os.SEEK_END)
    file.write(checksum)
    file.flush()


def _checksum(file: IO[bytes]) -> bytes:
    """Of all but the last four bytes of a file, or of evenly spaced samples, its beginning and end among them."""
    file.flush()
    end = os.fstat(file.fileno()).st_size - 4
    step = max(_SAMPLE_BYTES, -(-(end - _SAMPLE_BYTES) // (_SAMPLES - 1)))
    checksum = zlib.crc32(str(end).encode())
    for start in (*range(0, max(1, end - _SAMPLE_BYTES), step), max(0, end - _SAMPLE_BYTES)):
        file.seek(start)
        checksum = zlib.crc32(file.read(min(_SAMPLE_BYTES, end - start)), checksum)
    return checksum.to_bytes(4, "little")


def _checked(path: Path) -> dict[str, str]:
    """What the head of an undamaged file says of itself."""
    foreign = f"{path} is no session file, or its beginning is damaged"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEAD:
                raise SessionFileError(f"{foreign}; `Session.save` makes one")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            if metadata["kind"] != KIND:
                raise SessionFileError(f"{foreign}: it is another kind of safetensors file")
            if metadata["format"] not in READ:
                raise SessionFileError(
                    f"{path} has format {metadata['format']}, this version reads {' and '.join(READ)}; {_READ_AGAIN}, "
                    f"or use the version that wrote it, {metadata['library']}"
                )
            whole = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
            if size < whole:
                raise SessionFileError(f"{path} is cut short: {size} of {whole} bytes; copy or {_READ_AGAIN}")
            found = _checksum(file)
            file.seek(-4, os.SEEK_END)
            if file.read(4) != found:
                raise SessionFileError(f"{path} is damaged: its checksum is not what was written; {_READ_AGAIN}")
            return dict(metadata)
    except OSError as error:
        raise SessionFileError(f"cannot read {path}: {error.strerror or error}") from error
    except SessionFileError:
        raise
    # what arbitrary bytes, and arbitrary JSON, are to the lines above
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise SessionFileError(f"{foreign}; `Session.save` makes one") from error


def _sync_folder(folder: Path) -> None:
    # the file's new name is on disk only when its folder is
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
