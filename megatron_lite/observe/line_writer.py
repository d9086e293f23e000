"""Append lines to a file: complete, in order and once each; kept in memory while the disk rejects writes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_lite.observe.phrasing import counted

MOST_BYTES = 64 * 2**20
"""Limit of waiting lines in memory: 100,000 steps of 600 bytes. Above it the oldest lines are lost."""


class LineWriter:
    """Appends to one file, of which it is the only writer.

    Training must not end because a disk or quota is full or a file server is unreachable for a while. The file always
    ends with a complete line: a partly written line is truncated again, which needs no space.

    Args:
        report: called with a line when lines begin to wait, and when they have been written.
    Raises:
        OSError: the file cannot be opened at the start.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._report = path, report
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._lost = 0
        self._is_failing = False
        self._file: int | None = None
        self._size: int | None = None  # of the whole lines in the file; None = not known
        self._open()

    def write(self, line: str) -> None:
        """Args: line: including its newline."""
        data = line.encode("utf-8", errors="backslashreplace")
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        while self._waiting_bytes > MOST_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self._lost += 1
        self.flush()

    def flush(self) -> bool:
        """Write the waiting lines, as far as the disk accepts them; returns whether none waits any more."""
        late = len(self._waiting) - 1
        try:
            self._file = self._open() if self._file is None else self._file
            while self._waiting:
                self._put(self._file, self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            self._fail(error)
            return False
        if self._is_failing:
            self._is_failing = False
            waited = f"{counted(late, 'line')} {'has' if late == 1 else 'have'} waited in memory"
            lost = f"; {counted(self._lost, 'line')} before them {_is_are(self._lost)} lost" if self._lost else ""
            self._report(f"{self._path} can be written again: {waited}{lost}")
            self._lost = 0
        return True

    def close(self) -> None:
        """Close the file. Lines that the disk still rejects are lost."""
        if self._waiting and not self.flush():
            lost = len(self._waiting) + self._lost
            self._report(
                f"warning: {counted(lost, 'line')} of {self._path} could not be written and {_is_are(lost)} lost"
            )
            self._waiting.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        """Open the file, and truncate it after the last whole line."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._file).st_size
        if self._size is not None and size > self._size:
            os.ftruncate(self._file, self._size)
            size = self._size
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # from another writer, or a disk that lost data
            size += os.write(self._file, b"\n")
        self._size = size
        return self._file

    def _put(self, file: int, data: bytes) -> None:
        assert self._size is not None
        written = os.write(file, data)
        while written < len(data):  # a full disk may accept a part and reject the rest
            written += os.write(file, data[written:])
        self._size += len(data)

    def _fail(self, error: OSError) -> None:
        """Truncate the file to complete lines and close it; the next write opens it again, in case the descriptor is
        stale."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # if this fails, the file is truncated when it is opened again
                if self._size is not None:
                    os.ftruncate(file, self._size)
            with suppress(OSError):  # an unreachable disk may fail here, too
                os.close(file)
        if not self._is_failing:
            self._is_failing = True
            self._report(
                f"warning: {self._path} cannot be written ({error.strerror or error}); training goes on, and its lines "
                f"wait in memory, up to {MOST_BYTES >> 20} MiB"
            )


def _is_are(count: int) -> str:
    return "is" if count == 1 else "are"
