"""Trackers of a run's metrics: one small interface, with JSONL files, wandb and TensorBoard behind it.

Only the writing rank has any; `metrics.jsonl` is the record, wandb and TensorBoard are views of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from megatron_lite.errors import TrackingError, library_edge
from megatron_lite.observe.credentials import tracked_settings
from megatron_lite.observe.logged import LoggedLines
from megatron_lite.observe.metrics import EVENTS_FILE, LOSS_EVENT, METRICS_FILE, ROLLED_BACK_FILE, entries, read_metrics
from megatron_lite.observe.metrics_writer import EventWriter, Loss, MetricsWriter
from megatron_lite.observe.phrasing import counted

MOST_RANGES = 1000  # ranges of missing steps that an event lists


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the figures of one training step."""

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Log an event at a step: the start of an attempt, a resume, a save, an evaluation."""

    def alert(self, title: str, text: str) -> None:
        """Notify the people who watch the run, if the tracker supports it."""

    def rewind(self, step: int, rollbacks: int) -> None:
        """The run's `rollbacks`-th rollback has undone all steps after `step`: they are trained again, with other
        samples. Its event is logged before this call."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the run's summary and close; nothing is logged afterwards."""


class TrackingSettings(Protocol):
    """The part of `config.schema.TrackingConfig` that trackers read (`observe` may not import `config`)."""

    @property
    def wandb(self) -> str: ...
    @property
    def wandb_project(self) -> str: ...
    @property
    def wandb_name(self) -> str | None: ...
    @property
    def tensorboard(self) -> bool: ...


class RunSettings(Protocol):
    """A `config.schema.RunConfig`, or any dataclass with the same `tracking`."""

    @property
    def tracking(self) -> TrackingSettings: ...


class JsonlTracker:
    """`metrics.jsonl` and `events.jsonl` in the run folder."""

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        rollbacks: int = 0,
        logged: LoggedLines | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._metrics = MetricsWriter(run_dir / METRICS_FILE, resume_step, rollbacks, logged, report)
        self._events = EventWriter(run_dir / EVENTS_FILE, report)

    def logged(self, step: int) -> LoggedLines | None:
        """The lines of metrics.jsonl up to this step, the last one; None if they wait for space on the disk."""
        return self._metrics.logged(step)

    @property
    def loss(self) -> Loss | None:
        """The lines of metrics.jsonl that were found missing."""
        return self._metrics.loss

    @property
    def damaged_events(self) -> int:
        """Number of lines of events.jsonl that could not be read and were left out."""
        return self._events.damaged

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._metrics.write(step, values)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._events.write(kind, step, values)

    def alert(self, title: str, text: str) -> None:
        """Does nothing: an alert comes with an event, which is logged."""

    def rewind(self, step: int, rollbacks: int) -> None:
        self._metrics.rewind(step, rollbacks)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._metrics.close()
        self._events.close()


class Trackers:
    """Several trackers as one.

    The first failure of a view (network, full quota) is reported and turns that view off, but never ends the training;
    lines of the record wait in memory while the disk rejects them (`line_writer.py`).
    """

    def __init__(
        self,
        truth: Sequence[Tracker],
        views: Sequence[Tracker],
        report: Callable[[str], None] = lambda line: None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._truth = list(truth)
        self._files = next((tracker for tracker in truth if isinstance(tracker, JsonlTracker)), None)
        self._views = list(views)
        self._report = report
        self._guard = guard

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.event(kind, step, values))

    def logged(self, step: int) -> LoggedLines | None:
        """What the checkpoint of this step, the last one, has to record about metrics.jsonl; None on ranks that do not
        write it."""
        return self._files.logged(step) if self._files is not None else None

    def report_missing_lines(self, step: int) -> None:
        """Warn of missing lines of earlier attempts, and log them as an event of this one."""
        if self._files is None:
            return
        if (loss := self._files.loss) is not None:
            self._report(f"warning: {loss.text}")
            ranges = [gap.as_text for gap in loss.gaps[:MOST_RANGES]]
            self.event(LOSS_EVENT, step, {"ranges": ranges, "text": loss.text})
        if damaged := self._files.damaged_events:
            are = "is" if damaged == 1 else "are"
            self._report(f"warning: {counted(damaged, 'line')} of {EVENTS_FILE} could not be read and {are} left out")

    def alert(self, title: str, text: str) -> None:
        self._each(lambda tracker: tracker.alert(title, text))

    def rewind(self, step: int, rollbacks: int) -> None:
        self._each(lambda tracker: tracker.rewind(step, rollbacks))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.finish(summary))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        if self._truth:
            self._guard()
        for tracker in self._truth:
            call(tracker)
        for view in list(self._views):
            try:
                call(view)
            except Exception as error:
                self._views.remove(view)
                self._report(f"{type(view).__name__} is off for the rest of the run: {error}")


def build_trackers(
    config: RunSettings,
    run_dir: Path,
    is_writer: bool,
    *,
    resume_step: int = 0,
    rollbacks: int = 0,
    logged: LoggedLines | None = None,
    report: Callable[[str], None] = lambda line: None,
    guard: Callable[[], None] = lambda: None,
) -> Trackers:
    """The trackers that are configured; none unless `is_writer`.

    Args:
        config: a `RunConfig`; its fields are also shown in wandb.
        resume_step: the step of the checkpoint that the run resumes from; later figures are about to be repeated.
        rollbacks: number in the run so far; later figures of branches that it has left are kept apart.
        logged: what that checkpoint records about metrics.jsonl.
        report: shows one line to the user.
        guard: called before each write; raises if this process has lost the run folder.
    Raises:
        ConfigError: tracking.wandb=online without an API key.
    """
    if not is_writer:
        return Trackers([], [])
    tracking = config.tracking
    truth = JsonlTracker(run_dir, resume_step, rollbacks, logged, report)
    views: list[Tracker] = []
    if str(tracking.wandb) != "disabled":
        views += _view("wandb", lambda: _wandb(config, run_dir, rollbacks, report), report)
    if tracking.tensorboard:
        views += _view("TensorBoard", lambda: _tensorboard(run_dir, resume_step), report)
    return Trackers([truth], views, report, guard)


def _view(name: str, build: Callable[[], Tracker], report: Callable[[str], None]) -> list[Tracker]:
    """The tracker, or none if its library cannot start: a missing view must not end the training.

    Raises:
        ConfigError: settings that the user has to fix.
    """
    try:
        with library_edge(TrackingError, f"{name} cannot start", "the run continues without it"):
            return [build()]
    except TrackingError as error:
        report(str(error))
        return []


def _wandb(config: RunSettings, run_dir: Path, rollbacks: int, report: Callable[[str], None]) -> Tracker:
    from megatron_lite.observe.wandb_tracker import WandbTracker  # imports wandb: 1.7 seconds

    tracking = config.tracking
    wandb = WandbTracker(
        run_dir,
        mode=str(tracking.wandb),
        project=tracking.wandb_project,
        name=tracking.wandb_name or run_dir.name,
        config=_as_dict(config),
        rollbacks=rollbacks,
        report=report,
    )
    figures = chain(entries(run_dir / ROLLED_BACK_FILE), entries(run_dir / METRICS_FILE))
    wandb.catch_up(figures, read_metrics(run_dir / EVENTS_FILE))
    return wandb


def _tensorboard(run_dir: Path, resume_step: int) -> Tracker:
    from megatron_lite.observe.tensorboard_tracker import TensorBoardTracker

    return TensorBoardTracker(run_dir, resume_step)


def _as_dict(config: RunSettings) -> dict[str, Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return tracked_settings(dataclasses.asdict(config))
    return {}
