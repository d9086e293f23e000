"""Progress lines for long work, printed by a thread, so that they also come during one long call of a library."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

REPORT_SECONDS = 10.0


class ProgressLines:
    """Reports a line every ten seconds while the block runs, and a final line at its end.

    Args:
        report: receives the lines; called from a separate thread, except for the final line.
        line: makes a line from the elapsed seconds and whether the work is done.
    """

    def __init__(self, report: Callable[[str], None], line: Callable[[float, bool], str]) -> None:
        self._report = report
        self._line = line
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="progress of data", daemon=True)

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self._report(self._line(self._seconds(), True))

    def _tell(self) -> None:
        while not self._over.wait(REPORT_SECONDS):
            self._report(self._line(self._seconds(), False))

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)
