"""Compare the figures of two runs step by step: where they diverge, and how far. One pass, in bounded memory."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.files import replace_file
from megatron_lite.observe.charts import COLOURS, Series, from_plotly
from megatron_lite.observe.envelope import Array, Envelope
from megatron_lite.observe.history import MissingSteps, Pairs, Table, in_batches, paired
from megatron_lite.observe.lines import Block, Gap, blocks, line_type
from megatron_lite.observe.metrics import METRICS_FILE
from megatron_lite.observe.run_folder import RunFolder

Curve = Mapping[int, float]
"""Step -> value."""
FIGURES = ("loss", "grad_norm")
SAMPLES = ("samples", "global_batch_size")
NAMES = (*FIGURES, *SAMPLES)


@dataclass
class Parting:
    """Where one figure of two runs diverges, over the steps that both have logged."""

    tolerance: float
    """Relative to the larger value."""
    steps: int = 0
    """Number of common steps."""
    first_step: int = 0
    last_step: int = 0
    last_values: tuple[float, float] = (math.nan, math.nan)
    first_different: int | None = None
    """The first step at which the values are not bitwise equal; None = there is none."""
    steps_before: int = 0
    """Number of common steps before `first_different`."""
    first_beyond: int | None = None
    """The first step at which they differ by more than the tolerance."""
    beyond_values: tuple[float, float] = (math.nan, math.nan)
    """The values at that step."""
    largest_gap: float = -1.0
    """Absolute difference; infinite if only one of the values is finite."""
    largest_gap_step: int = 0

    @classmethod
    def of(cls, first: Curve, second: Curve, tolerance: float) -> Parting | None:
        """Compare two curves; None if they have no step in common."""
        common = sorted(first.keys() & second.keys())
        values = [np.array([curve[step] for step in common], dtype=float) for curve in (first, second)]
        parting = cls(tolerance)
        parting.add(np.array(common, dtype=np.int64), *values)
        return parting if common else None

    def add(self, steps: Array, first: Array, second: Array) -> None:
        """Add further steps, in ascending order."""
        if not len(steps):
            return
        gaps = abs_gap(first, second)
        largest = int(np.argmax(gaps))
        if gaps[largest] > self.largest_gap:
            self.largest_gap, self.largest_gap_step = float(gaps[largest]), int(steps[largest])
        self._part(steps, first, second, gaps)
        self.first_step = self.first_step if self.steps else int(steps[0])
        self.last_step, self.last_values = int(steps[-1]), (float(first[-1]), float(second[-1]))
        self.steps += len(steps)

    def _part(self, steps: Array, first: Array, second: Array, gaps: Array) -> None:
        if self.first_different is None and (gaps > 0).any():
            place = int(np.argmax(gaps > 0))
            self.first_different, self.steps_before = int(steps[place]), self.steps + place
        beyond = relative_gap(first, second) > self.tolerance
        if self.first_beyond is None and beyond.any():
            place = int(np.argmax(beyond))
            self.first_beyond, self.beyond_values = int(steps[place]), (float(first[place]), float(second[place]))


def abs_gap(first: Any, second: Any) -> Any:
    """Absolute difference of numbers or arrays: 0 for two NaN or the same infinity, infinite if only one is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(np.subtract(first, second))
    same = np.equal(first, second) | (np.isnan(first) & np.isnan(second))
    return np.where(same, 0.0, np.where(np.isfinite(gap), gap, np.inf))


def relative_gap(first: Any, second: Any) -> Any:
    gap = abs_gap(first, second)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = gap / np.maximum(np.abs(first), np.abs(second))
    return np.where((gap > 0) & (gap < np.inf), relative, gap)


@dataclass
class Side:
    """The logged figures of one of the two runs."""

    count: int = 0
    """Number of lines."""
    before_parting: int = 0
    """Number of lines before the first step with a different loss; all if there is none."""
    gaps: list[Gap] = field(default_factory=list)
    curves: dict[str, Envelope] = field(default_factory=lambda: {name: Envelope() for name in FIGURES})

    def watched(self, source: Iterator[Block], run: RunFolder) -> Iterator[Table]:
        """The columns NAMES of all lines, several blocks at once."""
        missing = MissingSteps(run.known_losses(), run.logged)
        for table in in_batches(_tables(source, missing)):
            yield self._counted(table)
        self.gaps = missing.gaps

    def _counted(self, table: Table) -> Table:
        self.count += len(table)
        for place, name in enumerate(FIGURES):
            there = table.there[:, place]
            self.curves[name].add(table.steps[there], table.values[there, place])
        return table


