"""What the build, the C++ sources and the Python that calls them say of each other."""

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import sparse_attention_decoder
from sparse_attention_decoder.kernels.cpu import library

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in CSRC.rglob("*.cpp"))
HEADERS = sorted(path.name for path in CSRC.rglob("*.h"))


def text(path: str) -> str:
    """Of a file in the repository, without // and # comments."""
    return re.sub(r"//.*|^ *#[^a-z].*", "", (ROOT / path).read_text("utf-8"), flags=re.MULTILINE)


def struct_fields() -> list[tuple[str, bool]]:
    """Name of each field of sad_call, and whether it is a double."""
    body = re.search(r"typedef struct \{(.*?)\} sad_call;", text("csrc/sparse_decode.h"), re.DOTALL)[1]
    fields = []
    for declaration in filter(str.strip, body.split(";")):
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+)(\W.*)", declaration, re.DOTALL).groups()
        assert "*" in names or kind in ("int64_t", "double"), f"{kind} is not 8 bytes long"
        fields += [(name, kind == "double" and "*" not in names) for name in re.findall(r"\w+", names)]
    return fields


def test_the_struct_is_filled_as_it_is_declared():
    assert [name for name, _ in struct_fields()] == list(library.FIELDS)
    assert library._LAYOUT.format == "=" + "".join("d" if double else "q" for _, double in struct_fields())


def test_dtypes_have_the_numbers_of_the_header():
    enum = re.search(r"enum sad_dtype \{(.*?)\}", text("csrc/sparse_decode.h"))[1]
    numbers = dict(re.findall(r"SAD_(\w+) = (\d)", enum))
    # four bits have no dtype of their own: two share a byte
    dtypes = {torch.uint8 if name == "INT4" else getattr(torch, name.lower()): int(n) for name, n in numbers.items()}
    assert dtypes == {**library.DTYPES, **library.PACKED}


def test_every_instruction_set_is_built_chosen_and_known():
    cmake = text("CMakeLists.txt")
    built = re.search(r"set\(ISAS (.*)\)", cmake)[1].split() + re.search(r"list\(APPEND ISAS (.*)\)", cmake)[1].split()
    rows = re.findall(r"SAD_ISA_ROW\((\w+)\),", text("csrc/dispatch.cpp"))
    assert tuple(rows) == library.ISAS
    assert (
        sorted(built)
        == sorted(rows)
        == sorted(re.findall(r"^SAD_DECLARE\((\w+)\)", text("csrc/kernels.h"), re.MULTILINE))
    )


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_compiled(source):
    assert source in text("CMakeLists.txt")


@pytest.mark.parametrize("header", HEADERS)
def test_every_header_is_included(header):
    included = {
        name for path in CSRC.rglob("*.*") for name in re.findall(r'#include ".*?([\w.]+)"', path.read_text("utf-8"))
    }
    assert header in included


def test_the_version_installed_is_the_version_here():
    assert version("sparse-attention-decoder") == sparse_attention_decoder.__version__
    assert f'__version__ = "{sparse_attention_decoder.__version__}"' in text("src/sparse_attention_decoder/__init__.py")


@pytest.mark.skipif("WHEEL" not in os.environ, reason="for .ci/run, which tests a wheel")
def test_the_wheel_is_what_is_tested_and_has_kernels():
    assert ROOT not in Path(sparse_attention_decoder.__file__).parents
    assert not isinstance(library.load(), str), library.load()
