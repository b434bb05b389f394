"""Weights that are read and written one at a time, in safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

_NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
# a cache line: rows that begin within one are read in one piece more
_ALIGNMENT = 64


class Weight(Protocol):
    """A weight that is not read yet."""

    def rows(self, start: int, stop: int | None) -> Tensor:
        """Rows of it, of any floating type; all of them, of any shape, from 0 to None."""

    def groups(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows as `Int4Linear.fill_codes` takes them, if they are in that form already."""


class _Safetensor:
    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def rows(self, start: int, stop: int | None) -> Tensor:
        # opened for each read: what was read of a file counts as memory of this process for as long as it is mapped
        with safe_open(self._path, framework="pt") as file:
            found: Tensor
            whole = (start, stop) == (0, None)
            found = file.get_tensor(self._name) if whole else file.get_slice(self._name)[start:stop]
            return found

    def groups(self, start: int, stop: int) -> None:
        return None


def safetensors_of(files: list[Path]) -> dict[str, Weight]:
    """Every weight in these files by its name, none of them read yet."""
    found: dict[str, Weight] = {}
    for path in files:
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            found |= {name: _Safetensor(path, name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    return found


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a TensorFile as views of one storage: the file in memory, read where it is touched."""
    held = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(held[:8].numpy().tobytes(), "little")
    header = json.loads(held[8:start].numpy().tobytes())
    types = {name: dtype for dtype, name in _NAMES.items()}
    return {
        name: held[start + low : start + high].view(types[facts["dtype"]]).view(facts["shape"])
        for name, facts in header.items()
        for low, high in [facts["data_offsets"]]
    }


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


class TensorFile:
    """A safetensors file to put tensors into one by one, in any order: the library's own wants all of them in memory.

    Args:
        tensors: names, shapes and types of what will be put; they may be on the meta device.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path, self._offsets, end = path, {}, 0
        header: dict[str, Any] = {}
        # those that end between cache lines come last, so that the others begin at one; of one kind side by side, for
        # matrices that lie so can be read as one, see `siblings`
        for name, tensor in sorted(
            tensors.items(), key=lambda item: (item[1].nbytes % _ALIGNMENT != 0, _kind(item[0]))
        ):
            self._offsets[name] = (end, tensor.dtype, tensor.shape)
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape]}
            header[name]["data_offsets"] = [end, end + tensor.nbytes]
            end += tensor.nbytes
        text = json.dumps(header).encode()
        self._header = text.ljust(-(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8)
        self._end, self._missing = end, set(tensors)

    def __enter__(self) -> "TensorFile":
        self._file = self._path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        self._file.truncate(8 + len(self._header) + self._end)
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the shape and type it was announced with."""
        start, dtype, shape = self._offsets[name]
        assert (tensor.dtype, tensor.shape) == (dtype, shape), f"{name}: {tensor.dtype}, {tensor.shape}"
        self._file.seek(8 + len(self._header) + start)
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert error is not None or not self._missing, f"never written: {self._missing}"
