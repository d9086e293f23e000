"""`metrics.jsonl`, one object a step, and `events.jsonl`, one object for each thing that happened: the truth of a run.

Both are valid JSON on every line: NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and
"-Infinity", and `read_metrics` turns them back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_lite.files import replace_file

_SPELLING = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


class MetricsWriter:
    """Appends one line a step.

    A run that resumes after step k repeats the steps that it had logged beyond k; their old lines, and a last line that
    a kill tore, are dropped before the first new one is written, so each step stands in the file once.

    Args:
        resume_step: the last step that counts; 0 = a fresh start.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_lines(path, lambda entry: isinstance(entry.get("step"), int) and entry["step"] <= resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(_line({"step": step, **values}))

    def close(self) -> None:
        self._file.close()


class EventWriter:
    """Appends one line for each event, over all attempts: starts, resumes, saves, evaluations.

    Nothing is dropped on a resume: the file is a history, and a repeated evaluation is a part of it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_lines(path, lambda entry: True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Args: kind: what happened, e.g. `start`, `resume`, `save`, `evaluation`, `finish`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(_line({"event": kind, "step": step, "time": now, **values}))

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a JSONL file in order; a missing file is an empty list."""
    if not path.exists():
        return []
    parsed = [_parse(line) for line in path.read_bytes().splitlines(keepends=True)]
    return [entry for entry in parsed if entry is not None]


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_to_json(entry), allow_nan=False, ensure_ascii=False) + "\n"


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _SPELLING.get(value, value) if isinstance(value, str) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None for a line that was cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return _from_json(entry) if isinstance(entry, dict) else None


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file without the lines that are broken or not kept."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (entry := _parse(line)) is not None and keep(entry)]
    if len(kept) == len(lines):
        return
    replace_file(path, b"".join(kept))
