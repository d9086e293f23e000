"""What a checkpoint records about metrics.jsonl, so that a resume can detect whether the file was changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xxhash

from megatron_lite.observe.envelope import Array
from megatron_lite.observe.lines import Gap


@dataclass(frozen=True)
class LoggedLines:
    """The lines of metrics.jsonl up to the step of a checkpoint."""

    lines: int
    bytes: int
    xxh3: str
    """xxh3-128 of these bytes, in hexadecimal digits."""
    steps: tuple[tuple[int, int, int], ...]
    """Steps of these lines as ranges with a constant interval: first step, last step, interval."""

    @property
    def is_consistent(self) -> bool:
        """Whether the ranges contain as many steps as there are lines; otherwise the record is damaged."""
        ascend = all(0 <= first <= last and every >= 0 for first, last, every in self.steps)
        return ascend and self.lines == sum((last - first) // (every or 1) + 1 for first, last, every in self.steps)

    def all_steps(self) -> Array:
        parts = [np.arange(first, last + 1, every or 1) for first, last, every in self.steps]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def missing(self, found: Array) -> list[Gap]:
        """The logged steps that are not among these, with neighbouring steps merged into ranges."""
        logged = self.all_steps()
        lost = np.flatnonzero(~np.isin(logged, found))
        if not len(lost):
            return []
        runs = np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1)
        return [Gap(int(logged[run[0]]), int(logged[run[-1]])) for run in runs]


@dataclass
class Log:
    """Running record of the lines while they are written."""

    lines: int = 0
    num_bytes: int = 0
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    steps: list[list[int]] = field(default_factory=list)

    def add(self, step: int, line: bytes) -> None:
        self.add_text(line)
        self.add_step(step)

    def add_text(self, text: bytes) -> None:
        self.num_bytes += len(text)
        self.digest.update(text)

    def add_step(self, step: int) -> None:
        self.lines += 1
        if self.steps:
            stretch = self.steps[-1]
            _, last, every = stretch
            if every in (0, step - last):
                stretch[1:] = [step, step - last]
                return
        self.steps.append([step, step, 0])

    def so_far(self) -> LoggedLines:
        steps = tuple((first, last, every) for first, last, every in self.steps)
        return LoggedLines(self.lines, self.num_bytes, self.digest.hexdigest(), steps)