def _tables(source: Iterable[Block], missing: MissingSteps) -> Iterator[Table]:
    for block in source:
        missing.see(block)
        if block.lines:
            yield Table.of(block, NAMES)


@dataclass
class Comparison:
    """The metrics of two runs."""

    sides: tuple[Side, Side]
    partings: dict[str, Parting]
    """One for each of FIGURES; with 0 steps if the runs have no step with this figure in common."""
    differences: dict[str, Envelope]
    """Relative differences of FIGURES."""
    common_steps: int = 0
    beyond: list[dict[str, float]] | None = None
    """NAMES of both runs at the first step where the losses differ by more than the tolerance."""

    @classmethod
    def of(cls, first: RunFolder, second: RunFolder, tolerance: float) -> Comparison:
        found = cls(
            (Side(), Side()),
            {name: Parting(tolerance) for name in FIGURES},
            {name: Envelope() for name in FIGURES},
        )
        kind = line_type(NAMES)
        sources = [
            side.watched(blocks(run.path / METRICS_FILE, kind), run)
            for side, run in zip(found.sides, (first, second), strict=True)
        ]
        for pairs in paired(sources[0], sources[1]):
            found._add(pairs)
        return found

    def _add(self, pairs: Pairs) -> None:
        both = pairs.first, pairs.second
        self.common_steps += len(pairs.first)
        loss = self.partings["loss"]
        parted = loss.first_different is not None, loss.first_beyond is not None
        for place, name in enumerate(FIGURES):
            there = both[0].there[:, place] & both[1].there[:, place]
            steps, values = both[0].steps[there], [table.values[there, place] for table in both]
            self.partings[name].add(steps, *values)
            self.differences[name].add(steps, relative_gap(*values))
        if loss.first_beyond is not None and not parted[1]:
            place = int(np.searchsorted(both[0].steps, loss.first_beyond))
            self.beyond = [dict(zip(NAMES, table.values[place].tolist(), strict=True)) for table in both]
        if not parted[0]:
            until = math.inf if loss.first_different is None else loss.first_different
            for side, steps in zip(self.sides, pairs.all_steps, strict=True):
                side.before_parting += int(np.searchsorted(steps, until))


def curve_of(entries: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """The curve of a figure from lines of metrics.jsonl or events."""
    return {entry["step"]: float(entry[name]) for entry in entries if isinstance(entry.get(name), int | float)}


def write_chart(path: Path, names: tuple[str, str], comparison: Comparison) -> None:
    """Write a self-contained page with both curves of each figure and their relative difference below.

    Raises:
        TrackingError: plotly is missing or broken.
        OSError: the page cannot be written.
    """
    titles = [title for name in FIGURES for title in (name, f"{name}: relative difference")]
    make_subplots = from_plotly("subplots").make_subplots
    figure = make_subplots(rows=len(titles), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.06)
    for place, figure_name in enumerate(FIGURES):
        row = 2 * place + 1
        for name, side, colour in zip(names, comparison.sides, COLOURS, strict=False):
            curve = Series(html.escape(name), *side.curves[figure_name].points())
            _add(figure, row, curve, colour, showlegend=place == 0)
        difference = Series("difference", *comparison.differences[figure_name].points())
        _add(figure, row + 1, difference, COLOURS[3], showlegend=False)
        figure.update_yaxes(type="log", exponentformat="e", row=row + 1, col=1)
    figure.update_layout(height=260 * len(titles), title_text=html.escape(" and ".join(names)), hovermode="x unified")
    figure.update_xaxes(title_text="step", row=len(titles), col=1)
    replace_file(path, figure.to_html(include_plotlyjs=True, full_html=True).encode())


def _add(figure: Any, row: int, series: Series, colour: str, *, showlegend: bool) -> None:
    figure.add_scatter(
        x=series.steps,
        y=series.values,
        name=series.name,
        line={"color": colour, "width": 1.6},
        mode="lines",
        showlegend=showlegend,
        row=row,
        col=1,
    )
