"""Records of jobs in a run folder: `jobs.jsonl` (submissions) and `attempts.jsonl` (starts and ends of attempts).

A damaged or unwritable record never ends a job: the job continues without it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_lite.files import append_line
from megatron_lite.observe.markers import ATTEMPTS_FILE
from megatron_lite.state_files import sound_lines, warn

JOBS_FILE = "jobs.jsonl"
SCRIPT_FILE = "job.sh"
CHECKPOINT = re.compile(r"step_(\d{1,18})")  # a folder gets this name only once it is complete
BEGIN = "begin"
END = "end"


@dataclass(frozen=True)
class Submission:
    jobs: list[int]
    """One job, or all jobs of a chain."""
    time: float


@dataclass(frozen=True)
class JobAttempt:
    """Start or end of one attempt of a job."""

    event: str
    job: int
    time: float
    checkpoint: int | None = None
    """Step of the newest checkpoint at that time."""
    restart: int = 0
    """How often Slurm had restarted this job."""
    nodes: list[str] = field(default_factory=list)
    """Empty in the record of an end."""
    end: str | None = None
    """Name of the marker; None = the ranks left no marker."""
    requeued: bool = False
    advanced: bool = False
    reason: str = ""


def record_submission(run_dir: Path, jobs: Sequence[int]) -> None:
    """Args: jobs: one job, or all jobs of a chain."""
    _append(run_dir / JOBS_FILE, Submission(list(jobs), time.time()))


def submissions(run_dir: Path) -> list[list[int]]:
    """The job numbers of each submission, oldest first."""
    return [entry.jobs for entry in sound_lines(run_dir / JOBS_FILE, Submission)]


def record_begin(run_dir: Path, *, job: int, restart: int, nodes: Sequence[str]) -> None:
    """Args: restart: how often Slurm has restarted this job."""
    checkpoint = newest_checkpoint(run_dir)
    _append(
        run_dir / ATTEMPTS_FILE, JobAttempt(BEGIN, job, time.time(), checkpoint, restart=restart, nodes=list(nodes))
    )


def record_end(run_dir: Path, *, job: int, end: str | None, requeued: bool, advanced: bool, reason: str) -> None:
    """Args: end: name of the marker; None = the ranks left no marker."""
    checkpoint = newest_checkpoint(run_dir)
    _append(
        run_dir / ATTEMPTS_FILE,
        JobAttempt(END, job, time.time(), checkpoint, end=end, requeued=requeued, advanced=advanced, reason=reason),
    )


def attempts(run_dir: Path, event: str, job: int | None = None) -> list[JobAttempt]:
    """The records of one kind, oldest first, for one job or for all."""
    entries = sound_lines(run_dir / ATTEMPTS_FILE, JobAttempt)
    return [entry for entry in entries if entry.event == event and job in (None, entry.job)]


def newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint; None = there is none."""
    folder = run_dir / "checkpoints"
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return None
    return max((int(found[1]) for found in map(CHECKPOINT.fullmatch, names) if found), default=None)


def _append(path: Path, entry: Submission | JobAttempt) -> None:
    try:
        append_line(path, json.dumps(asdict(entry)))
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror or error}); the job goes on without this record")
