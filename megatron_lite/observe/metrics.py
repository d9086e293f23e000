"""`metrics.jsonl`, one object per step, and `events.jsonl`, one object per event: the record of a run.

Every line of both is valid JSON: NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and
"-Infinity", and `read_metrics` converts them back.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_lite.errors import DISK_ERRNOS
from megatron_lite.files import leave_only, replace_file, set_aside_others, sync
from megatron_lite.observe.line_writer import LineWriter
from megatron_lite.observe.lines import (
    BLOCK_BYTES,
    LONGEST_LINE_BYTES,
    NON_FINITE,
    Gap,
    lines_beyond,
    raw_blocks,
    sound_figures,
    sound_object,
    warn_of_dropped,
    whole_lines,
)
from megatron_lite.observe.logged import Log, LoggedLines
from megatron_lite.observe.phrasing import counted
from megatron_lite.state_files import DamagedLine, Object, lines_of, open_lines, read_bytes

TAIL_BYTES = 2**16
MOST_GAPS_SHOWN = 4

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


@dataclass(frozen=True)
class Loss:
    """What a resume has found missing in metrics.jsonl."""

    gaps: list[Gap]
    """Steps up to the checkpoint that were logged, and whose lines are missing."""
    text: str


@dataclass
class _Rewind:
    step: int
    rollbacks: int
    is_reported: bool = False
    """Whether the user has been notified that it has to wait."""


@dataclass(frozen=True)
class _Written:
    """The line of one step."""

    step: int
    text: str


class MetricsWriter:
    """Appends one line per step.

    A run that resumes after step k repeats the steps that it had logged after k; their old lines, and a truncated last
    line, are removed before the first new one is written, so each step is in the file once. Lines of a branch that a
    rollback has left are moved to `rolled_back.jsonl` instead: they will not be repeated.

    Args:
        resume_step: the last step to keep; 0 = a fresh start.
        rollbacks: number in the run so far.
        logged: what the checkpoint of that step records about the lines up to it; None = nothing (an earlier version).
        report: called with a line when the disk rejects lines, and when it accepts them again.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int = 0,
        rollbacks: int = 0,
        logged: LoggedLines | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._report = path, report
        self._logged_at = {} if logged is None else {resume_step: logged}
        self.loss: Loss | None = None
        """What was found missing when the file was opened; None = nothing is missing."""
        self._postponed: list[_Rewind | _Written] = []
        """In order; the first is always a rewind."""
        self._begin(resume_step, rollbacks, logged)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        line = _Written(step, _line({"step": step, **values}))
        if self._postponed:
            self._postponed.append(line)
            self._catch_up()
        else:
            self._put(line)

    def logged(self, step: int) -> LoggedLines | None:
        """What the checkpoint of this step, the last one, has to record; None if the disk is too full for a rewind."""
        if not self._catch_up():
            return None
        self._logged_at[step] = self._log.so_far()
        return self._logged_at[step]

    def rewind(self, step: int, rollbacks: int) -> None:
        """Continue after `step`, in the branch with this number of rollbacks.

        On a full disk this is postponed: the following lines wait in memory, at most until the next checkpoint, which
        needs space as well.
        """
        self._postponed.append(_Rewind(step, rollbacks))
        self._catch_up()

    def close(self) -> None:
        if not self._catch_up():
            lost = sum(isinstance(one, _Written) for one in self._postponed)
            self._report(
                f"warning: {counted(lost, 'line')} of {self._path} could not be written; a resume repeats them"
            )
        self._file.close()

    def _put(self, line: _Written) -> None:
        self._log.add(line.step, line.text.encode())
        self._file.write(line.text)

    def _catch_up(self) -> bool:
        """Do what was postponed, as far as the disk has space; returns whether everything is done."""
        while self._postponed:
            first = self._postponed[0]
            if isinstance(first, _Written):
                self._put(first)
            elif not self._rewound(first):
                return False
            del self._postponed[0]
        return True

    def _rewound(self, rewind: _Rewind) -> bool:
        file = self._file
        if not file.flush():  # waiting lines may be ones to keep
            return False
        try:
            self._begin(rewind.step, rewind.rollbacks, self._logged_at.get(rewind.step))
        except OSError as error:
            if error.errno not in DISK_ERRNOS:
                raise
            if not rewind.is_reported:
                rewind.is_reported = True
                self._report(
                    f"warning: {self._path.with_name(ROLLED_BACK_FILE)} cannot be written ({error.strerror or error}); "
                    "training goes on, and its lines wait in memory"
                )
            return False
        file.close()
        if rewind.is_reported:
            self._report(f"{self._path.with_name(ROLLED_BACK_FILE)} is written; no line is lost")
        return True

    def _begin(self, last_step: int, rollbacks: int, logged: LoggedLines | None) -> None:
        set_aside_others(self._path)
        log = _as_written(self._path, logged) if logged is not None else None
        if log is not None:
            _set_aside(self._path, log.num_bytes, last_step, rollbacks)
            shorten(self._path, log.num_bytes)
        else:
            _set_aside(self._path, 0, last_step, rollbacks)
            log, gaps = _keep_lines(self._path, last_step, is_suspect=logged is not None)
            self.loss = _loss(self._path, last_step, logged, log, gaps)
        self._log = log
        self._file = LineWriter(self._path, self._report)


