"""A run's figures as plotly charts: the panels of `panels.PANELS`, with at most MOST_POINTS points per curve."""

from __future__ import annotations

import html
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_lite.errors import TrackingError, library_edge
from megatron_lite.observe.envelope import MOST_POINTS, Envelope
from megatron_lite.observe.history import Points
from megatron_lite.observe.lines import Gap
from megatron_lite.observe.metrics import ROLLBACK_EVENT, SPIKE_EVENT
from megatron_lite.observe.panels import WHOLE_GROUP, Panel
from megatron_lite.observe.run_folder import Entry, RunFolder

MOST_LINES = 100  # vertical lines of resumes, or gaps, in a chart
# Each is legible on white and on near-black.
COLOURS = ("#3b82c4", "#d1495b", "#2f9e7a", "#d08a1d", "#8b6fc9", "#4fa3b5", "#b0639c", "#7d8b3a")
GREY = "#8a949e"
SPIKE, ROLLBACK = "#e8482f", "#d08a1d"
LAYER_SCALE, FROM, TO = "Viridis", 0.15, 0.85  # the ends of the scale are invisible on black or on white

Figure = Any  # plotly.graph_objects.Figure, which is imported late


@dataclass(frozen=True)
class Series:
    """One curve; None (for NaN and Inf) leaves a gap."""

    name: str
    steps: list[int]
    values: list[float | None]


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """Reduce a curve to at most `most` points, in the order of steps, by an Envelope: a spike of one step survives."""
    if len(series.steps) <= most:
        return series
    order = np.argsort(series.steps, kind="stable")
    envelope = Envelope(most)
    envelope.add(np.array(series.steps)[order], np.array(series.values, dtype=float)[order])
    return Series(series.name, *envelope.points())


def series_of(run: RunFolder, panel: Panel) -> list[Series]:
    """The panel's curves, except those that the run has not logged."""
    found: list[Series] = []
    for key in panel.all_keys:
        kind, _, name = key.partition("/")
        curves = _of_steps(run, name, panel) if kind == "train" else _of_events(run, kind, name, panel)
        found += [replace(series, name=f"{kind} {series.name}") for series in curves] if panel.points else curves
    return [series for series in found if any(value is not None for value in series.values)]


def _of_steps(run: RunFolder, name: str, panel: Panel) -> list[Series]:
    if not name.endswith(WHOLE_GROUP):
        return [_scaled(_label(name), run.history.curve(name), panel.factor)]
    group = name.removesuffix(WHOLE_GROUP)
    prefix = "stage " if group.startswith("stage_") else ""
    return [_scaled(prefix + inner, points, panel.factor) for inner, points in run.history.group(group).items()]


def _of_events(run: RunFolder, kind: str, name: str, panel: Panel) -> list[Series]:
    entries: Sequence[Entry] = run.of_kind(kind) if panel.points else run.standing(kind)
    return [_curve(_label(name), ((entry["step"], entry.get(name)) for entry in entries), panel.factor)]


def _scaled(name: str, points: Points, factor: float) -> Series:
    return Series(name, points[0], [None if value is None else value * factor for value in points[1]])


def _label(name: str) -> str:
    return name.removeprefix("share_").replace("_", " ")


def _curve(name: str, points: Iterable[tuple[int, Any]], factor: float) -> Series:
    known = [(step, value) for step, value in points if isinstance(value, int | float)]
    values = [value * factor if math.isfinite(value) else None for _, value in known]
    return Series(name, [step for step, _ in known], values)


def from_plotly(module: str) -> Any:
    """A module of plotly, imported lazily: most commands draw nothing.

    Raises:
        TrackingError: it is missing or broken.
    """
    with library_edge(TrackingError, "plotly cannot draw", "run `pip install plotly`"):
        return importlib.import_module(f"plotly.{module}")


def chart(run: RunFolder, panel: Panel) -> Figure | None:
    """The chart of a panel for one run; None if the run has logged none of its figures."""
    curves = series_of(run, panel)
    if not curves:
        return None
    go = from_plotly("graph_objects")
    last_step = max(1, run.history.last.get("step", 0), run.taken_back.last_step)
    figure = go.Figure(layout=_layout(panel, curves, last_step))
    if panel.branches:
        _add_branches(figure, run, panel)
    for series, colour in zip(curves, _colours(curves, panel), strict=True):
        figure.add_trace(_trace(thinned(series), colour, panel))
    if panel.branches:
        _add_marks(figure, run, panel)
        _add_gaps(figure, run.history.gaps)
    return figure


