"""How the latest attempt at a run ended, as a file in its run folder: exit codes do not survive torchrun or Slurm.

An attempt removes the markers of the one before it and leaves one of its own, named like a `RunEnd`. A file named STOP
asks the ranks to stop.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.errors import RunEnd
from megatron_lite.files import publish_first

STOP_FILE = "STOP"
HANG_FILE = "hang.json"
ATTEMPTS_FILE = "attempts.jsonl"
"""When the attempts of a job began and ended: launch/slurm/records.py."""
ERROR_FILE = "MEGATRON_LITE_ERROR_FILE"
"""The variable by which a launcher names the file whose text it shows: the first rank with an error leaves it there."""
# Where several ranks leave different ones: what explains the others comes first, FAILED last.
TELLING = (
    RunEnd.DONE,
    RunEnd.CONFIG_ERROR,
    RunEnd.OUT_OF_MEMORY,
    RunEnd.DIVERGED,
    RunEnd.OUT_OF_DATA,
    RunEnd.HUNG,
    RunEnd.PREEMPTED,
    RunEnd.FAILED,
)


@dataclass(frozen=True)
class Marker:
    """What an attempt says of its end."""

    end: RunEnd
    step: int | None
    """The last finished step; None = not known to whoever left it."""
    message: str
    time: float
    """Seconds since the epoch."""


def leave_marker(run_dir: Path, end: RunEnd, message: str, step: int | None = None) -> None:
    """Write the marker, whole or not at all; the first rank with the same end wins."""
    publish_first(run_dir / end.name, json.dumps(asdict(Marker(end, step, message, time.time()))) + "\n")


def read_marker(run_dir: Path) -> Marker | None:
    """The most telling marker of a run folder; None = no attempt has ended (or it was killed)."""
    for end in TELLING:
        try:
            found = json.loads((run_dir / end.name).read_text())
        except FileNotFoundError:
            continue
        return Marker(**{**found, "end": end})
    return None


def clear_markers(run_dir: Path) -> None:
    """Begin a new attempt: nothing is known of its end, and nobody has asked it to stop."""
    for name in (STOP_FILE, HANG_FILE, *(end.name for end in RunEnd)):
        (run_dir / name).unlink(missing_ok=True)


def ask_to_stop(run_dir: Path, reason: str = "") -> None:
    """Let the ranks of the run save and end; they look for the file between micro-batches, and tell the reason."""
    (run_dir / STOP_FILE).write_text(reason + "\n")


def asked_because(run_dir: Path) -> str:
    """The reason in the STOP file; anybody may have made it, with nothing in it."""
    text = (run_dir / STOP_FILE).read_text(errors="replace").strip()
    return text or f"a file named {STOP_FILE}"