class EventWriter:
    """Appends one line for each event of all attempts: starts, resumes, saves, evaluations.

    A resume removes nothing: the file is a history, and a repeated evaluation is part of it.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = lambda line: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        set_aside_others(path)
        self.damaged = _drop_damaged(path)
        """Number of lines that could not be read and were left out."""
        self._file = LineWriter(path, report)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Args: kind: what happened, e.g. `start`, `resume`, `save`, `evaluation`, `finish`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(_line({"event": kind, "step": step, "time": now, **values}))

    def close(self) -> None:
        self._file.close()


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


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(to_json(entry), allow_nan=False, ensure_ascii=False) + "\n"


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


def _set_aside(path: Path, begin: int, last_step: int, rollbacks: int) -> None:
    """Copy lines after `last_step` of abandoned branches to `rolled_back.jsonl`; on disk when it returns.

    After a kill before metrics.jsonl is shortened, this runs again; lines that are there already are not copied twice.

    Args:
        begin: byte offset of a line; no line before it is after `last_step`.
    """
    if rollbacks == 0:
        return
    aside = path.with_name(ROLLED_BACK_FILE)
    known = {(branch_of(entry), entry["step"]) for entry in entries(aside)}

    def new() -> Iterator[dict[str, Any]]:
        for entry in entries(path, begin, last_step):
            branch = branch_of(entry)
            if branch < rollbacks and (branch, entry["step"]) not in known:
                yield entry

    if next(new(), None) is not None:
        replace_file(aside, (_line(entry).encode() for entry in chain(entries(aside), new())))


def _as_written(path: Path, logged: LoggedLines) -> Log | None:
    """The log of a file that begins with exactly the logged lines; None if it does not."""
    log = Log(logged.lines, steps=[list(stretch) for stretch in logged.steps])
    try:
        with path.open("rb") as file:
            while block := file.read(min(BLOCK_BYTES, logged.bytes - log.num_bytes)):
                log.add_text(block)
    except FileNotFoundError:
        pass
    return log if log.so_far() == logged else None


def _keep_lines(path: Path, last_step: int, *, is_suspect: bool) -> tuple[Log, list[Gap]]:
    """Keep the lines of the file that are intact, in order and not after `last_step`.

    Returns:
        the log of the kept lines, and the missing steps between them
    """
    log, gaps, skipped = Log(), list[Gap](), 0
    for block in raw_blocks(path, is_suspect=is_suspect) if last_step > 0 else ():
        kept = [line for line in block.lines if line.step <= last_step]
        gaps += [gap for gap in block.gaps if gap.last < last_step]
        skipped += block.damaged if kept or not block.lines else 0
        for line in kept:
            log.add(line.step, line.text)
    if skipped:  # damaged lines may be between lines that are kept
        leave_only(
            path,
            lambda: (
                line.text
                for block in raw_blocks(path, is_suspect=is_suspect)
                for line in block.lines
                if line.step <= last_step
            ),
        )
    else:
        shorten(path, log.num_bytes)
    return log, gaps


def _loss(path: Path, last_step: int, logged: LoggedLines | None, log: Log, gaps: list[Gap]) -> Loss | None:
    """The lines up to this step that a file lacks."""
    if logged is not None:
        gaps = logged.missing(log.so_far().all_steps())
    if gaps:
        what = f"has lost the lines of {', '.join(map(str, gaps[:MOST_GAPS_SHOWN]))}"
        what += f" and of {len(gaps) - MOST_GAPS_SHOWN} more ranges" if len(gaps) > MOST_GAPS_SHOWN else ""
    elif logged is not None:
        what = "was changed since it was written, but no line is missing: a figure in it may be wrong"
    else:
        return None
    return Loss(gaps, f"{path} {what} (up to step {last_step:,}, where the run resumes); training is not affected")


def _drop_damaged(path: Path) -> int:
    """Rewrite a JSONL file without its damaged lines; returns their number, not counting a truncated last line."""
    content = read_bytes(path)
    if content is None:
        return 0
    damaged = {line.number for line in lines_of(content, Object, path.name) if isinstance(line, DamagedLine)}
    lines = re.findall(rb"[^\n]*\n|[^\n]+$", content)
    if damaged:
        leave_only(path, lambda: [line for number, line in enumerate(lines, 1) if number not in damaged])
    is_torn = lines[-1:] and not lines[-1].endswith(b"\n") and lines[-1].startswith(b"{")
    return len(damaged) - bool(is_torn)


def shorten(path: Path, size: int) -> None:
    """Truncate a file to a size if it is longer; on disk when it returns."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
        sync(path)
