"""Writes `metrics.jsonl` and `events.jsonl`; a resume keeps the intact lines up to its step and reports lost ones."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_lite.errors import DISK_ERRNOS
from megatron_lite.files import leave_only, replace_file, set_aside_others, sync
from megatron_lite.observe.line_writer import LineWriter
from megatron_lite.observe.lines import BLOCK_BYTES, Gap, raw_blocks
from megatron_lite.observe.logged import Log, LoggedLines
from megatron_lite.observe.metrics import ROLLED_BACK_FILE, branch_of, entries, to_json
from megatron_lite.observe.phrasing import counted
from megatron_lite.state_files import DamagedLine, Object, lines_of, read_bytes

MOST_GAPS_SHOWN = 4


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


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(to_json(entry), allow_nan=False, ensure_ascii=False) + "\n"


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
