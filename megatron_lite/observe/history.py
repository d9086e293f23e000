"""The figures of a run over its steps, read from metrics.jsonl in one pass and in bounded memory: what the report, the
loss curve and the summary show, and what `compare` holds side by side."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_lite.observe.envelope import MOST_POINTS, Array, Envelope, Means
from megatron_lite.observe.lines import Block, Gap, Line, blocks, line_type
from megatron_lite.observe.logged import LoggedLines
from megatron_lite.observe.metrics import branch_of, entries, from_json
from megatron_lite.observe.panels import PANELS, WHOLE_GROUP

SPEED = ("step_seconds", "tokens_per_second", "data_seconds")
OTHERS = ("samples", "tokens")  # of which only the first and the last line are shown
MOST_SPEEDS = 8192
MOST_GROUP_POINTS = 20_000  # of all curves of a panel together
Points = tuple[list[int], list[float | None]]
"""Steps and values; None is a gap."""


@dataclass
class History:
    """What is kept of a metrics.jsonl."""

    count: int = 0
    """Lines."""
    first: dict[str, Any] = field(default_factory=dict)
    """The first line; empty where there is none. Of its figures those that charts and tiles show."""
    last: dict[str, Any] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    """Where lines are missing that had been written."""
    damaged: int = 0
    """Lines that cannot be read."""
    _curves: dict[str, Envelope] = field(default_factory=dict)
    _groups: dict[str, dict[str, Envelope]] = field(default_factory=dict)
    loss: Means = field(default_factory=Means)
    _speeds: Thinned = field(default_factory=lambda: Thinned(len(SPEED)))

    @classmethod
    def read(cls, path: Path, lost: Iterable[Gap] = (), logged: LoggedLines | None = None) -> History:
        """
        Args:
            lost: what earlier resumes have found missing; steps that were trained again since are not.
            logged: what a checkpoint knows of the file.
        """
        found = cls()
        names, groups = wanted()
        missing = MissingSteps(lost, logged)
        for block in blocks(path, line_type([*names, *OTHERS], groups)):
            found._add(block, names, groups)
            missing.see(block)
        found.gaps = missing.gaps
        for curve in found._curves.values():
            for gap in found.gaps:
                curve.add_gap(gap.first)
        return found

    def curve(self, name: str) -> Points:
        """One figure over all steps, without the steps that lack it."""
        found = self._curves.get(name)
        return found.points() if found is not None and found.has_values else ([], [])

    def group(self, name: str) -> dict[str, Points]:
        """The curves of a nested figure, by the names within."""
        found = self._groups.get(name, {})
        most = max(MOST_POINTS // 10, min(MOST_POINTS, MOST_GROUP_POINTS // max(len(found), 1)))
        return {inner: curve.points(most) for inner, curve in found.items()}

    def steady(self) -> dict[str, Array]:
        """SPEED of the second half of all steps, past the warm-up of caches and allocators; of very many a sample."""
        rows = self._speeds.rows
        rows = rows[len(rows) // 2 :]
        rows = rows[np.isfinite(rows).all(axis=1)]
        return dict(zip(SPEED, rows.T, strict=True))

    def _add(self, block: Block, names: Sequence[str], groups: Sequence[str]) -> None:
        self.damaged += block.damaged
        if not block.lines:
            return
        self.first = self.first or _as_entry(block.lines[0])
        self.last = _as_entry(block.lines[-1])
        steps = steps_of(block)
        columns = columns_of(block.lines, names)
        for name, (values, there) in columns.items():
            if there.any():
                self._curves.setdefault(name, Envelope()).add(steps[there], values[there])
        self.loss.add(steps, columns["loss"][0])
        self._speeds.add(np.stack([columns[name][0] for name in SPEED], axis=1))
        for name in groups:
            _add_group(self._groups.setdefault(name, {}), block.lines, name)
        self.count += len(block.lines)


@dataclass
class TakenBack:
    """What rollbacks have taken back, of the figures whose charts show it."""

    last_step: int = 0
    curves: dict[int, dict[str, tuple[array[int], array[float]]]] = field(default_factory=dict)
    """By the rollbacks that a branch came after: of each figure steps and values."""

    @classmethod
    def read(cls, path: Path) -> TakenBack:
        """Args: path: of a rolled_back.jsonl."""
        found = cls()
        names = [panel.keys[0].partition("/")[2] for panel in PANELS if panel.branches]
        for entry in entries(path):
            found.last_step = max(found.last_step, entry["step"])
            curves = found.curves.setdefault(branch_of(entry), {name: (array("q"), array("d")) for name in names})
            for name in names:
                if isinstance(value := entry.get(name), int | float):
                    curves[name][0].append(entry["step"])
                    curves[name][1].append(value)
        return found

    def branches(self, name: str) -> dict[int, Points]:
        """One figure of each branch, in the order of steps.

        Of one branch a later rollback may have taken back earlier steps than the one before it.
        """
        found = {}
        for branch, curves in sorted(self.curves.items()):
            steps, values = (np.array(part) for part in curves[name])
            order = np.argsort(steps, kind="stable")
            envelope = Envelope()
            envelope.add(steps[order], values[order])
            found[branch] = envelope.points()
        return found


def wanted() -> tuple[list[str], list[str]]:
    """Names of figures, and of nested ones, that are shown."""
    keys = [key.partition("/")[2] for panel in PANELS for key in panel.all_keys if key.startswith("train/")]
    groups = [key.removesuffix(WHOLE_GROUP) for key in keys if key.endswith(WHOLE_GROUP)]
    return list(dict.fromkeys([*(key for key in keys if not key.endswith(WHOLE_GROUP)), *SPEED])), groups


def steps_of(block: Block) -> Array:
    return np.fromiter((line.step for line in block.lines), np.int64, len(block.lines))


def columns_of(lines: Sequence[Line], names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
    """Figures of all lines: of each NaN where it is absent or no number, and where it is there."""
    usual = [name for name in names if getattr(lines[0], name) is not None]
    found = {}
    if len(usual) > 1:
        rows = chain.from_iterable(map(attrgetter(*usual), lines))
        try:  # in most blocks each line has a number for each
            table = np.fromiter(rows, float, len(lines) * len(usual)).reshape(len(lines), -1)
            everywhere = np.ones(len(lines), bool)
            found = {name: (values, everywhere) for name, values in zip(usual, table.T, strict=True)}
        except (TypeError, ValueError, OverflowError):
            pass
    return {name: found.get(name) or _column(lines, name) for name in names}


def _column(lines: Sequence[Line], name: str) -> tuple[Array, Array]:
    values: list[Any] = list(map(attrgetter(name), lines))
    if values.count(None) == len(values):
        return np.full(len(values), np.nan), np.zeros(len(values), bool)
    values = [_number(value) for value in values]
    there = np.fromiter((value is not None for value in values), bool, len(values))
    return np.array(values, dtype=float), there


def _number(value: Any) -> float | None:
    """None where it is none."""
    value = from_json(value)
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return math.inf


def _as_entry(line: Line) -> dict[str, Any]:
    """As `read_metrics` would give it, without what is absent."""
    return {name: from_json(value) for name, value in msgspec.structs.asdict(line).items() if value is not None}


def _add_group(curves: dict[str, Envelope], lines: Sequence[Line], name: str) -> None:
    found = list(map(attrgetter(name), lines))
    if found.count(None) == len(found):
        return
    having = [(line.step, value) for line, value in zip(lines, found, strict=True) if value is not None]
    alike: dict[tuple[Any, ...], list[int]] = {}
    groups: list[dict[Any, Any]] = [group if isinstance(group, dict) else dict(enumerate(group)) for _, group in having]
    for place, group in enumerate(groups):
        alike.setdefault(tuple(group), []).append(place)
    for keys, places in alike.items():
        steps = np.array([having[place][0] for place in places])
        rows = [list(groups[place].values()) for place in places]
        try:
            table = np.array(rows, dtype=float)
        except (TypeError, ValueError, OverflowError):
            table = np.array([[_number(value) for value in row] for row in rows], dtype=float)
        for key, values in zip(keys, table.T, strict=True):
            curves.setdefault(str(key), Envelope()).add(steps, values)


class Thinned:
    """Rows of numbers; of more than MOST_SPEEDS every second, fourth, ... one."""

    def __init__(self, columns: int) -> None:
        self.rows = np.empty((0, columns))
        self._stride, self._seen = 1, 0

    def add(self, rows: Array) -> None:
        self.rows = np.concatenate([self.rows, rows[-self._seen % self._stride :: self._stride]])
        self._seen += len(rows)
        while len(self.rows) > MOST_SPEEDS:
            self.rows = self.rows[::2]
            self._stride *= 2


class MissingSteps:
    """Finds the steps whose lines are gone while the blocks of a file go by.

    Steps that are trained again since, after a rollback to an earlier one, are not gone.
    """

    def __init__(self, lost: Iterable[Gap] = (), logged: LoggedLines | None = None) -> None:
        self._known = {gap: gap.last for gap in lost}
        self._logged = logged
        self._found, self._steps = list[Gap](), list[Array]()
        self._damaged = False

    def see(self, block: Block) -> None:
        self._found += block.gaps
        self._damaged = self._damaged or block.damaged > 0
        if not block.lines or not (self._known or self._logged):
            return
        steps = steps_of(block)
        if self._logged is not None:
            self._steps.append(steps)
        for gap in self._known:
            place = int(np.searchsorted(steps, gap.first))
            if place < len(steps):
                self._known[gap] = min(self._known[gap], int(steps[place]) - 1)

    @property
    def gaps(self) -> list[Gap]:
        known = [Gap(gap.first, last) for gap, last in self._known.items() if last >= gap.first]
        steps = np.concatenate([np.empty(0, np.int64), *self._steps])
        missing = self._logged.missing(steps) if self._logged is not None else []
        if len(steps) and not self._damaged:  # the run may have gone back to an older checkpoint, and be on its way
            missing = [gap for gap in missing if gap.first < steps[-1]]
        return merged([*self._found, *known, *missing])


def merged(gaps: Iterable[Gap]) -> list[Gap]:
    """Those that overlap as one, in the order of steps."""
    found: list[Gap] = []
    for gap in sorted(gaps, key=lambda gap: (gap.first, gap.last)):
        if found and gap.first <= found[-1].last:
            found[-1] = Gap(found[-1].first, max(found[-1].last, gap.last))
        else:
            found.append(gap)
    return found


@dataclass
class Pairs:
    """Lines of the same steps of two runs."""

    steps: Array
    first: list[Any]
    second: list[Any]
    all_steps: tuple[Array, Array]
    """Of both, in common or not, from the end of the pairs before on."""


def paired(first: Iterator[Block], second: Iterator[Block]) -> Iterator[Pairs]:
    """The lines whose steps both runs have, as blocks. Reads both to their ends, a few blocks at a time."""
    sides = [_Side(first), _Side(second)]
    while all(side.fill() for side in sides):
        until = min(int(side.steps[-1]) for side in sides)
        (left, lines), (right, others) = (side.take(until) for side in sides)
        steps, in_left, in_right = np.intersect1d(left, right, assume_unique=True, return_indices=True)
        in_both = [lines[place] for place in in_left], [others[place] for place in in_right]
        yield Pairs(steps, *in_both, (left, right))
    for side in sides:
        while side.fill():
            side.take(int(side.steps[-1]))


class _Side:
    def __init__(self, source: Iterator[Block]) -> None:
        self._source, self._lines = source, list[Any]()
        self.steps = np.empty(0, np.int64)

    def fill(self) -> bool:
        """Whether there is a line left."""
        while not self._lines:
            block = next(self._source, None)
            if block is None:
                return False
            self._lines, self.steps = block.lines, steps_of(block)
        return True

    def take(self, until: int) -> tuple[Array, list[Any]]:
        """What is left up to this step."""
        place = int(np.searchsorted(self.steps, until, side="right"))
        taken = self.steps[:place], self._lines[:place]
        self.steps, self._lines = self.steps[place:], self._lines[place:]
        return taken
