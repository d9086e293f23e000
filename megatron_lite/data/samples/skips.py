"""Windows of samples that a run skips, recorded in the run folder, so that every later attempt skips them, too.

Skipped samples keep their global numbers, but a run counts only the samples that it consumes. So the n-th sample of a
run is the n-th sample outside all windows, and everything that counts samples (the batch ramp, the position in a
checkpoint) is unaffected by skips.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from megatron_lite.errors import DamagedFileError, DataError
from megatron_lite.files import replace_file, set_aside
from megatron_lite.observe.metrics import EVENTS_FILE, ROLLBACK_EVENT, SKIPS_FILE, read_metrics
from megatron_lite.state_files import read_object, warn

FORMAT = 1


@dataclass(frozen=True, order=True)
class Window:
    """The global samples [first, stop)."""

    first: int
    stop: int


class Skips:
    """The skipped samples, and the mapping between consumed samples and global numbers.

    Args:
        windows: in any order; windows that touch or overlap are merged.
    """

    def __init__(self, windows: Iterable[Window] = ()) -> None:
        self.windows = _merged(windows)
        self._gone = [0]  # samples in the first n windows
        self._jumps = []  # samples consumed before each window is skipped
        for window in self.windows:
            self._jumps.append(window.first - self._gone[-1])
            self._gone.append(self._gone[-1] + window.stop - window.first)

    def index(self, count: int) -> int:
        """The global number of the sample that is consumed after `count` others."""
        return count + self._gone[bisect.bisect_right(self._jumps, count)]

    def indices(self, first_count: int, number: int) -> list[int]:
        """The global numbers of `number` consecutive consumed samples."""
        return [self.index(count) for count in range(first_count, first_count + number)]

    def count(self, index: int) -> int:
        """How many samples are consumed before a global number: the inverse of `index`."""
        ahead = bisect.bisect_left(self.windows, Window(index, 0))
        gone = sum(min(window.stop, index) - window.first for window in self.windows[:ahead])
        return index - gone

    def before(self, index: int) -> tuple[Window, ...]:
        """The skipped windows before a global number."""
        return tuple(Window(one.first, min(one.stop, index)) for one in self.windows if one.first < index)


def _merged(windows: Iterable[Window]) -> tuple[Window, ...]:
    merged: list[Window] = []
    for window in sorted(windows):
        if merged and window.first <= merged[-1].stop:
            merged[-1] = Window(merged[-1].first, max(merged[-1].stop, window.stop))
        elif window.stop > window.first:
            merged.append(window)
    return tuple(merged)


@dataclass(frozen=True)
class Rollback:
    """Why a window of samples is skipped."""

    window: Window
    step: int
    """The step with the loss spike."""
    to_step: int
    """The step of the checkpoint that the run returned to."""
    reason: str


@dataclass(frozen=True)
class _Document:
    """The content of the file."""

    format: int
    rollbacks: list[Rollback]


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """All rollbacks of a run so far, oldest first.

    Raises:
        DataError: the file is damaged, so it is unknown which samples to skip.
    """
    path = run_dir / SKIPS_FILE
    try:
        found = read_object(path, _Document)
    except DamagedFileError as error:
        raise _unknown(path, str(error)) from error
    if found is not None and found.format != FORMAT:
        raise _unknown(path, f"{path} has format {found.format}, but this version reads {FORMAT}")
    if found is not None and any(not 0 <= one.window.first < one.window.stop for one in found.rollbacks):
        raise _unknown(path, f"{path} is damaged: a window ends before it begins")
    return [] if found is None else found.rollbacks


def _unknown(path: Path, problem: str) -> DataError:
    return DataError(
        f"{problem}, but it lists the samples that this run skips; restore {path.name}, or train in a new train.run_dir"
    )


def restored_rollbacks(run_dir: Path) -> list[Rollback] | None:
    """The rollbacks of a run as recorded in events.jsonl; None if some are missing there."""
    events = [one for one in read_metrics(run_dir / EVENTS_FILE) if one.get("event") == ROLLBACK_EVENT]
    by_number = {one.get("rollbacks"): one for one in events if {"first_sample", "stop_sample"} <= one.keys()}
    if not by_number or sorted(by_number, key=str) != sorted(range(1, len(by_number) + 1), key=str):
        return None
    return [
        Rollback(Window(one["first_sample"], one["stop_sample"]), one["step"], one["to_step"], f"as {EVENTS_FILE} says")
        for _, one in sorted(by_number.items())
    ]


def rollbacks_to_go_on_with(run_dir: Path) -> list[Rollback]:
    """`read_rollbacks` for a run that resumes: replace a damaged file by one restored from events.jsonl.

    Call it only on the writing rank.

    Raises:
        DataError: events.jsonl does not have all rollbacks, either.
    """
    try:
        return read_rollbacks(run_dir)
    except DataError as error:
        restored = restored_rollbacks(run_dir)
        if restored is None:
            raise
        warn(f"{error}. It is restored from {EVENTS_FILE}: {len(restored)} windows of samples are skipped")
        set_aside(run_dir / SKIPS_FILE)
        write_rollbacks(run_dir, restored)
        return restored


def write_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    """Call it only on the writing rank. The file is fsynced when it returns."""
    document = {"format": FORMAT, "rollbacks": [asdict(one) for one in rollbacks]}
    replace_file(run_dir / SKIPS_FILE, (json.dumps(document, indent=1) + "\n").encode())


def skips_of(rollbacks: Iterable[Rollback]) -> Skips:
    return Skips(one.window for one in rollbacks)


def stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [first, stop) without gaps."""
    starts = [0, *(place + 1 for place, (a, b) in enumerate(pairwise(numbers)) if b != a + 1)]
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        yield numbers[start], numbers[end - 1] + 1
