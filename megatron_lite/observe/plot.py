"""`loss.png`: the loss curve of a run, with learning rate and gradient norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lite.observe.run_folder import RunFolder

PLOT_FILE = "loss.png"

_TRAIN, _VALIDATION, _UNIGRAM, _RATE, _NORM = "#2563a8", "#d1495b", "#5f6b76", "#2a7f62", "#b7791f"
_GRID, _TEXT = "#e3e7eb", "#22303c"

_Points = tuple[list[int], list[float]]  # steps and values of equal length


def plot_run(
    run_dir: Path, *, title: str, unigram_loss: float | None = None, run: RunFolder | None = None
) -> Path | None:
    """Draw `<run_dir>/loss.png` from the files in the run folder.

    It shows the training loss, raw and smoothed; validation losses (`evaluation` events with `validation_loss`); and
    the loss of a unigram model, which knows only how often each label occurs and which any trained model must beat.
    Below them are the learning rate and the gradient norm.

    Args:
        unigram_loss: None = no such line.
        run: the folder, if it has already been read.
    Returns:
        The path of the picture; None if no step has been logged.
    """
    run = run or RunFolder.read(run_dir)
    loss = _points(run, "loss")
    if not loss[0]:
        return None
    # Imported late (0.6 s), only on the rank that draws. `Figure` without pyplot needs no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1.0])
    _draw_losses(upper, loss, run.history.loss.points(), _validations(run), unigram_loss)
    upper.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_TEXT, pad=12)
    _draw_rate_and_norm(lower, _points(run, "learning_rate"), _points(run, "grad_norm"))
    lower.set_xlabel("step", color=_TEXT)
    lower.set_xlim(left=min(loss[0][0], 0), right=loss[0][-1] * 1.01 + 0.5)
    figure.align_ylabels([upper, lower])

    path = run_dir / PLOT_FILE
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    return temporary.replace(path)


def _draw_losses(axes: Any, loss: _Points, means: _Points, validation: _Points, unigram_loss: float | None) -> None:
    _style(axes)
    steps, values = loss
    if len(values) > 50:
        axes.plot(steps, values, color=_TRAIN, alpha=0.28, linewidth=0.9)
        axes.plot(means[0], smoothed(means[1]), color=_TRAIN, linewidth=1.9, label="training loss (pale: each step)")
    else:
        axes.plot(steps, values, color=_TRAIN, linewidth=1.9, label="training loss")
    bounds = [*values, *validation[1]]
    if validation[0]:
        axes.plot(
            *validation, color=_VALIDATION, linewidth=1.2, marker="o", markersize=5.5, label="validation loss", zorder=4
        )
        _label_last(axes, validation)
    if unigram_loss is not None:
        bounds.append(unigram_loss)
        axes.axhline(unigram_loss, color=_UNIGRAM, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            f"unigram loss {unigram_loss:.3f}",
            (1.0, unigram_loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=_UNIGRAM,
            fontsize=9,
        )
    low, high = _finite_range(bounds)
    margin = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel("loss, nats per token", color=_TEXT)
    axes.legend(loc="upper right", frameon=False, fontsize=9.5, labelcolor=_TEXT)


def _label_last(axes: Any, points: _Points) -> None:
    step, value = points[0][-1], points[1][-1]
    if math.isfinite(value):
        from matplotlib.patheffects import withStroke

        axes.annotate(
            f"{value:.3f}",
            (step, value),
            xytext=(-2, 11),
            textcoords="offset points",
            ha="right",
            color=_VALIDATION,
            fontsize=9,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )


def _draw_rate_and_norm(axes: Any, rate: _Points, norm: _Points) -> None:
    _style(axes)
    axes.plot(*rate, color=_RATE, linewidth=1.6)
    axes.set_ylabel("learning rate", color=_RATE)
    axes.tick_params(axis="y", colors=_RATE)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(8.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(nbins=4)
    finite = [value for value in norm[1] if math.isfinite(value)]
    if not finite:
        return
    right = axes.twinx()
    right.plot(*norm, color=_NORM, linewidth=0.9, alpha=0.8 if len(finite) < 500 else 0.45)
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    right.set_ylabel("gradient norm", color=_NORM)
    right.tick_params(axis="y", colors=_NORM, length=0, labelsize=9)
    right.set_ylim(0, 1.15 * _quantile(finite, 0.995))
    right.yaxis.get_major_locator().set_params(nbins=4)
    for side in ("top", "left", "bottom", "right"):
        right.spines[side].set_visible(False)


def _style(axes: Any) -> None:
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c2cc")
    axes.tick_params(colors=_TEXT, length=0, labelsize=9)


def smoothed(values: Sequence[float], share: float = 0.015) -> list[float]:
    """Two-sided exponential moving average over about `share` of the values; skips NaN and Inf.

    It is the mean of a forward and a backward pass, because a single pass would lag behind a falling loss.
    """
    forward = _one_sided(values, share)
    backward = _one_sided(values[::-1], share)[::-1]
    return [(left + right) / 2 for left, right in zip(forward, backward, strict=True)]


def _one_sided(values: Sequence[float], share: float) -> list[float]:
    decay = math.exp(-1.0 / max(1.0, share * len(values)))
    mean = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(mean / weight if weight else math.nan)
    return result


def _points(run: RunFolder, name: str) -> _Points:
    """Steps and values of a figure; NaN leaves a gap in the curve."""
    steps, values = run.history.curve(name)
    return steps, [math.nan if value is None else value for value in values]


def _validations(run: RunFolder) -> _Points:
    """Validation losses in the order of steps, without those that a rollback has undone."""
    found = [(entry["step"], entry.get("validation_loss")) for entry in run.standing("evaluation")]
    known = [(step, float(value)) for step, value in found if isinstance(value, int | float)]
    return [step for step, _ in known], [value for _, value in known]


def _finite_range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return min(finite), max(finite)


def _quantile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] or 1.0
