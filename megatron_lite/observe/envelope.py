"""Downsample a curve of any length to a few thousand points that look the same: the minimum, the maximum and a gap of
each range of steps, so that a spike of a single step survives."""

from __future__ import annotations

from typing import Any

import numpy as np

MOST_POINTS = 2000
MOST_NEW = 2**14  # points that wait to be reduced together

Array = np.ndarray[Any, Any]


class Envelope:
    """Receives the points of a curve one after the other and keeps at most `most` of them.

    The ranges of steps have equal widths, a power of two, and are aligned to step 0: a wider range consists of whole
    narrower ones, so the result depends only on the curve and not on the blocks in which it was added.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most - 2  # the ends are kept as well
        self._width = 1
        self._steps, self._values = np.empty(0, np.int64), np.empty(0)
        self._ends: list[tuple[int, float]] = []
        self._new: list[tuple[Array, Array]] = []
        self._num_new = 0

    def add(self, steps: Array, values: Array) -> None:
        """Append points in the order of steps; values that are not finite are gaps."""
        if not len(steps):
            return
        values = np.where(np.isfinite(values), values, np.nan)
        ends = [(int(steps[0]), float(values[0])), (int(steps[-1]), float(values[-1]))]
        self._ends = [self._ends[0] if self._ends else ends[0], ends[1]]
        self._new.append((steps, values))
        self._num_new += len(steps)
        if self._num_new > MOST_NEW:
            self._take_new()

    def _take_new(self) -> None:
        """Reduce many new points at once: the cost is per call, not per point."""
        if not self._new:
            return
        steps, values = (np.concatenate(parts) for parts in zip(*self._new, strict=True))
        steps, values = np.concatenate([self._steps, steps]), np.concatenate([self._values, values])
        self._steps, self._values = _reduced(steps, values, self._width)
        self._new, self._num_new = [], 0
        self._shrink(self._most)

    def add_gap(self, step: int) -> None:
        """Insert a point without a value at its place."""
        self._take_new()
        place = np.searchsorted(self._steps, step)
        self._steps = np.insert(self._steps, place, step)
        self._values = np.insert(self._values, place, np.nan)
        self._shrink(self._most)

    def points(self, most: int | None = None) -> tuple[list[int], list[float | None]]:
        """Steps and values; None is a gap."""
        self._take_new()
        if most is not None:
            self._shrink(most)
        kept = dict(zip(self._steps.tolist(), self._values.tolist(), strict=True))
        kept |= dict(self._ends)
        steps = sorted(kept)
        return steps, [None if kept[step] != kept[step] else kept[step] for step in steps]

    @property
    def has_values(self) -> bool:
        self._take_new()
        return bool(np.isfinite(self._values).any())

    def _shrink(self, most: int) -> None:
        while len(self._steps) > most:
            self._width *= 2
            self._steps, self._values = _reduced(self._steps, self._values, self._width)


class Means:
    """The mean of a curve over ranges of steps of equal width, at most `most` of them."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._width = 1
        self._sums, self._counts, self._steps = np.zeros(most), np.zeros(most), np.zeros(most)

    def add(self, steps: Array, values: Array) -> None:
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if not len(steps):
            return
        most = len(self._sums)
        while steps[-1] // self._width >= most:
            self._width *= 2
            for parts in (self._sums, self._counts, self._steps):
                halves = parts[0::2] + parts[1::2]
                parts[:] = 0
                parts[: len(halves)] = halves
        places = steps // self._width
        self._sums += np.bincount(places, values, most)
        self._counts += np.bincount(places, minlength=most)
        self._steps += np.bincount(places, steps, most)

    def points(self) -> tuple[list[int], list[float]]:
        """The mean step and the mean value of each range that has values."""
        there = self._counts > 0
        counts = self._counts[there]
        return np.rint(self._steps[there] / counts).astype(int).tolist(), (self._sums[there] / counts).tolist()


def _reduced(steps: Array, values: Array, width: int) -> tuple[Array, Array]:
    if width == 1:
        return steps, values
    stretch = steps // width
    begins = np.concatenate([[True], stretch[1:] != stretch[:-1]])
    starts = np.flatnonzero(begins)
    number = np.cumsum(begins) - 1
    gap = np.isnan(values)
    keep = np.zeros(len(steps), bool)
    keep[_first_of_each(np.flatnonzero(gap), number)] = True
    for extreme, filler in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        filled = np.where(gap, filler, values)
        hits = np.flatnonzero((filled == extreme.reduceat(filled, starts)[number]) & ~gap)
        keep[_first_of_each(hits, number)] = True
    return steps[keep], values[keep]


def _first_of_each(places: Array, number: Array) -> Array:
    """The first of the ascending places in each range."""
    if not len(places):
        return places
    stretches = number[places]
    return places[np.concatenate([[True], stretches[1:] != stretches[:-1]])]
