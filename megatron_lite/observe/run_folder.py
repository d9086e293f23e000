"""Read everything in a run folder for reports, whether the run is still running, has ended or was killed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml

from megatron_lite.errors import DamagedFileError, library_edge
from megatron_lite.files import modified_ns
from megatron_lite.observe.history import History, TakenBack
from megatron_lite.observe.lines import Gap
from megatron_lite.observe.logged import LoggedLines
from megatron_lite.observe.markers import ATTEMPTS_FILE, Marker, read_marker
from megatron_lite.observe.metrics import (
    BEGINNINGS,
    EVENTS_FILE,
    LOSS_EVENT,
    METRICS_FILE,
    ROLLBACK_EVENT,
    ROLLED_BACK_FILE,
    SKIPS_FILE,
    SPIKE_EVENT,
    from_json,
    read_metrics,
    with_branches,
)
from megatron_lite.state_files import fits, read_object, read_text, sound_lines, warn

Entry = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One attempt at the run, as described by its first event."""

    kind: str
    """start or resume."""
    time: str
    step: int
    world_size: int | None
    end: str
    """How it ended; empty = unknown."""


@dataclass(frozen=True)
class JobEnd:
    """A line of attempts.jsonl."""

    event: str
    time: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class SampleWindow:
    first: int
    stop: int


@dataclass(frozen=True)
class SkippedSamples:
    window: SampleWindow
    step: int
    to_step: int
    reason: str


@dataclass(frozen=True)
class SkipsFile:
    rollbacks: list[SkippedSamples]


@dataclass(frozen=True)
class SpikeDocument:
    source: str
    file: str
    document: int
    first_token: int
    tokens: int
    samples: list[int]


@dataclass(frozen=True)
class SpikeSequence:
    sample: int
    loss: float | str | None
    documents: list[SpikeDocument]
    text: str


@dataclass(frozen=True)
class SpikeReportFile:
    """The fields of a spike report that its event does not have."""

    learning_rate: float | str | None = None
    loss_scale: float | str | None = None
    samples: list[tuple[int, int]] = field(default_factory=list)
    documents: list[SpikeDocument] = field(default_factory=list)
    sequences: list[SpikeSequence] = field(default_factory=list)
    layer_grad_norm: dict[str, dict[str, float | str | None]] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass(frozen=True)
class SaveEvent:
    folder: str
    bytes: int
    stall_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class RollbackEvent:
    to_step: int
    first_sample: int
    stop_sample: int
    rollbacks: int
    text: str


@dataclass(frozen=True)
class SpikeEvent:
    kinds: list[str] = field(default_factory=list)
    spike_report: str | None = None
    text: str = ""


@dataclass(frozen=True)
class BeginEvent:
    world_size: int | None = None
    versions: dict[str, str] | None = None


@dataclass(frozen=True)
class SpeedTerms:
    flops_per_token: float | None = None
    peak_flops: float | str | None = None


