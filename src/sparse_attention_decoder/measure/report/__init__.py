"""Records as something to look at: one page, its pictures, and tables for a README."""

from pathlib import Path

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.record import read
from sparse_attention_decoder.measure.report.markdown import markdown
from sparse_attention_decoder.measure.report.numbers import collect
from sparse_attention_decoder.measure.report.page import page
from sparse_attention_decoder.measure.report.plots import draw


def write(paths: list[Path], out: Path) -> list[Path]:
    """Write a report on records: `report.html`, which needs no other file, its light pictures, and `report.md`.

    Args:
        paths: files of records; of a cell measured twice the newest counts.
        out: a folder, made if it is not there; what it has of these names is replaced.
    Returns:
        The files written, the page first.
    Raises:
        InputError: records that cannot be read or hold no measurement, or a folder that cannot be written.
        ConfigError: a record of a policy that this version does not have.
        UnsupportedError: matplotlib (the extra `measure`) is not installed.
    """
    numbers = collect(read(paths))
    pictures = draw(numbers)
    files = {"report.html": page(numbers, pictures, paths).encode()}
    files |= {picture.file: picture.light for picture in pictures if picture.light}
    files["report.md"] = markdown(numbers).encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write the report to {out}: {error}; name another folder") from error
    return [out / name for name in files]
