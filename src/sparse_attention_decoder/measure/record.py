"""Records: one JSON line a finished measurement, so that runs can be resumed, compared and drawn."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.tables import POLICIES, load

logger = logging.getLogger(__name__)

Row = dict[str, Any]
OURS = "ours"


class Records:
    """A JSON-lines file of measurements. A row has a kind, a cell that names it, and a result.

    Args:
        path: made with its folder at the first row.
        machine: facts of this machine; rows written from now on point to them.
    Attributes:
        rows: every row that is no machine's, in the order of the file.
    Raises:
        InputError: a line that is no row. A last line cut short by a crash is dropped, with a warning.
    """

    def __init__(self, path: Path, machine: dict[str, Any] | None = None) -> None:
        self.path = path
        lines = _lines(path) if path.exists() else []
        if path.exists():
            _end_lines(path, len(lines))
        self.rows = [row for row in lines if row["kind"] != "machine"]
        self.run = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._facts = machine or {}
        # facts that tell machines apart; the bandwidth of this minute does not
        self.machine = "-".join(str(self._facts.get(key, "")) for key in ("cpu", "threads", "gpu", "commit"))
        self._known = {row["machine"] for row in lines if row["kind"] == "machine"}
        self._cells = {_key(row["kind"], row["cell"]) for row in self.rows}

    def has(self, kind: str, cell: Row) -> bool:
        """Whether this cell is finished."""
        return _key(kind, cell) in self._cells

    def add(self, kind: str, cell: Row, result: Row) -> None:
        """Append a finished cell, on disk before this returns."""
        row = {"kind": kind, "cell": cell, "result": result, "machine": self.machine, "run": self.run}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if self.machine not in self._known:
                file.write(json.dumps({"kind": "machine", "machine": self.machine, "facts": self._facts}) + "\n")
                self._known.add(self.machine)
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._cells.add(_key(kind, cell))


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of several files, machines included; of a cell measured twice the newest counts, in its first place.

    Raises:
        InputError: a file that cannot be read, or a line that is no row.
    """
    found: dict[str, Row] = {}
    for path in paths:
        for row in _lines(path):
            key = row["machine"] if row["kind"] == "machine" else _key(row["kind"], row["cell"])
            found[key] = row
    return list(found.values())


# what `changes` compares, by kind: where less is better and where more is, both are shown
_MEASURES = {
    "speed": ("step_ms", "ttft_s", "peak_bytes", "share_read", "kl"),
    "agreement": ("kl", "top1", "ppl_change", "share_read"),
    "retrieval": ("score",),
    "answers": ("f1", "exact", "rouge_l"),
}


def changes(before: Path, after: Path) -> list[tuple[str, str, float, float]]:
    """(cell, measure, before, after) of every cell that both files have; samples of a task are one cell, their mean.

    Raises:
        InputError: a file that is no record.
    """
    old, new = _means(before), _means(after)
    return [(name, measure, old[name, measure], new[name, measure]) for name, measure in old if (name, measure) in new]


def _means(path: Path) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], list[float]] = {}
    for row in read([path]):
        if row["kind"] == "machine":
            continue
        cell = row["cell"]
        parts = [cell["model"], cell["dtype"], cell.get("task", ""), str(cell.get("context", cell.get("length", "")))]
        parts += [f"batch {cell['batch']}" if cell.get("batch", 1) > 1 else "", label(cell)]
        name = ", ".join(part for part in parts if part)
        for measure in _MEASURES[row["kind"]]:
            if row["result"].get(measure) is not None:
                values.setdefault((name, measure), []).append(row["result"][measure])
    return {key: sum(found) / len(found) for key, found in values.items()}


def label(cell: Row) -> str:
    """What the side of a cell is called in tables and pictures: `sketch, the default`, `quest, 256`, `transformers`.

    A number is the tokens retrieved (of `window` and `streaming` the window), `above 3e-05` the threshold.
    """
    if cell["engine"] != OURS:
        options = " ".join(f"{name} {value}" for name, value in cell["config"].items())
        return f"{cell['engine']} ({options})" if options else str(cell["engine"])
    config = AttentionConfig(**cell["config"])
    forms = [f"{cell['weights']} weights"] if cell.get("weights") else []
    forms += [f"{config.kv_dtype} KV"] if config.kv_dtype else []
    forms += ["compiled"] if cell.get("compile") else []
    return f"{_own_label(config)} ({', '.join(forms)})" if forms else _own_label(config)


def _own_label(config: AttentionConfig) -> str:
    if config.policy == "dense":
        return "dense, SDPA on our cache" if config.backend == "reference" else "dense, our kernel"
    plain = AttentionConfig()
    if _chosen(config) == _chosen(plain):
        return "sketch, the default"
    budget = f"above {config.threshold:g}" if config.threshold else str(config.top_k)
    if thresholds(config.policy):
        budget = f"sampled {budget}" if config.sample_tail else budget
        budget = config.quality or budget
        budget += f", missing {config.missing_mass:.3g}" if config.missing_mass is not None else ""
    if config.policy in ("window", "streaming"):
        budget = str(config.attention_window)
    elif not thresholds(config.policy):
        budget = str(config.top_k)
    name = f"{config.policy}, {budget}"
    has_own = config.quality is not None or config.policy in ("window", "streaming")
    if config.attention_window != plain.attention_window and not has_own:
        name += f", window {config.attention_window}"
    name += f", far field {config.far_field:g}" if config.far_field else ""
    name += ", by layer" if config.layer_scales else ""
    return f"{name} (evicts)" if load(POLICIES[config.policy]).evicts else name


def model_name(model: str | None) -> str:
    """A model as records call it: the last part of its path or name, without .gguf; None is the embedded default."""
    # imported here: it loads transformers, which a report does without
    from sparse_attention_decoder.models.loading import default_gguf

    return (Path(model).name if model is not None else default_gguf().name).removesuffix(".gguf")


def thresholds(policy: str) -> bool:
    """Whether a policy obeys `threshold`; the others read a fixed number of tokens."""
    return policy in ("sketch", "oracle")


def as_cell(config: AttentionConfig) -> Row:
    """A config as part of a cell; `dense_below` is left out, for measurements are never below it.

    What was added since the first records is in the cell where it is used: cells without it keep their names.
    """
    later = (
        "kv_dtype", "max_cache_tokens", "max_cache_bytes", "missing_mass", "quality", "sample_tail", "far_field",
        "layer_scales", "tuned_for",
    )  # fmt: skip
    return {
        name: value
        for name, value in asdict(config).items()
        if name != "dense_below" and not (name in later and not value)
    }


def _chosen(config: AttentionConfig) -> tuple[Any, ...]:
    return (
        config.policy, config.top_k, config.threshold, config.attention_window, config.sink_tokens, config.missing_mass,
        config.sample_tail, config.far_field, config.layer_scales,
    )  # fmt: skip


def _key(kind: str, cell: Row) -> str:
    return json.dumps([kind, cell], sort_keys=True)


def _end_lines(path: Path, count: int) -> None:
    """Leave whole lines in the file, so that the next one starts a line of its own."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        path.write_text("".join(line + "\n" for line in text.splitlines()[:count]), encoding="utf-8")


def _lines(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read records from {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                logger.warning("%s: the last line was cut short and is dropped; its cell will be measured again", path)
                break
            raise InputError(
                f"{path}, line {number} is not JSON ({error}); records are one JSON object a line"
            ) from error
        if not isinstance(row, dict) or not {"kind", "machine"} <= row.keys():
            raise InputError(f"{path}, line {number} is no record; expected kind, cell, result and machine")
        rows.append(row)
    return rows