EVENTS: dict[str, type] = {
    "save": SaveEvent,
    "start": BeginEvent,
    "resume": BeginEvent,
    "speed_terms": SpeedTerms,
    ROLLBACK_EVENT: RollbackEvent,
    SPIKE_EVENT: SpikeEvent,
}
"""The fields that report.html needs, by kind of event."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, as of when they were read."""

    path: Path
    settings: Mapping[str, Any]
    """The newest frozen configuration as plain values, not as a RunConfig: runs of other versions must be readable."""
    events: list[Entry]
    skipped: list[Entry]
    """Ranges of samples that rollbacks have skipped: window, step, to_step, reason."""
    marker: Marker | None
    job_ends: list[JobEnd]
    logged: LoggedLines | None = None
    """What the newest checkpoint records about metrics.jsonl."""

    @classmethod
    def read(cls, path: Path, logged: LoggedLines | None = None) -> RunFolder:
        return cls(
            path,
            _settings(path),
            [entry for entry in read_metrics(path / EVENTS_FILE) if _is_whole(entry)],
            _skipped(path / SKIPS_FILE),
            read_marker(path),
            [entry for entry in sound_lines(path / ATTEMPTS_FILE, JobEnd) if entry.event == "end"],
            logged,
        )

    @cached_property
    def history(self) -> History:
        """The figures of all steps except rolled-back ones; read on first use."""
        return History.read(self.path / METRICS_FILE, self.known_losses(), self.logged)

    @cached_property
    def taken_back(self) -> TakenBack:
        """The figures of rolled-back steps; read on first use."""
        return TakenBack.read(self.path / ROLLED_BACK_FILE)

    def known_losses(self) -> list[Gap]:
        """Steps whose lines were found missing at a resume."""
        texts = [text for entry in self.of_kind(LOSS_EVENT) for text in entry.get("ranges") or []]
        return [gap for text in texts if (gap := Gap.read(text)) is not None]

    def setting(self, key: str) -> Any:
        """The value of a dotted key; None if it is missing."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def of_kind(self, kind: str) -> list[Entry]:
        """Events of one kind, oldest first; if a resume has repeated an event, only its last occurrence."""
        found = {(branch, entry.get("step")): entry for branch, entry in with_branches(self.events) if _is(entry, kind)}
        return list(found.values())

    def standing(self, kind: str) -> list[Entry]:
        """Events of one kind that no rollback has undone, in the order of steps."""
        stand: dict[int, Entry] = {}
        for entry in self.events:
            if _is(entry, ROLLBACK_EVENT):
                stand = {step: old for step, old in stand.items() if step <= entry["to_step"]}
            if _is(entry, kind):
                stand[entry["step"]] = entry
        return [stand[step] for step in sorted(stand)]

    def newest(self, kind: str) -> Entry:
        """The last event of one kind; empty if there is none."""
        return next((entry for entry in reversed(self.events) if _is(entry, kind)), {})

    def num_skipped(self) -> int:
        """Number of skipped samples. Ranges of several rollbacks may overlap; a sample is counted once."""
        total = reached = 0
        for first, stop in sorted((entry["window"]["first"], entry["window"]["stop"]) for entry in self.skipped):
            total += max(stop - max(first, reached), 0)
            reached = max(reached, stop)
        return total

    def attempts(self) -> list[Attempt]:
        begins = [index for index, entry in enumerate(self.events) if entry.get("event") in BEGINNINGS]
        return [
            self._attempt(self.events[begin:following], is_last=following == len(self.events))
            for begin, following in pairwise([*begins, len(self.events)])
        ]

    def _attempt(self, events: list[Entry], *, is_last: bool) -> Attempt:
        first = events[0]
        end = _own_end(events) or self._end_of_job(_seconds(events[-1]))
        if not end and is_last and self.marker is not None:
            end = f"{self.marker.end.name}: {self.marker.message}"
        return Attempt(first["event"], first["time"], first["step"], first.get("world_size"), end)

    def _end_of_job(self, last: float) -> str:
        """The end that Slurm's record gives for an attempt, before the next attempt began; empty = none.

        Args:
            last: time of the attempt's last event.
        """
        later = [_seconds(entry) for entry in self.events if entry.get("event") in BEGINNINGS]
        until = min((time for time in later if time > last), default=math.inf)
        return next((entry.reason for entry in self.job_ends if last <= entry.time <= until), "")

    def spike_report(self, spike: Mapping[str, Any]) -> Entry | None:
        """The report of a spike; None if it has not been written or is damaged."""
        name = spike.get("spike_report")
        if not isinstance(name, str):
            return None
        path = self.path / name
        try:
            found = read_object(path, SpikeReportFile)
            if found is None or not all(step.isdecimal() and len(step) < 19 for step in found.layer_grad_norm):
                return None
        except DamagedFileError as error:
            warn(f"{error}; the page is written without it")
            return None
        known = {name: value for name, value in asdict(found).items() if value is not None}
        return cast(Entry, from_json(known))


def _is(entry: Mapping[str, Any], kind: str) -> bool:
    return entry.get("event") == kind


def _own_end(events: Iterable[Mapping[str, Any]]) -> str:
    for entry in events:
        if _is(entry, "finish"):
            return "done"
        if _is(entry, "stop"):
            return f"stopped by {entry.get('reason')} after step {entry['step']}"
    return ""


def _seconds(entry: Mapping[str, Any]) -> float:
    """When an event was written, since the epoch."""
    return datetime.fromisoformat(entry["time"]).timestamp()


def _settings(path: Path) -> Mapping[str, Any]:
    newest = max(path.glob("config-*.yaml"), key=modified_ns, default=None)
    if newest is None:
        return {}
    try:
        text = read_text(newest) or ""
        with library_edge(DamagedFileError, f"{newest} is damaged"):
            found = yaml.safe_load(text)
    except DamagedFileError as error:
        warn(f"{error}; what it says is left out")
        return {}
    return found if isinstance(found, dict) else {}


def _skipped(path: Path) -> list[Entry]:
    try:
        found = read_object(path, SkipsFile)
    except DamagedFileError as error:
        warn(f"{error}; what it says is left out")
        return []
    return [] if found is None else [asdict(one) for one in found.rollbacks]


def _is_whole(event: Entry) -> bool:
    """Whether an event has all fields that report.html shows for its kind."""
    if not {"event", "time"} <= event.keys():
        return False
    kind = EVENTS.get(event["event"])
    return kind is None or fits(event, kind)
