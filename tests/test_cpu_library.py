"""Finding and loading the compiled library, and what happens without it."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_attention_decoder.errors import BackendError
from sparse_attention_decoder.kernels import Request, resolve
from sparse_attention_decoder.kernels.cpu import library

REQUEST = Request(torch.device("cpu"), torch.float32, 64)

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def loads_anew() -> Iterator[None]:
    """Whatever `load` comes to within the test is forgotten after it."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.usefixtures("loads_anew")
def test_the_environment_forces_an_instruction_set(monkeypatch, isa):
    monkeypatch.setenv(library.ISA_VARIABLE, "portable")
    assert library.isa() == "portable"
    # as it was, for the tests to come
    assert library.load().sad_use_isa(isa.encode())
    assert library.isa() == isa


def moved_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__file__", str(folder / "library.py"))


def absent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved_to(folder, monkeypatch)


def damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "libsparse_decode.so").write_bytes(b"no library")
    moved_to(folder, monkeypatch)


def of_another_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(Path(library.__file__).with_name("libsparse_decode.so"), folder)
    moved_to(folder, monkeypatch)
    monkeypatch.setattr(library, "_LAYOUT", library.Struct("=q"))


def with_an_unknown_isa(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, "sse9")


@pytest.mark.usefixtures("loads_anew")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (absent, "not compiled when the package was installed"),
        (damaged, "libsparse_decode.so does not load"),
        (of_another_version, "of another version of this package"),
        (with_an_unknown_isa, "asks for 'sse9', which this machine does not have; known are avx512, avx2, portable"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_without_a_library_the_backend_says_why_once_and_auto_takes_the_next(
    tmp_path, monkeypatch, caplog, spoil, reason
):
    spoil(tmp_path, monkeypatch)
    # with it, Triton's interpreter serves on a CPU too
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with caplog.at_level(logging.WARNING, logger=library.__name__):
        for _ in range(2):
            with pytest.raises(BackendError, match=f"cpu: .*{reason}"):
                resolve("cpu", REQUEST)
            assert resolve("auto", REQUEST).name == "reference"
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(BackendError, match=reason):
        library.isa()
