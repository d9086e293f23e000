"""Where figures go: one small interface, and the trackers of a run behind it.

Only the rank that writes builds real ones; `metrics.jsonl` is the truth, wandb and TensorBoard are views of it.
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
from megatron_lite.observe.metrics import (
    EVENTS_FILE,
    LOSS_EVENT,
    METRICS_FILE,
    ROLLED_BACK_FILE,
    EventWriter,
    Loss,
    MetricsWriter,
    entries,
    read_metrics,
)
from megatron_lite.observe.phrasing import counted

MOST_RANGES = 1000  # of lost steps that an event names


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Figures of one training step."""

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Something that happened at a step: an attempt's start, a resume, a save, an evaluation."""

    def alert(self, title: str, text: str) -> None:
        """Tell the people who watch the run, where the tracker has a way to."""

    def rewind(self, step: int, rollbacks: int) -> None:
        """A rollback, the run's `rollbacks`-th, has taken back all steps beyond `step`: they come again, with other
        samples. Its event is logged before."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run's last figures; nothing is logged after it."""


class TrackingSettings(Protocol):
    """The part of `config.schema.TrackingConfig` that trackers read (rooms side by side do not import each other)."""

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
        """The lines of metrics.jsonl up to this step, the last one; None where they wait for room on the disk."""
        return self._metrics.logged(step)

    @property
    def loss(self) -> Loss | None:
        """What has been found missing."""
        return self._metrics.loss

    @property
    def damaged_events(self) -> int:
        """Lines of events.jsonl that could not be read and are left out."""
        return self._events.damaged

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._metrics.write(step, values)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._events.write(kind, step, values)

    def alert(self, title: str, text: str) -> None:
        """Nothing: whoever alerts has logged the event."""

    def rewind(self, step: int, rollbacks: int) -> None:
        self._metrics.rewind(step, rollbacks)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._metrics.close()
        self._events.close()


class Trackers:
    """Several trackers as one.

    The first failure of a view (a network, a full quota) is reported and ends that view, never the training; the
    truth waits in memory while the disk takes none of it (`lines.py`).
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
        """What the checkpoint of this step, the last one, has to know of metrics.jsonl; None on ranks that do not
        write it."""
        return self._files.logged(step) if self._files is not None else None

    def tell_losses(self, step: int) -> None:
        """Warn of what the files of earlier attempts have lost, and keep it as an event of this one."""
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
    """The trackers that the configuration asks for; none at all unless `is_writer`.

    Args:
        config: a `RunConfig`; its fields are also shown in wandb.
        resume_step: the step of the checkpoint that the run goes on from; later figures are about to be repeated.
        rollbacks: of the run so far; later figures of branches that it has left are kept apart.
        logged: what that checkpoint knows of metrics.jsonl.
        report: shows one line to the user.
        guard: called ahead of whatever is written; raises where this process may not write any more.
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
    """The tracker, or none where its library cannot start: training does not end for a view of its figures.

    Raises:
        ConfigError: of settings that the user has to mend.
    """
    try:
        with library_edge(TrackingError, f"{name} cannot start", "the run goes on without it"):
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


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that a chart can show; those of nested ones by names such as `layer_grad_norm/layers.0`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, list | tuple):
            plain = {str(index): entry for index, entry in enumerate(plain)}
        if isinstance(plain, Mapping):
            found |= {f"{name}/{inner}": entry for inner, entry in numbers(plain).items()}
        elif isinstance(plain, int | float) and not isinstance(plain, bool):
            found[name] = plain
    return found


def _as_dict(config: RunSettings) -> dict[str, Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return tracked_settings(dataclasses.asdict(config))
    return {}
