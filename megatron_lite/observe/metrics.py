"""`metrics.jsonl`, one object a step, and `events.jsonl`, one object for each thing that happened: the truth of a run.

Both are valid JSON on every line: NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and
"-Infinity", and `read_metrics` turns them back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_lite.errors import DamagedFileError
from megatron_lite.files import replace_file, set_aside_others
from megatron_lite.observe.lines import LineWriter
from megatron_lite.state_files import Object, decode, read_bytes, warn

_SPELLING = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

METRICS_FILE = "metrics.jsonl"
ROLLED_BACK_FILE = "rolled_back.jsonl"
"""Lines of metrics.jsonl that a rollback took back; `rollbacks` says which branch of the run they are of."""
EVENTS_FILE = "events.jsonl"
SKIPS_FILE = "skipped_samples.json"
"""What rollbacks leave out: data/skips.py."""
BEGINNINGS = ("start", "resume")
"""Events of which each attempt begins with one."""
SPIKE_EVENT = "spike"
"""Its `title` and `text` are what is alerted."""
ROLLBACK_EVENT = "rollback"
NUMBERS = (
    "loss", "grad_norm", "validation_loss", "validation_token_loss", "validation_accuracy",
    "validation_sequence_accuracy", "rollbacks", "to_step", "first_sample", "stop_sample", "entropy_nats", "accuracy",
)  # fmt: skip
"""What of an event is a number, or not there; of a step everything is."""
MOST = 2**63
"""Larger numbers are none of ours."""
ROLLBACKS = "rollbacks"
"""The figure that counts the rollbacks so far, and so names a branch; absent = 0."""


class MetricsWriter:
    """Appends one line a step.

    A run that resumes after step k repeats the steps that it had logged beyond k; their old lines, and a last line that
    a kill tore, are dropped before the first new one is written, so each step stands in the file once. Those of a
    branch that the run has left by a rollback are moved to `rolled_back.jsonl` instead: nothing will repeat them.

    Args:
        resume_step: the last step that counts; 0 = a fresh start.
        rollbacks: of the run so far.
        report: is told when the disk takes no lines, and when it does again.
    """

    def __init__(
        self, path: Path, resume_step: int = 0, rollbacks: int = 0, report: Callable[[str], None] = lambda line: None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._report = path, report
        self._begin(resume_step, rollbacks)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(_line({"step": step, **values}))

    def rewind(self, step: int, rollbacks: int) -> None:
        """Go on after `step`, in the branch that so many rollbacks have led to."""
        self._file.close()
        self._begin(step, rollbacks)

    def close(self) -> None:
        self._file.close()

    def _begin(self, last_step: int, rollbacks: int) -> None:
        _set_aside(self._path, last_step, rollbacks)
        _keep_lines(self._path, lambda entry: _counts(entry, last_step))
        self._file = LineWriter(self._path, self._report)


class EventWriter:
    """Appends one line for each event, over all attempts: starts, resumes, saves, evaluations.

    Nothing is dropped on a resume: the file is a history, and a repeated evaluation is a part of it.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = lambda line: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_lines(path, lambda entry: True)
        self._file = LineWriter(path, report)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Args: kind: what happened, e.g. `start`, `resume`, `save`, `evaluation`, `finish`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(_line({"event": kind, "step": step, "time": now, **values}))

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSONL file in order; a missing file is an empty list."""
    try:
        content = read_bytes(path) or b""
    except DamagedFileError as error:
        warn(f"{error}; it counts as empty")
        return []
    parsed = [_parse(line) for line in content.splitlines(keepends=True)]
    return [entry for entry in parsed if entry is not None]


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(to_json(entry), allow_nan=False, ensure_ascii=False) + "\n"


def to_json(value: Any) -> Any:
    """The same as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value


def from_json(value: Any) -> Any:
    """A value that JSON has brought back, its strings for NaN and infinities turned into numbers."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return _SPELLING.get(value, value) if isinstance(value, str) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None for a line that was cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = from_json(decode(line, Object, "a line"))
    except DamagedFileError:
        return None
    return entry if _is_sound(entry) else None


def _is_sound(entry: Mapping[str, Any]) -> bool:
    """Whether what every reader counts on has its type: one flipped bit can make another key, or another value."""
    if type(entry.get("step")) is not int or not 0 <= entry["step"] < MOST:
        return False
    if "event" not in entry:
        return all(map(_is_figure, entry.values()))
    if not all(_is_figure(entry[name]) for name in NUMBERS if name in entry):
        return False
    told = isinstance(entry["event"], str) and ("time" not in entry or _is_time(entry["time"]))
    return told and (entry["event"] != ROLLBACK_EVENT or type(entry.get("to_step")) is int)


def _is_figure(value: Any) -> bool:
    """A number, none, or several by place or name."""
    if isinstance(value, list | dict):
        return all(map(_is_figure, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _counts(entry: Mapping[str, Any], last_step: int) -> bool:
    return isinstance(entry.get("step"), int) and entry["step"] <= last_step


def branch_of(entry: Mapping[str, Any]) -> int:
    """How many rollbacks a line comes after."""
    return int(entry.get(ROLLBACKS) or 0)


def with_branches(events: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of events.jsonl, each with the number of rollbacks that it comes after; a rollback counts itself."""
    branch = 0
    for entry in events:
        branch = branch_of(entry) if entry.get("event") == ROLLBACK_EVENT else branch
        yield branch, entry


def _set_aside(path: Path, last_step: int, rollbacks: int) -> None:
    """Copy what lies beyond `last_step` in branches that are left to `rolled_back.jsonl`, on the disk when it returns.

    A kill before metrics.jsonl is shortened has this done again, so what is there already is not copied twice.
    """
    if rollbacks == 0:
        return
    aside = path.with_name(ROLLED_BACK_FILE)
    entries = read_metrics(path)
    left = [entry for entry in entries if not _counts(entry, last_step) and branch_of(entry) < rollbacks]
    before = read_metrics(aside)
    known = {(branch_of(entry), entry.get("step")) for entry in before}
    new = [entry for entry in left if (branch_of(entry), entry.get("step")) not in known]
    if new:
        replace_file(aside, "".join(_line(entry) for entry in [*before, *new]).encode())


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file without the lines that are broken or not kept."""
    set_aside_others(path)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (entry := _parse(line)) is not None and keep(entry)]
    if len(kept) == len(lines):
        return
    replace_file(path, b"".join(kept))
