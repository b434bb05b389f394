"""What is converted once and kept: folders in the cache directory that appear whole and are checked when used."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import textwrap
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from sparse_attention_decoder.errors import CacheDirectoryError, ModelLoadError, SparseAttentionError

logger = logging.getLogger(__name__)

_CACHE_VARIABLE = "SPARSE_ATTENTION_DECODER_CACHE"
_MANIFEST, _DRAFT = "manifest.json", ".draft"
_DRAFT_LIFETIME_S = 3600
# a file is told by its size and this many pieces, both ends included: hashing it all could take longer than loading
_SAMPLES, _SAMPLE_BYTES = 32, 1 << 20


def cache_directory() -> Path:
    """Where converted models are kept: SPARSE_ATTENTION_DECODER_CACHE, or else the user's cache directory."""
    chosen = os.environ.get(_CACHE_VARIABLE)
    return Path(os.path.expanduser(chosen) if chosen else platformdirs.user_cache_dir("sparse-attention-decoder"))


def keep(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; unless an undamaged one is there, `write` is given an empty folder to fill.

    Raises:
        CacheDirectoryError: what is written cannot be kept.
    """
    folder = cache_directory() / "models" / name
    if (damage := _damage(folder)) is None:
        return folder
    if os.path.lexists(folder):
        logger.warning("the converted model in %s is damaged (%s): it is converted again", folder, damage)
    draft = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{_DRAFT}")
    try:
        draft.mkdir(parents=True)
        _remove_abandoned(folder.parent)
        write(draft)
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


def identity(files: Iterable[Path], *facts: object) -> str:
    """12 hex digits that change with the contents of files and with facts about what is made of them."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{' '.join(map(str, facts))} {size} ".encode())
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()[:12]


def reason(error: BaseException) -> str:
    """An error of another library in a line of our own."""
    return f"{textwrap.shorten(str(error), 300, placeholder=' ...')} ({type(error).__name__})"


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
        return reason(error)
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
