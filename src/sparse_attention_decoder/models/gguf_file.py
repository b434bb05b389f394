"""The weights of a GGUF file one at a time, by the names transformers has for them."""

import importlib
import importlib.util
import mmap
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from gguf import quants
from torch import Tensor
from transformers import PreTrainedModel

from sparse_attention_decoder.models.packed import GROUP

READER = "transformers.modeling_gguf_pytorch_utils"
# of transformers' processors: those that permute the rows of matrices, and nothing else of them, or leave them alone
_ROW_PROCESSORS = {"TensorProcessor", "LlamaTensorProcessor", "NemotronTensorProcessor", "Gemma2TensorProcessor"}


class _Elements(Sequence[Any]):
    """An array's elements, looked at when asked for: views of all of 49,152 tokens and their merges take 62 MB."""

    def __init__(self, look: Callable[[int], Any], count: int) -> None:
        self._look, self._count = look, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._look(index)


class LeanReader(gguf.GGUFReader):
    """A GGUFReader that makes no object for each token of a vocabulary."""

    data: Any

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        # views of a memmap are dear
        if isinstance(self.data, np.memmap):
            self.mapping = getattr(self.data, "_mmap", None)
            self.data = self.data.view(np.ndarray)
        return super()._get(*args, **kwargs)

    def _build_fields(self, offs: int, count: int) -> int:
        for _ in range(count):
            offs = self._build_array(offs) or super()._build_fields(offs, 1)
        return offs

    def _build_array(self, start: int) -> int | None:
        """Where the field ends, if it is an array of strings or numbers."""
        at = start + sum(part.nbytes for part in self._get_str(start))
        kind = Value(self._get(at, np.uint32)[0])
        element = Value(self._get(at + 4, np.uint32)[0]) if kind is Value.ARRAY else None
        if element not in (Value.STRING, *self.gguf_scalar_to_np):
            return None
        at, count = at + 16, int(self._get(at + 8, np.uint64)[0])
        look, end = self._strings(at, count) if element is Value.STRING else self._numbers(at, count, element)
        name = str(bytes(self._get_str(start)[1]), encoding="utf-8")
        self._push_field(
            gguf.ReaderField(start, name, _Elements(look, count), range(count), [kind, element]), skip_sum=True
        )
        return end

    def _numbers(self, at: int, count: int, element: Any) -> tuple[Callable[[int], Any], int]:
        numbers = self._get(at, self.gguf_scalar_to_np[element], count)
        return lambda index: numbers[index : index + 1], at + count * numbers.itemsize

    def _strings(self, at: int, count: int) -> tuple[Callable[[int], Any], int]:
        starts = array("Q")
        for _ in range(count):
            length = int(self._get(at, np.uint64)[0])
            starts.append(at)
            at += 8 + length
        return lambda index: self._get_str(starts[index])[1], at


@dataclass(frozen=True)
class GgufWeight:
    """A weight in blocks, uint8 [N, bytes of a row], or plain, of any shape."""

    data: Any
    kind: Kind
    # tells the system that what was read of the file is not needed in memory any more
    release: Callable[[], object]

    def rows(self, start: int, stop: int | None) -> Tensor:
        """Rows in float32; all of them from 0 to None."""
        part = self.data[start:stop]
        # a copy: what is plain already would be a view of the file, which cannot be written
        found = torch.from_numpy(np.array(quants.dequantize(part, self.kind), np.float32))
        self.release()
        return found

    def groups(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows in groups of 32 as `Int4Linear.fill_codes` takes them; None where the file has them in no such form."""
        unpack = _GROUPS.get(self.kind)
        if unpack is None:
            return None
        part = self.data[start:stop]
        codes, scale, zero = unpack(part.reshape(-1, gguf.GGML_QUANT_SIZES[self.kind][1]))
        self.release()
        return (
            torch.from_numpy(codes.astype(np.int32)).view(stop - start, -1, GROUP),
            torch.from_numpy(scale.astype(np.float32)).view(stop - start, -1),
            torch.from_numpy(zero.astype(np.float32)).view(stop - start, -1),
        )


def weights_of(file: Path, model: PreTrainedModel) -> Mapping[str, GgufWeight] | None:
    """Every weight of a file whose place in the model is known, none of them read yet.

    Returns:
        None where transformers builds the weights in a way that only its own loading knows.
    """
    reader: Any = importlib.import_module(READER) if importlib.util.find_spec(READER) else None
    if not hasattr(reader, "get_gguf_hf_weights_map") or not hasattr(reader, "TENSOR_PROCESSORS"):
        return None
    source = gguf.GGUFReader(file)
    architecture = reader.read_field(source, "general.architecture")[0]
    processing = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
    if processing.__name__ not in _ROW_PROCESSORS:
        return None
    processor = processing(config=reader.load_gguf_checkpoint(str(file), return_tensors=False)["config"])
    names = reader.get_gguf_hf_weights_map(model, processor)
    # of the mapping alone: a reader holds an object for each token of the vocabulary
    release, found = partial(_release, getattr(source, "mapping", None)), {}
    for tensor in source.tensors:
        if tensor.name in names:
            # vectors may have their numbers changed, so they have to be numbers; of matrices only rows change places
            data, kind = tensor.data, tensor.tensor_type
            if len(tensor.shape) == 1:
                data, kind = quants.dequantize(data, kind), Kind.F32
            done = processor.process(weights=data, name=tensor.name, tensor_key_mapping=names)
            found[names[tensor.name]] = GgufWeight(done.weights, kind, release)
    return found


def _release(mapping: Any) -> None:
    # without a mapping, or on another system, what was read goes on to count as memory of this process
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _half(blocks: Any, at: int) -> Any:
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Any) -> Any:
    """[n, m] bytes of 2 codes to [n, 2, m]: the low ones come first."""
    return np.stack([packed & 15, packed >> 4], 1)


def _q4_0(blocks: Any) -> tuple[Any, Any, Any]:
    scale = _half(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, np.zeros_like(scale)


def _q4_1(blocks: Any) -> tuple[Any, Any, Any]:
    scale = _half(blocks, 0)
    return _nibbles(blocks[:, 4:]), scale, _half(blocks, 2) + 8 * scale


def _q4_k(blocks: Any) -> tuple[Any, Any, Any]:
    # 256 weights: 8 groups, whose scales and minima are 6-bit multiples of the block's
    scales, minima = quants.Q4_K.get_scale_min(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    least = _half(blocks, 2) * minima.astype(np.float32)
    return _nibbles(blocks[:, 16:].reshape(-1, GROUP)), scale, 8 * scale - least


_GROUPS = {Kind.Q4_0: _q4_0, Kind.Q4_1: _q4_1, Kind.Q4_K: _q4_k}