def _layout(panel: Panel, curves: Sequence[Series], last_step: int) -> dict[str, Any]:
    """The layout, without text and background colours: the page sets them, light or dark."""
    several = any(key.endswith(WHOLE_GROUP) for key in panel.keys)
    return {
        "margin": {"l": 60, "r": 12, "t": 8, "b": 36},
        "height": 270 if not panel.branches else 300 if panel.log_axis else 400,
        "xaxis": {"title": {"text": "step", "standoff": 4}, "zeroline": False, "range": [0, 1.01 * last_step]},
        "yaxis": {
            "title": {"text": panel.unit, "standoff": 6},
            "type": "log" if panel.log_axis else "linear",
            "exponentformat": "SI" if panel.unit else "e",
            **(_log_ticks(curves) if panel.log_axis else {}),
            "zeroline": False,
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "hovermode": "closest" if several or panel.points else "x unified",
        "template": {},
    }


def _log_ticks(curves: Sequence[Series]) -> dict[str, Any]:
    """Ticks at each digit, at 1, 2 and 5, or at powers of ten, depending on the range of values."""
    values = [value for series in curves for value in series.values if value is not None and value > 0]
    decades = math.log10(max(values) / min(values)) if values else 0.0
    return {"tickformat": ".3~g", "dtick": "D1" if 0 < decades < 0.7 else "D2" if 0 < decades < 2.5 else 1}


def _colours(curves: Sequence[Series], panel: Panel) -> list[str]:
    """A colour scale over the depth of layers, else distinct colours."""
    if not panel.keys[0].endswith(WHOLE_GROUP) or len(curves) < 2:
        palette = (COLOURS[1], COLOURS[0], *COLOURS[2:]) if panel.stacked else COLOURS  # red is for waiting
        return [palette[index % len(palette)] for index in range(len(curves))]
    sample_colorscale = from_plotly("colors").sample_colorscale
    places = [FROM + (TO - FROM) * index / (len(curves) - 1) for index in range(len(curves))]
    return [str(colour) for colour in sample_colorscale(LAYER_SCALE, places)]


def _trace(series: Series, colour: str, panel: Panel) -> Any:
    go = from_plotly("graph_objects")
    trace: dict[str, Any] = {"name": series.name, "x": series.steps, "y": series.values, "mode": "lines"}
    trace["line"] = {"color": colour, "width": 1.6}
    if panel.points:
        trace |= {"mode": "markers", "marker": {"color": colour, "size": 9}, "cliponaxis": False}
    elif series.name == "validation loss" or len(series.steps) == 1:
        trace |= {"mode": "lines+markers", "marker": {"color": colour, "size": 7}}
    elif panel.reference is not None and series.name == _label(panel.reference.partition("/")[2]):
        trace["line"] = {"color": GREY, "width": 2, "dash": "dash"}
    elif panel.stacked:
        trace |= {"stackgroup": "parts", "line": {"color": colour, "width": 0.5}}
    return go.Scatter(trace)


def _add_branches(figure: Figure, run: RunFolder, panel: Panel) -> None:
    go = from_plotly("graph_objects")
    name = panel.keys[0].partition("/")[2]
    for place, points in enumerate(run.taken_back.branches(name).values()):
        series = _scaled(name, points, panel.factor)
        trace = {"name": "rolled back", "legendgroup": "rolled back", "showlegend": place == 0}
        trace |= {"x": series.steps, "y": series.values, "mode": "lines", "line": {"color": GREY, "width": 1}}
        figure.add_trace(go.Scatter(trace))


def _add_marks(figure: Figure, run: RunFolder, panel: Panel) -> None:
    go = from_plotly("graph_objects")
    name = panel.keys[0].partition("/")[2]
    spikes, rollbacks = run.of_kind(SPIKE_EVENT), run.of_kind(ROLLBACK_EVENT)
    if spikes:
        figure.add_trace(
            go.Scatter(
                name="spike",
                x=[entry["step"] for entry in spikes],
                y=[_height(entry, name) for entry in spikes],
                text=[html.escape(str(entry.get("text", ""))) for entry in spikes],
                hovertemplate="%{text}<extra>spike</extra>",
                mode="markers",
                marker={"symbol": "x", "size": 9, "color": SPIKE},
            )
        )
    _add_lines(figure, "rollback", [entry["to_step"] for entry in rollbacks], ROLLBACK, "dash")
    _add_lines(figure, "resume", [attempt.step for attempt in run.attempts() if attempt.kind == "resume"], GREY, "dot")


def _add_gaps(figure: Figure, gaps: Sequence[Gap]) -> None:
    """Grey areas where lines of metrics.jsonl are missing."""
    for number, gap in enumerate(gaps[:MOST_LINES]):
        figure.add_shape(
            type="rect",
            x0=gap.first - 0.5,
            x1=gap.last + 0.5,
            y0=0,
            y1=1,
            yref="paper",
            layer="below",
            line={"width": 0},
            fillcolor=GREY,
            opacity=0.3,
            name="lines missing",
            legendgroup="lines missing",
            showlegend=number == 0,
        )


def _add_lines(figure: Figure, name: str, steps: Sequence[int], colour: str, dash: str) -> None:
    """Vertical lines with one entry in the legend."""
    for number, step in enumerate(sorted(set(steps))[-MOST_LINES:]):
        figure.add_shape(
            type="line",
            x0=step,
            x1=step,
            y0=0,
            y1=1,
            yref="paper",
            line={"color": colour, "width": 1.5, "dash": dash},
            name=name,
            legendgroup=name,
            showlegend=number == 0,
        )


def _height(spike: Mapping[str, Any], name: str) -> float | None:
    """The y-value at which a spike is marked: its figure, or the usual one if that is NaN or Inf."""
    for key in (name, f"usual_{name}"):
        value = spike.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None
