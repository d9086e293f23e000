"""What a run folder remembers of its jobs: `jobs.jsonl` (submissions) and `attempts.jsonl` (begins and ends)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lite.observe.markers import ATTEMPTS_FILE
from megatron_lite.observe.metrics import read_metrics

JOBS_FILE = "jobs.jsonl"
SCRIPT_FILE = "job.sh"
CHECKPOINT = re.compile(r"step_(\d+)")  # a folder has this name only once it is complete


def record_submission(run_dir: Path, jobs: Sequence[int]) -> None:
    """Args: jobs: one, or the links of a chain."""
    _append(run_dir / JOBS_FILE, {"jobs": list(jobs), "time": time.time()})


def submissions(run_dir: Path) -> list[list[int]]:
    """The job numbers of each submission, oldest first."""
    return [entry["jobs"] for entry in read_metrics(run_dir / JOBS_FILE)]


def record_begin(run_dir: Path, *, job: int, restart: int, nodes: Sequence[str]) -> None:
    """Args: restart: times that Slurm has started this job before."""
    step = newest_checkpoint(run_dir)
    _append(
        run_dir / ATTEMPTS_FILE,
        {
            "event": "begin",
            "job": job,
            "restart": restart,
            "nodes": list(nodes),
            "checkpoint": step,
            "time": time.time(),
        },
    )


def record_end(run_dir: Path, *, job: int, end: str | None, requeued: bool, advanced: bool, reason: str) -> None:
    """Args: end: name of the marker; None = the ranks left none."""
    _append(
        run_dir / ATTEMPTS_FILE,
        {
            "event": "end",
            "job": job,
            "end": end,
            "requeued": requeued,
            "advanced": advanced,
            "checkpoint": newest_checkpoint(run_dir),
            "reason": reason,
            "time": time.time(),
        },
    )


def attempts(run_dir: Path, event: str, job: int | None = None) -> list[dict[str, Any]]:
    """The records of one kind, oldest first, of one job or of all."""
    return [
        entry
        for entry in read_metrics(run_dir / ATTEMPTS_FILE)
        if entry["event"] == event and job in (None, entry["job"])
    ]


def newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint; None = there is none."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(found[1]) for found in map(CHECKPOINT.fullmatch, names) if found), default=None)


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
