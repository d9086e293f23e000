"""How the latest attempt at a run ended, as a file in its run folder: exit codes do not survive torchrun or Slurm.

A new attempt removes the markers of the previous one; when it ends it leaves its own, named after a `RunEnd`. A file
named STOP asks the ranks to stop.
"""

from __future__ import annotations

import errno
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.errors import DamagedFileError, RunEnd
from megatron_lite.files import publish_first, remove_file
from megatron_lite.observe.credentials import redacted
from megatron_lite.state_files import read_object, read_text, warn

STOP_FILE = "STOP"
HANG_FILE = "hang.json"
RESERVE_FILE = ".reserve"
RESERVE_BYTES = 2**14
ATTEMPTS_FILE = "attempts.jsonl"
"""When the attempts of a job began and ended: launch/slurm/records.py."""
ERROR_FILE = "MEGATRON_LITE_ERROR_FILE"
"""Environment variable with the path of the error file: the first failing rank writes it, the launcher shows it."""
# If several ranks leave different markers: the cause comes before its consequences, FAILED last.
TELLING = (
    RunEnd.DONE,
    RunEnd.CONFIG_ERROR,
    RunEnd.OUT_OF_MEMORY,
    RunEnd.DIVERGED,
    RunEnd.OUT_OF_DATA,
    RunEnd.DEVICE_ERROR,
    RunEnd.HUNG,
    RunEnd.DISK_ERROR,
    RunEnd.PREEMPTED,
    RunEnd.FAILED,
)


@dataclass(frozen=True)
class Marker:
    """How an attempt ended."""

    end: RunEnd
    step: int | None
    """The last finished step; None = not known."""
    message: str
    time: float
    """Seconds since the epoch."""
    node: str | None = None
    """The node whose GPU failed."""


def leave_marker(run_dir: Path, end: RunEnd, message: str, step: int | None = None, node: str | None = None) -> None:
    """Write the marker atomically; of several ranks with the same end the first one wins.

    Raises:
        OSError: the disk is full, even after the space of `reserve_space` was freed.
    """
    text = json.dumps(asdict(Marker(end, step, redacted(message), time.time(), node))) + "\n"
    try:
        publish_first(run_dir / end.name, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (run_dir / RESERVE_FILE).exists():
            raise
        free_reserve(run_dir)
        publish_first(run_dir / end.name, text)


def reserve_space(run_dir: Path) -> None:
    """Reserve disk space for the marker, in case the disk is full when the attempt ends."""
    with suppress(OSError):  # the disk is full already
        descriptor = os.open(run_dir / RESERVE_FILE, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, bytes(RESERVE_BYTES))  # written, because some filesystems do not honour fallocate
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_reserve(run_dir: Path) -> None:
    with suppress(OSError):
        (run_dir / RESERVE_FILE).unlink()


def read_marker(run_dir: Path) -> Marker | None:
    """The most informative marker of a run folder; None = no attempt has ended (or it was killed).

    A damaged marker counts as missing: the run then counts as killed, and may be resumed.
    """
    for end in TELLING:
        try:
            found = read_object(run_dir / end.name, Marker)
            if found is not None and found.end is not end:
                raise DamagedFileError(f"{run_dir / end.name} is damaged: it contains {found.end.name}")
        except DamagedFileError as error:
            warn(f"{error}; it counts as missing")
            continue
        if found is not None:
            return found
    return None


def clear_markers(run_dir: Path) -> None:
    """Remove the markers and the stop request of the previous attempt, when a new attempt begins."""
    for name in (STOP_FILE, HANG_FILE, *(end.name for end in RunEnd)):
        remove_file(run_dir / name)


def ask_to_stop(run_dir: Path, reason: str = "") -> None:
    """Ask the ranks of a run to save and stop; they look for the file between micro-batches and report the reason."""
    (run_dir / STOP_FILE).write_text(reason + "\n")


def asked_because(run_dir: Path) -> str:
    """The reason in the STOP file, which may have been created by hand and be empty."""
    try:
        text = (read_text(run_dir / STOP_FILE) or "").strip()
    except DamagedFileError:
        text = ""
    return text or f"a file named {STOP_FILE}"
