"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimers:
    """Wall seconds of named phases of one step, e.g. `step` and `data`; phases may nest and repeat.

    On a GPU work is queued: a phase holds the work of its kernels only when something inside waits for them, as reading
    the loss does for the whole step.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """`{"<phase>_seconds": ...}` since the last call; starts afresh."""
        collected = {f"{phase}_seconds": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return collected
