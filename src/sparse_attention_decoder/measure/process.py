"""A side in a process of its own: asked a JSON line, it answers a JSON line."""

import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from types import TracebackType
from typing import Any

from sparse_attention_decoder.errors import WorkerError

_LAST_LINES = 12


class Process:
    """A worker program that obeys over its standard input and output. A context manager: leaving it ends the worker.

    Args:
        command: the program and its arguments.
        threads: told to OpenMP, so that no side has more than another.
        name: what errors call it; the program's own name if left out.
    """

    def __init__(self, command: list[str], threads: int, name: str = "") -> None:
        self.name = name or " ".join(command[-2:])
        # a file and not a pipe: nobody reads it while the worker runs, and a full pipe would stop it
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
            # Ctrl-C is for the parent alone, which then ends the worker and what that has started
            start_new_session=True,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something and wait for the answer.

        Raises:
            WorkerError: it answered with an error, something else than JSON, or died; with its last lines.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name} ended while asked to {do}, status {self._child.wait()}:\n{self._said()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise WorkerError(f"{self.name} answered {line[:200]!r} when asked to {do}; expected JSON") from error
        if "error" in answer:
            raise WorkerError(f"{self.name} could not {do}: {answer['error']}")
        return answer

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.communicate()
        self._errors.close()

    def _said(self) -> str:
        self._errors.seek(0)
        return "".join(self._errors.readlines()[-_LAST_LINES:]).strip()
