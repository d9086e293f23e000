"""How the latest attempt at a run ended, as a file in its run folder: exit codes do not survive torchrun or Slurm.

An attempt removes the markers of the one before it and leaves one of its own, named like a `RunEnd`. A file named STOP
asks the ranks to stop.
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
"""The variable by which a launcher names the file whose text it shows: the first rank with an error leaves it there."""
# Where several ranks leave different ones: what explains the others comes first, FAILED last.
TELLING = (
    RunEnd.DONE,
    RunEnd.CONFIG_ERROR,
    RunEnd.OUT_OF_MEMORY,
    RunEnd.DIVERGED,
    RunEnd.OUT_OF_DATA,
    RunEnd.HUNG,
    RunEnd.DISK_ERROR,
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
    """Write the marker, whole or not at all; the first rank with the same end wins.

    Raises:
        OSError: the disk does not take it, not even in the place of what `reserve_space` has kept free.
    """
    text = json.dumps(asdict(Marker(end, step, redacted(message), time.time()))) + "\n"
    try:
        publish_first(run_dir / end.name, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (run_dir / RESERVE_FILE).exists():
            raise
        free_reserve(run_dir)
        publish_first(run_dir / end.name, text)


def reserve_space(run_dir: Path) -> None:
    """Keep free what word of the end will need, should the disk be full by then."""
    with suppress(OSError):  # it is full already
        descriptor = os.open(run_dir / RESERVE_FILE, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, bytes(RESERVE_BYTES))  # written, not only promised: some filesystems do not keep that
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_reserve(run_dir: Path) -> None:
    with suppress(OSError):
        (run_dir / RESERVE_FILE).unlink()


def read_marker(run_dir: Path) -> Marker | None:
    """The most telling marker of a run folder; None = no attempt has ended (or it was killed).

    One that is damaged tells nothing: the run then counts as killed, and goes on where it may.
    """
    for end in TELLING:
        try:
            found = read_object(run_dir / end.name, Marker)
            if found is not None and found.end is not end:
                raise DamagedFileError(f"{run_dir / end.name} is damaged: it tells of {found.end.name}")
        except DamagedFileError as error:
            warn(f"{error}; it counts as missing")
            continue
        if found is not None:
            return found
    return None


def clear_markers(run_dir: Path) -> None:
    """Begin a new attempt: nothing is known of its end, and nobody has asked it to stop."""
    for name in (STOP_FILE, HANG_FILE, *(end.name for end in RunEnd)):
        remove_file(run_dir / name)


def ask_to_stop(run_dir: Path, reason: str = "") -> None:
    """Let the ranks of the run save and end; they look for the file between micro-batches, and tell the reason."""
    (run_dir / STOP_FILE).write_text(reason + "\n")


def asked_because(run_dir: Path) -> str:
    """The reason in the STOP file; anybody may have made it, with nothing in it."""
    try:
        text = (read_text(run_dir / STOP_FILE) or "").strip()
    except DamagedFileError:
        text = ""
    return text or f"a file named {STOP_FILE}"
