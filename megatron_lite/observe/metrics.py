"""Reads `metrics.jsonl`, one object per step, and `events.jsonl`, one object per event: the record of a run.

Every line of both is valid JSON: NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and
"-Infinity", and `read_metrics` converts them back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_lite.observe.lines import (
    LONGEST_LINE_BYTES,
    NON_FINITE,
    lines_beyond,
    sound_figures,
    sound_object,
    warn_of_dropped,
    whole_lines,
)
from megatron_lite.state_files import open_lines

TAIL_BYTES = 2**16

METRICS_FILE = "metrics.jsonl"
ROLLED_BACK_FILE = "rolled_back.jsonl"
"""Lines of metrics.jsonl that a rollback undid; `rollbacks` is the branch of the run that they belong to."""
EVENTS_FILE = "events.jsonl"
LOSS_EVENT = "metrics_lost"
"""Logged steps whose lines are missing: `ranges` as texts of first and last step, `text`."""
SKIPS_FILE = "skipped_samples.json"
"""The samples that rollbacks leave out: data/samples/skips.py."""
BEGINNINGS = ("start", "resume")
"""Each attempt begins with one of these events."""
SPIKE_EVENT = "spike"
"""Its `title` and `text` are sent as an alert."""
ROLLBACK_EVENT = "rollback"
NUMBERS = (
    "loss", "grad_norm", "validation_loss", "validation_token_loss", "validation_accuracy",
    "validation_sequence_accuracy", "rollbacks", "to_step", "first_sample", "stop_sample", "entropy_nats", "accuracy",
)  # fmt: skip
"""Fields of an event that must be numbers if present."""
MOST = 2**63
"""A larger number is damage."""
ROWS_EVENT = "rows"
"""How many rows of each data source were used or skipped: `sources` are objects as data.rows.RowCounts."""
ROLLBACKS = "rollbacks"
"""The number of rollbacks so far, which identifies a branch; absent = 0."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All intact lines of a JSONL file in order; a missing file is an empty list."""
    return list(entries(path))


def entries(path: Path, begin: int = 0, beyond: int | None = None) -> Iterator[dict[str, Any]]:
    """The same lines one by one, for long files. Warns of values that are left out because they are not numbers.

    Args:
        begin: byte offset of the beginning of a line.
        beyond: return only the lines of later steps.
    """
    dropped = 0
    for piece in whole_lines(path, begin):
        text = piece if beyond is None else lines_beyond(piece, beyond)
        for entry, bad in _sound_entries(text):
            dropped += bad
            yield entry
    warn_of_dropped(path, dropped)


def newest_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The same lines in reverse order; reads only as much of the file as is consumed, and does not warn."""
    rest = b""
    for piece in _pieces_backwards(path):
        first, newline, whole = (piece + rest).partition(b"\n")
        if not newline:
            rest = first if len(first) <= LONGEST_LINE_BYTES else b""
            continue
        rest = first + newline
        yield from (entry for entry, _ in reversed(list(_sound_entries(whole))))
    yield from (entry for entry, _ in _sound_entries(rest))


def _sound_entries(text: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Intact lines that end with a newline, each with the number of values that are left out of it."""
    for line in text.split(b"\n")[:-1]:
        entry = sound_object(line)
        if entry is None:
            continue
        if "event" not in entry:
            figures, dropped = sound_figures(entry)
            yield from_json(figures), dropped
        elif _is_sound_event(entry := from_json(entry)):
            yield entry, 0


def _pieces_backwards(path: Path) -> Iterator[bytes]:
    file = open_lines(path)
    if file is None:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(end - TAIL_BYTES, 0)
            file.seek(begin)
            yield file.read(end - begin)
            end = begin


def to_json(value: Any) -> Any:
    """Convert a value to types that JSON can represent."""
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
    """Convert the strings for NaN and infinities in a decoded JSON value to numbers."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _is_sound_event(entry: Mapping[str, Any]) -> bool:
    """Whether the fields that readers rely on have their types: one flipped bit can change a key or a value."""
    if not all(_is_number(entry[name]) for name in NUMBERS if name in entry):
        return False
    has_kind_and_time = isinstance(entry["event"], str) and ("time" not in entry or _is_time(entry["time"]))
    return has_kind_and_time and (entry["event"] != ROLLBACK_EVENT or type(entry.get("to_step")) is int)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def branch_of(entry: Mapping[str, Any]) -> int:
    """The branch of a line: the number of rollbacks before it."""
    return int(entry.get(ROLLBACKS) or 0)


def with_branches(events: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of events.jsonl, each with the number of rollbacks up to it; a rollback counts itself."""
    branch = 0
    for entry in events:
        branch = branch_of(entry) if entry.get("event") == ROLLBACK_EVENT else branch
        yield branch, entry
