"""The figures of a run over its steps, read from metrics.jsonl in one pass and in bounded memory, for the report, the
loss curve, the summary and `compare`."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from operator import attrgetter
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Any

import numpy as np

from megatron_lite.observe.envelope import MOST_NEW, MOST_POINTS, Array, Envelope, Means
from megatron_lite.observe.lines import Block, Gap, Line, blocks, line_type
from megatron_lite.observe.logged import LoggedLines
from megatron_lite.observe.metrics import branch_of, entries, newest_entries
from megatron_lite.observe.panels import PANELS, WHOLE_GROUP

SPEED = ("step_seconds", "tokens_per_second", "data_seconds")
MOST_SPEEDS = 8192
MOST_GROUP_POINTS = 20_000  # over all curves of a panel
Points = tuple[list[int], list[float | None]]
"""Steps and values; None is a gap."""


@dataclass
class History:
    """A summary of a metrics.jsonl in bounded memory."""

    count: int = 0
    """Number of lines."""
    first: dict[str, Any] = field(default_factory=dict)
    """The first line; empty if there is none."""
    last: dict[str, Any] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    """Steps whose lines were written and are missing."""
    damaged: int = 0
    """Number of lines that cannot be read."""
    dropped: int = 0
    """Number of values in the other lines that are not numbers."""
    _curves: dict[str, Envelope] = field(default_factory=dict)
    _groups: dict[str, GroupCurves] = field(default_factory=dict)
    loss: Means = field(default_factory=Means)
    _speeds: Thinned = field(default_factory=lambda: Thinned(len(SPEED)))

    @classmethod
    def read(cls, path: Path, lost: Iterable[Gap] = (), logged: LoggedLines | None = None) -> History:
        """
        Args:
            lost: steps that earlier resumes have found missing; those trained again since are not missing any more.
            logged: what a checkpoint records about the file.
        """
        names, groups = wanted()
        found = cls(_groups={name: GroupCurves() for name in groups})
        missing = MissingSteps(lost, logged)
        for table in in_batches(found._tables(blocks(path, line_type(names, groups)), names, missing)):
            found._add(table, names)
        if found.count:
            found.first |= _line_of(entries(path), found.first["step"])
            found.last |= _line_of(newest_entries(path), found.last["step"])
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
        found = self._groups[name].curves() if name in self._groups else {}
        most = max(MOST_POINTS // 10, min(MOST_POINTS, MOST_GROUP_POINTS // max(len(found), 1)))
        return {inner: curve.points(most) for inner, curve in found.items()}

    def steady(self) -> dict[str, Array]:
        """SPEED of the second half of all steps, after the warm-up of caches and allocators; a subset of very many."""
        rows = self._speeds.rows
        rows = rows[len(rows) // 2 :]
        rows = rows[np.isfinite(rows).all(axis=1)]
        return dict(zip(SPEED, rows.T, strict=True))

    def _tables(self, source: Iterable[Block], names: Sequence[str], missing: MissingSteps) -> Iterator[Table]:
        """The named figures of each block, after counting what else is in it."""
        for block in source:
            missing.see(block)
            self.damaged += block.damaged
            self.dropped += block.dropped
            if block.lines:
                self._count(block.steps)
                _add_groups(self._groups, block.lines)
                yield Table.of(block, names)

    def _count(self, steps: Array) -> None:
        self.first = self.first or {"step": int(steps[0])}
        self.last = {"step": int(steps[-1])}
        self.count += len(steps)

    def _add(self, table: Table, names: Sequence[str]) -> None:
        for place, name in enumerate(names):
            those = table.there[:, place]
            if those.all():
                self._curves.setdefault(name, Envelope()).add(table.steps, table.values[:, place])
            elif those.any():
                self._curves.setdefault(name, Envelope()).add(table.steps[those], table.values[those, place])
        self.loss.add(table.steps, table.values[:, names.index("loss")])
        self._speeds.add(table.values[:, [names.index(name) for name in SPEED]])


class GroupCurves:
    """The curves of a nested figure, by the names within."""

    def __init__(self) -> None:
        self._curves: dict[str, Envelope] = {}
        self._waiting: dict[tuple[Any, ...], tuple[list[int], list[Any]]] = {}
        """By their names: steps, and the figures of all these steps in a row."""
        self._num_waiting = 0

    def add(self, step: int, group: dict[str, Any] | list[Any]) -> None:
        names = tuple(group) if isinstance(group, dict) else tuple(range(len(group)))
        steps, figures = self._waiting.setdefault(names, ([], []))
        steps.append(step)
        figures.extend(group.values() if isinstance(group, dict) else group)
        self._num_waiting += len(names)
        if self._num_waiting > MOST_NEW:
            self._take_waiting()

    def curves(self) -> dict[str, Envelope]:
        self._take_waiting()
        return self._curves

    def _take_waiting(self) -> None:
        for names, (steps, figures) in self._waiting.items():
            table = np.array(figures, dtype=float).reshape(len(steps), -1)  # numpy reads None, "NaN" and "Infinity"
            for name, values in zip(names, table.T, strict=True):
                self._curves.setdefault(str(name), Envelope()).add(np.array(steps), values)
        self._waiting, self._num_waiting = {}, 0


def _add_groups(curves: Mapping[str, GroupCurves], lines: Sequence[Line]) -> None:
    nothing = (None,) * len(curves)
    for line, groups in zip(lines, map(attrgetter(*curves), lines), strict=True):
        if groups != nothing:
            for name, group in zip(curves, groups, strict=True):
                if group is not None:
                    curves[name].add(line.step, group)


@dataclass
class TakenBack:
    """Rolled-back steps: the figures whose charts show them."""

    last_step: int = 0
    curves: dict[int, dict[str, tuple[array[int], array[float]]]] = field(default_factory=dict)
    """Branch (the number of rollbacks before it) -> figure -> steps and values."""

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

        Steps of a branch need not be sorted: a later rollback may have undone earlier steps than the one before it.
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


@dataclass(frozen=True)
class Table:
    """Figures of several lines: a row for each line, a column for each name."""

    steps: Array
    values: Array
    """NaN if the line lacks the figure."""
    there: Array
    """Whether the line has the figure."""

    @classmethod
    def of(cls, block: Block, names: Sequence[str]) -> Table:
        """Args: block: with at least one line."""
        lines = block.lines
        usual = [place for place, name in enumerate(names) if getattr(lines[0], name) is not None]
        rows = _rows(lines, [names[place] for place in usual])
        if rows is not None and len(usual) == len(names):
            return cls(block.steps, rows, np.ones(rows.shape, bool))
        values = np.full((len(lines), len(names)), np.nan)
        there = np.zeros(values.shape, bool)
        if rows is not None:
            values[:, usual], there[:, usual] = rows, True
        for place, name in enumerate(names):
            if not there[0, place]:
                column = list(map(attrgetter(name), lines))
                there[:, place] = [value is not None for value in column]
                values[:, place] = column  # numpy reads None, "NaN" and "Infinity"
        return cls(block.steps, values, there)

    @classmethod
    def joined(cls, parts: Sequence[Table]) -> Table:
        """Args: parts: at least one, in the order of their steps."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("steps", "values", "there")))

    def rows(self, which: Any) -> Table:
        """Args: which: an index of numpy."""
        return Table(self.steps[which], self.values[which], self.there[which])

    def __len__(self) -> int:
        return len(self.steps)


