"""Two curves of one figure, step by step: where they part, and how far."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.files import replace_file
from megatron_lite.observe.charts import COLOURS, Series, thinned

Curve = Mapping[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Parting:
    """What becomes of one figure in two runs, over the steps that both have logged."""

    steps: int
    """In common; at least one."""
    first_different: int | None
    """The first step at which the values are not the same bit for bit; None = there is none."""
    first_beyond: int | None
    """The first step at which they differ by more than the tolerance, relative to the larger one."""
    largest_gap: float
    """Absolute; infinite where one is a number and the other is none."""
    largest_gap_step: int
    last_step: int
    """In common."""

    @classmethod
    def of(cls, first: Curve, second: Curve, tolerance: float) -> Parting | None:
        """None where there is no step in common."""
        common = sorted(first.keys() & second.keys())
        if not common:
            return None
        gaps = {step: abs_gap(first[step], second[step]) for step in common}
        largest = max(common, key=lambda step: gaps[step])
        return cls(
            len(common),
            next((step for step in common if gaps[step] > 0), None),
            next((step for step in common if relative_gap(first[step], second[step]) > tolerance), None),
            gaps[largest],
            largest,
            common[-1],
        )


def abs_gap(first: float, second: float) -> float:
    """0 for two NaN or the same infinity, infinite where only one is a finite number."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    gap = abs(first - second)
    return gap if math.isfinite(gap) else math.inf


def relative_gap(first: float, second: float) -> float:
    gap = abs_gap(first, second)
    return gap / max(abs(first), abs(second)) if 0 < gap < math.inf else gap


def curve_of(entries: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Of lines of metrics.jsonl, or of events."""
    return {entry["step"]: float(entry[name]) for entry in entries if isinstance(entry.get(name), int | float)}


def write_chart(path: Path, names: tuple[str, str], curves: Mapping[str, tuple[Curve, Curve]]) -> None:
    """A page that opens from disk: of each figure both curves, and below them their relative difference.

    Args:
        curves: title -> the curves of both runs.
    Raises:
        OSError: it cannot be written.
    """
    from plotly.subplots import make_subplots

    titles = [title for name in curves for title in (name, f"{name}: relative difference")]
    figure = make_subplots(rows=len(titles), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.06)
    for place, pair in enumerate(curves.values()):
        row = 2 * place + 1
        for name, curve, colour in zip(names, pair, COLOURS, strict=False):
            _add(figure, row, _series(html.escape(name), curve), colour, showlegend=place == 0)
        common = sorted(pair[0].keys() & pair[1].keys())
        gaps = {step: relative_gap(pair[0][step], pair[1][step]) for step in common}
        _add(figure, row + 1, _series("difference", gaps), COLOURS[3], showlegend=False)
        figure.update_yaxes(type="log", exponentformat="e", row=row + 1, col=1)
    figure.update_layout(height=260 * len(titles), title_text=html.escape(" and ".join(names)), hovermode="x unified")
    figure.update_xaxes(title_text="step", row=len(titles), col=1)
    replace_file(path, figure.to_html(include_plotlyjs=True, full_html=True).encode())


def _series(name: str, curve: Curve) -> Series:
    values = [value if math.isfinite(value) else None for value in curve.values()]
    return thinned(Series(name, list(curve), values))


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
