"""Who holds the lock of a run folder, as the lock's file says (`run_lock.py`), and whether that process is alive."""

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

    launcher = "launcher"  # makes it ready, and hands the lock on to rank 0
    rank = "rank 0"
    command = "command"


@dataclass(frozen=True)
class Holder:
    """Who holds the lock, as the file says."""

    role: str
    host: str
    machine: str
    """Boot and process namespace: within one, a process number means one process."""
    pid: int
    started: int
    """When the process started, in ticks since the boot: numbers of processes are used again."""
    job: int | None
    """Of Slurm."""
    restart: int
    """Of the Slurm job."""
    attempt: str
    """What all ranks of the attempt have in common."""
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
    """Where the number of a process means one process: a boot of a machine, and within it a namespace."""
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
    """Linux's letter for what a process does (Z = it has ended), and when it started, in ticks since the boot.

    Raises:
        OSError: there is no such process.
    """
    if sys.platform != "linux":
        os.kill(pid, 0)
        return "R", 0
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()  # behind its name, which may be any
    return fields[0].decode(), int(fields[19])
