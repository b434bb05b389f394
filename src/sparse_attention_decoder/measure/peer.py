"""What a user would pick instead of this package: each peer in its own process, in an environment of its own.

`scripts/peers` makes the environments; `measure/peers/` holds the workers that run in them.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_attention_decoder.errors import InputError, WorkerError
from sparse_attention_decoder.measure.process import Process
from sparse_attention_decoder.models.loading import default_gguf

_WORKERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class PeerRow:
    """How a peer is run.

    worker: file in measure/peers/.
    reads_gguf: a `.gguf` file is its model; else a transformers directory.
    option_sets: what to measure it with, the first as most would run it.
    """

    worker: str
    reads_gguf: bool
    option_sets: tuple[Mapping[str, Any], ...]


# the name is also that of the environment's folder
PEERS: dict[str, PeerRow] = {
    "llama.cpp": PeerRow("run_llama_cpp.py", True, ({"kv": "f16", "flash": False}, {"kv": "q8_0", "flash": True})),
    "openvino": PeerRow("run_openvino.py", True, ({"evict": False}, {"evict": True})),
    "vllm": PeerRow("run_vllm.py", False, ({},)),
    "kvpress": PeerRow("run_kvpress.py", False, ({},)),
}


def installed(name: str, folder: Path) -> bool:
    """Whether `scripts/peers` has finished the environment of that peer in `folder`."""
    return (folder / name / "installed").is_file() and _python(name, folder).exists()


def model_for(name: str, source: str | os.PathLike[str] | None, directory: str | os.PathLike[str]) -> Path:
    """The form of a model that a peer reads.

    Args:
        source: what `models.loading.load` was given; None for the embedded default.
        directory: where transformers has read it from: `model.config._name_or_path`.
    Raises:
        InputError: the model is not there in that form.
        ModelLoadError: the default is not installed.
    """
    if PEERS[name].reads_gguf:
        gguf = default_gguf() if source is None else Path(source)
        if gguf.suffix.lower() != ".gguf" or not gguf.is_file():
            raise InputError(
                f"{name} reads .gguf files and the model is {source}; give a .gguf file, or leave {name} out"
            )
        return gguf
    if not (Path(directory) / "config.json").is_file():
        raise InputError(f"{name} reads a directory with config.json and {directory} is none; leave {name} out")
    return Path(directory)


@dataclass(frozen=True)
class Loaded:
    """seconds: from the request on, imports included; what: formats in words; feeds: see `Peer.step`."""

    seconds: float
    what: str
    feeds: bool
    versions: dict[str, str]


@dataclass(frozen=True)
class FirstToken:
    """seconds: time to it, of which the whole prompt is part."""

    seconds: float
    token: int


@dataclass(frozen=True)
class Steps:
    """ms: of each decode step; tokens: the most likely next one after each."""

    ms: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Footprint:
    """peak_bytes: resident memory, at most; kv_bytes: keys and values held at the end. None where it is not known."""

    peak_bytes: int | None
    kv_bytes: int | None


class Peer(Process):
    """A peer's process, idle between calls. Use as a context: leaving it ends the process, whatever happened.

    Args:
        command, threads, name: as for Process.
        timeout_seconds: the longest that one answer may take.
    Every method raises WorkerError if the worker dies, fails or does not answer in time; it is over then.
    """

    def __init__(self, command: list[str], threads: int, name: str, timeout_seconds: float = 1800) -> None:
        super().__init__(command, threads, name)
        self.threads, self.timeout_seconds = threads, timeout_seconds

    @classmethod
    def installed_in(cls, folder: Path, name: str, threads: int) -> "Peer":
        """The peer of that name in PEERS, run by its environment in `folder`.

        Raises:
            WorkerError: it is not installed.
        """
        if not installed(name, folder):
            raise WorkerError(f"{name} is not installed in {folder}; run scripts/peers {name}")
        # -E -s: none of this process's packages there; -B: nothing written beside the workers
        command = [str(_python(name, folder)), "-E", "-s", "-B", str(_WORKERS / PEERS[name].worker)]
        return cls(command, threads, name)

    def __enter__(self) -> "Peer":
        return self

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """As Process does, within the time there is."""
        timer = threading.Timer(self.timeout_seconds, self._child.kill)
        begun = time.monotonic()
        timer.start()
        try:
            return super().ask(do, **arguments)
        except WorkerError as error:
            if time.monotonic() - begun >= self.timeout_seconds:
                what = f"had no answer after {self.timeout_seconds:g} s, asked to {do}"
                raise WorkerError(f"{self.name} {what}:\n{self._said()}") from error
            raise
        finally:
            timer.cancel()

    def load(self, model: Path, context: int, options: Mapping[str, Any]) -> Loaded:
        """Load a model for at most `context` tokens. Once, and first."""
        path = str(model.absolute())
        answer = self.ask("load", model=path, threads=self.threads, context=context, options=dict(options))
        return Loaded(answer["seconds"], answer["what"], answer["feeds"], answer["versions"])

    def read(self, ids: Sequence[int]) -> FirstToken:
        """Read a prompt from its start on, nothing kept of an earlier one."""
        answer = self.ask("read", ids=list(ids))
        return FirstToken(answer["seconds"], answer["token"])

    def step(self, ids: Sequence[int]) -> Steps:
        """One decode step for each id: with that id if the peer `feeds`, else with the token it chose itself."""
        answer = self.ask("step", ids=list(ids))
        return Steps(answer["ms"], answer["tokens"])

    def end(self) -> Footprint:
        """What it took; the worker exits."""
        answer = self.ask("end")
        return Footprint(answer["peak_bytes"], answer["kv_bytes"])


def _python(name: str, folder: Path) -> Path:
    return folder / name / "bin" / "python"