def in_batches(tables: Iterable[Table]) -> Iterator[Table]:
    """Several tables at once: numpy's cost is per call, not per line."""
    waiting: list[Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) > MOST_NEW:
            yield Table.joined(waiting)
            waiting = []
    if waiting:
        yield Table.joined(waiting)


def _rows(lines: Sequence[Line], names: Sequence[str]) -> Array | None:
    """A row for each line; None unless every line has a number for every name, which most blocks have."""
    if len(names) < 2:
        return None
    pack = Struct(f"{len(names)}d").pack
    try:
        content = b"".join(starmap(pack, map(attrgetter(*names), lines)))
    except StructError:
        return None
    return np.frombuffer(content).reshape(len(lines), -1)


def _line_of(found: Iterator[dict[str, Any]], step: int) -> dict[str, Any]:
    """The first line of this step; empty if the run has been rolled back meanwhile."""
    return next((entry for entry in found if entry["step"] == step), {})


class Thinned:
    """Rows of numbers; above MOST_SPEEDS only every second, fourth, ... row is kept."""

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
    """Finds the steps whose lines are missing while the blocks of a file are read.

    Steps that were trained again since, after a rollback, are not missing.
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
        steps = block.steps
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
        if len(steps) and not self._damaged:  # the run may have resumed from an older checkpoint and not caught up yet
            missing = [gap for gap in missing if gap.first < steps[-1]]
        return merged([*self._found, *known, *missing])


def merged(gaps: Iterable[Gap]) -> list[Gap]:
    """Merge overlapping gaps, in the order of steps."""
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

    first: Table
    second: Table
    all_steps: tuple[Array, Array]
    """All steps of both runs, common or not, since the previous pairs."""


def paired(first: Iterator[Table], second: Iterator[Table]) -> Iterator[Pairs]:
    """The lines of the steps that both runs have. Reads both to the end, one table of each at a time."""
    sides = [_Side(first), _Side(second)]
    while all(side.fill() for side in sides):
        until = min(int(side.table.steps[-1]) for side in sides)
        left, right = (side.take(until) for side in sides)
        _, in_left, in_right = np.intersect1d(left.steps, right.steps, assume_unique=True, return_indices=True)
        yield Pairs(left.rows(in_left), right.rows(in_right), (left.steps, right.steps))
    for side in sides:
        while side.fill():
            side.take(int(side.table.steps[-1]))


class _Side:
    def __init__(self, source: Iterator[Table]) -> None:
        self._source = source
        self.table = Table(np.empty(0, np.int64), np.empty((0, 0)), np.empty((0, 0), bool))

    def fill(self) -> bool:
        """Read the next table if needed; returns whether any line is left."""
        while not len(self.table):
            table = next(self._source, None)
            if table is None:
                return False
            self.table = table
        return True

    def take(self, until: int) -> Table:
        """Remove and return the lines up to this step."""
        place = int(np.searchsorted(self.table.steps, until, side="right"))
        taken, self.table = self.table.rows(slice(place)), self.table.rows(slice(place, None))
        return taken
