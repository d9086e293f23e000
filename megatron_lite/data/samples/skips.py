"""Stretches of samples that a run leaves out: kept in the run folder, so that every later attempt respects them.

A run counts the samples that it consumes; those that it leaves out have a number and are not counted. So the n-th
sample of the run is the n-th that lies in no window, and everything that counts samples, the batch ramp and the
position in a checkpoint, stays as it is.
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
    """Which samples are left out, and the number of the n-th that is not.

    Args:
        windows: in any order; those that touch or overlap become one.
    """

    def __init__(self, windows: Iterable[Window] = ()) -> None:
        self.windows = _merged(windows)
        self._gone = [0]  # samples in the first n windows
        self._jumps = []  # samples consumed where each window is jumped over
        for window in self.windows:
            self._jumps.append(window.first - self._gone[-1])
            self._gone.append(self._gone[-1] + window.stop - window.first)

    def index(self, count: int) -> int:
        """The global number of the sample ahead of which `count` samples are consumed."""
        return count + self._gone[bisect.bisect_right(self._jumps, count)]

    def indices(self, first_count: int, number: int) -> list[int]:
        """Of `number` consecutive samples."""
        return [self.index(count) for count in range(first_count, first_count + number)]

    def count(self, index: int) -> int:
        """How many samples are consumed ahead of a global number: the inverse of `index`."""
        ahead = bisect.bisect_left(self.windows, Window(index, 0))
        gone = sum(min(window.stop, index) - window.first for window in self.windows[:ahead])
        return index - gone

    def before(self, index: int) -> tuple[Window, ...]:
        """What is left out ahead of a global number."""
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
    """Why a window of samples is left out."""

    window: Window
    step: int
    """That was a spike."""
    to_step: int
    """Of the checkpoint that the run went back to."""
    reason: str


@dataclass(frozen=True)
class _Document:
    """The file."""

    format: int
    rollbacks: list[Rollback]


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """All rollbacks of a run so far, oldest first.

    Raises:
        DataError: the file is damaged: which samples to leave out is then unknown.
    """
    path = run_dir / SKIPS_FILE
    try:
        found = read_object(path, _Document)
    except DamagedFileError as error:
        raise _unknown(path, str(error)) from error
    if found is not None and found.format != FORMAT:
        raise _unknown(path, f"{path} has format {found.format}, and this version reads {FORMAT}")
    if found is not None and any(not 0 <= one.window.first < one.window.stop for one in found.rollbacks):
        raise _unknown(path, f"{path} is damaged: a window ends before it begins")
    return [] if found is None else found.rollbacks


def _unknown(path: Path, problem: str) -> DataError:
    return DataError(
        f"{problem}, and it tells which samples this run leaves out; bring {path.name} back, or train in a new "
        "train.run_dir"
    )


def restored_rollbacks(run_dir: Path) -> list[Rollback] | None:
    """What events.jsonl says of the rollbacks of a run; None where it does not have them all."""
    events = [one for one in read_metrics(run_dir / EVENTS_FILE) if one.get("event") == ROLLBACK_EVENT]
    by_number = {one.get("rollbacks"): one for one in events if {"first_sample", "stop_sample"} <= one.keys()}
    if not by_number or sorted(by_number, key=str) != sorted(range(1, len(by_number) + 1), key=str):
        return None
    return [
        Rollback(Window(one["first_sample"], one["stop_sample"]), one["step"], one["to_step"], f"as {EVENTS_FILE} says")
        for _, one in sorted(by_number.items())
    ]


def rollbacks_to_go_on_with(run_dir: Path) -> list[Rollback]:
    """The same for a run that is about to go on: a damaged file is set aside and written anew from events.jsonl. For
    the writing rank alone.

    Raises:
        DataError: events.jsonl does not have them either.
    """
    try:
        return read_rollbacks(run_dir)
    except DataError as error:
        restored = restored_rollbacks(run_dir)
        if restored is None:
            raise
        warn(f"{error}. It is restored from {EVENTS_FILE}: {len(restored)} windows of samples are left out")
        set_aside(run_dir / SKIPS_FILE)
        write_rollbacks(run_dir, restored)
        return restored


def write_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    """For the writing rank alone; on the disk when it returns."""
    document = {"format": FORMAT, "rollbacks": [asdict(one) for one in rollbacks]}
    replace_file(run_dir / SKIPS_FILE, (json.dumps(document, indent=1) + "\n").encode())


def skips_of(rollbacks: Iterable[Rollback]) -> Skips:
    return Skips(one.window for one in rollbacks)


def stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as [first, stop) of each run without a gap."""
    starts = [0, *(place + 1 for place, (a, b) in enumerate(pairwise(numbers)) if b != a + 1)]
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        yield numbers[start], numbers[end - 1] + 1
