"""The loop of the workers beside this file: requests on stdin, answers on stdout, one JSON object a line.

A worker is run as a plain script by the Python of its peer's environment, where this package is not installed: here and
in the workers, nothing of it is imported. measure/peer.py is the other side.

    {"do": "load", "model": path, "threads": N, "context": tokens, "options": {}}
                                 -> {"seconds": x, "what": text, "feeds": bool, "versions": {name: version}}
    {"do": "read", "ids": [..]}  -> {"seconds": time to first token, "token": id}
    {"do": "step", "ids": [..]}  -> {"ms": [..], "tokens": [..]}
    {"do": "end"}                -> {"peak_bytes": n, "kv_bytes": n or null}, and the worker exits
    whatever fails               -> {"error": text}, and the worker exits
"""

import json
import os
import sys
import time
import traceback
from importlib.metadata import version
from typing import Any, Protocol, TextIO


class Engine(Protocol):
    """A library with its model loaded, which is what creating one does: (model, threads, context, options).

    feeds: whether `step` goes on with the token it is given; else with the one it chose itself.
    what: format of the weights and of the cache, in words.
    packages: the distributions whose versions matter.
    """

    feeds: bool
    what: str
    packages: tuple[str, ...]

    def __init__(self, model: str, threads: int, context: int, options: dict[str, Any]) -> None: ...

    def read(self, ids: list[int]) -> int:
        """Read a prompt with nothing kept of an earlier one; the most likely next token."""

    def step(self, token: int) -> int:
        """One decode step; the most likely next token."""

    def kv_bytes(self) -> int | None:
        """Bytes of keys and values that are held, if the library tells."""


def serve(engine: type[Engine]) -> None:
    """Answer requests until one ends it, one fails, or stdin closes."""
    # libraries print to stdout, C++ ones past Python: answers keep the descriptor, the rest goes to stderr
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with answers:
        try:
            _answer_all(engine, answers)
        # whatever a library raises is an answer
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            _write(answers, {"error": f"{type(error).__name__}: {error}"})


def _answer_all(engine: type[Engine], answers: TextIO) -> None:
    loaded: Engine | None = None
    context = 0
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        begun = time.perf_counter()
        if request["do"] == "load":
            context = request["context"]
            loaded = engine(request["model"], request["threads"], context, request["options"])
            seconds = time.perf_counter() - begun
            versions = {name: version(name) for name in loaded.packages}
            answer = {"seconds": seconds, "what": loaded.what, "feeds": loaded.feeds, "versions": versions}
        elif loaded is None:
            raise RuntimeError(f"asked to {request['do']} before anything is loaded")
        elif request["do"] == "read":
            if len(request["ids"]) >= context:
                raise ValueError(f"{len(request['ids'])} tokens and one more do not fit a context of {context}")
            token = loaded.read(request["ids"])
            answer = {"seconds": time.perf_counter() - begun, "token": token}
        elif request["do"] == "step":
            answer = _steps(loaded, request["ids"])
        else:
            _write(answers, {"peak_bytes": _peak_bytes(), "kv_bytes": loaded.kv_bytes()})
            return
        _write(answers, answer)


def _steps(loaded: Engine, ids: list[int]) -> dict[str, list[Any]]:
    ms, tokens = [], []
    for token in ids:
        begun = time.perf_counter()
        tokens.append(loaded.step(token))
        ms.append((time.perf_counter() - begun) * 1e3)
    return {"ms": ms, "tokens": tokens}


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _peak_bytes() -> int | None:
    """Peak resident memory; None where there is no /proc. getrusage would count the parent's before exec."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except FileNotFoundError:
        return None
