"""The holder of the lock of a run folder, as recorded in the lock file (`run_lock.py`), and whether it is alive."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec

from megatron_lite.observe.heartbeat import node_name

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LAST_DATE = 2.0**37
"""Seconds that a calendar can show, in any time zone: the year 6325."""


class Role(StrEnum):
    """What the holder does in the folder."""

    launcher = "launcher"  # prepares it, and passes the lock on to rank 0
    rank = "rank 0"
    command = "command"


@dataclass(frozen=True)
class Holder:
    """The content of the lock file."""

    role: str
    host: str
    machine: str
    """Boot id and PID namespace, within which a PID is unique at any time."""
    pid: int
    started: int
    """When the process started, in ticks since the boot, because PIDs are reused."""
    job: int | None
    """Slurm job id."""
    restart: int
    """Restart count of the Slurm job."""
    attempt: str
    """Id that all ranks of the attempt share."""
    since: Annotated[float, msgspec.Meta(ge=0, le=LAST_DATE)]
    """Seconds since the epoch."""
    folder: int
    """The inode of the lock's folder: a copy of a run folder has another one, and is not locked."""

    def __str__(self) -> str:
        job = "" if self.job is None else f", Slurm job {self.job}"
        since = datetime.fromtimestamp(self.since).isoformat(sep=" ", timespec="seconds")
        return f"process {self.pid} on {self.host} ({self.role}{job}) since {since}"


def this_process(role: Role, attempt: str, folder: Path) -> Holder:
    job = os.environ.get("SLURM_JOB_ID", "")
    restart = os.environ.get("SLURM_RESTART_COUNT", "")
    return Holder(
        role=role,
        host=node_name(),
        machine=machine(),
        pid=os.getpid(),
        started=state_of(os.getpid())[1],
        job=int(job) if job.isdigit() else None,
        restart=int(restart) if restart.isdigit() else 0,
        attempt=attempt,
        since=time.time(),
        folder=folder.stat().st_ino,
    )


def machine() -> str:
    """Identifies the boot of a machine and the PID namespace in it, within which PIDs are unique."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return os.uname().nodename


def is_running(holder: Holder) -> bool:
    try:
        state, started = state_of(holder.pid)
    except OSError:
        return False
    return state not in ("Z", "X") and started == holder.started


def state_of(pid: int) -> tuple[str, int]:
    """Linux's state letter of a process (Z = zombie), and when it started, in ticks since the boot.

    Raises:
        OSError: there is no such process.
    """
    if sys.platform != "linux":
        os.kill(pid, 0)
        return "R", 0
    content = Path(f"/proc/{pid}/stat").read_bytes()
    fields = content.rpartition(b") ")[2].split()  # after the process name, which may contain anything
    return fields[0].decode(), int(fields[19])
