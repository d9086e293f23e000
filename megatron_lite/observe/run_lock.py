"""The lock of a run folder: only one process at a time writes to it, on whatever node it runs.

`<run>/lock/` contains one small file for each acquisition of the lock, named by an increasing number; the file with the
highest number names the holder. To take over the lock, a process publishes the next number by `os.link`, which succeeds
for exactly one of several processes, so two that find the same stale lock cannot both get it. The file's modification
time is the heartbeat, set by a thread of the holder; 0 means that the lock is released. All compared times come from
the file server, so the clocks of the nodes need not agree.

A lock is stale if its process has ended (on the same machine), if its heartbeat is older than STALE_SECONDS (on other
machines), or if it belongs to an earlier attempt of the same Slurm job, which Slurm has ended before this one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from megatron_lite.errors import DamagedFileError, RunFolderInUseError, RunFolderLostError
from megatron_lite.files import make_folder, publish_first
from megatron_lite.observe.lock_holder import Holder, Role, is_running, machine, this_process
from megatron_lite.state_files import read_object

LOCK_FOLDER = "lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""For a holder on another machine: twelve missing heartbeats."""
POLL_SECONDS = 0.2
ATTEMPT = "MEGATRON_LITE_ATTEMPT"
"""The environment variable in which a launcher gives all its ranks the unique id of the attempt."""
FILE_NAME = re.compile(r"(\d{8,15})\.json")
DERIVED_FROM = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
JOIN_SECONDS = 5.0  # how long a rank waits for its rank 0, which may start later, to hold the lock
REFUSAL_SECONDS = 10.0  # how long it waits while another run holds the lock, so that rank 0 reports the error first


@dataclass(frozen=True)
class _Entry:
    """The file with the highest number."""

    number: int
    holder: Holder | None
    """None = the file is damaged."""
    beat: float
    """Modification time: the last heartbeat."""

    @property
    def is_released(self) -> bool:
        return self.beat == 0

    def __str__(self) -> str:
        return "an unknown process (the lock's file is damaged)" if self.holder is None else str(self.holder)


class Claim(Protocol):
    """A rank's view of the lock of its run folder."""

    def is_ours(self) -> bool:
        """Whether this attempt holds the lock; asks the filesystem."""

    def confirm(self) -> None:
        """Call it before writing anything that must not get into another attempt's folder.

        Raises:
            RunFolderLostError: another process has taken over the lock.
        """


class RunLock:
    """The lock, held until `release`. Get it from `take`."""

    def __init__(self, path: Path, me: Holder) -> None:
        self._path, self._me = path, me
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._beaten = time.monotonic()

    @property
    def run_dir(self) -> Path:
        return self._path.parents[1]

    def is_ours(self) -> bool:
        try:
            os.close(os.open(self._path, os.O_RDONLY))  # opening makes shared filesystems ask the server
        except FileNotFoundError:
            return False
        except OSError:
            return True  # a disk that does not answer does not mean that the lock is lost
        return True

    def confirm(self) -> None:
        if not self.is_ours():
            raise RunFolderLostError(self._lost_text())

    def beat(self) -> None:
        """Update the heartbeat if it is due."""
        if time.monotonic() - self._beaten < HEARTBEAT_SECONDS:
            return
        self._beaten = time.monotonic()
        with suppress(OSError):  # the disk is not reachable for a while, or the lock is lost
            os.utime(self._path)

    def keep(self, on_loss: Callable[[str], None]) -> None:
        """Update the heartbeat from a separate thread from now on, whatever the process computes or waits for.

        Args:
            on_loss: called by that thread with a message once another process has taken over the lock.
        """
        self._thread = threading.Thread(target=self._keep, args=(on_loss,), name="run lock", daemon=True)
        self._thread.start()

    def _keep(self, on_loss: Callable[[str], None]) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            if not self.is_ours():
                on_loss(self._lost_text())
                return
            with suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        """Release the lock. Needs no disk space. Does nothing if another process holds the lock by now."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):  # if it cannot be released, it is stale once this process has ended
            os.utime(self._path, (0, 0))

    def _lost_text(self) -> str:
        entry = _newest(self._path.parent)
        return (
            f"train.run_dir={self.run_dir} was taken over by {entry or 'another process'}: process {self._me.pid} on "
            f"{self._me.host} had sent no heartbeat for {STALE_SECONDS:g} s, as if it had been suspended; it ends now "
            "and writes nothing more"
        )


class SharedLock:
    """The lock as seen by the other ranks, whose rank 0 holds it. Get it from `join`."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self._run_dir, self._attempt = run_dir, attempt

    def is_ours(self) -> bool:
        entry = _newest(self._run_dir / LOCK_FOLDER)
        return entry is None or entry.holder is None or entry.holder.attempt == self._attempt

    def confirm(self) -> None:
        if not self.is_ours():
            raise RunFolderLostError(
                f"train.run_dir={self._run_dir} now belongs to another attempt at the run; that one continues"
            )


def take(
    run_dir: Path,
    role: Role,
    attempt: str,
    *,
    report: Callable[[str], None] = lambda line: None,
    give_up: Callable[[], bool] = lambda: False,
) -> RunLock:
    """Acquire the lock: a free one, a stale one, or for rank 0 that of its own launcher.

    If the holder is on another machine and its heartbeat is recent, wait until it beats again or is stale.

    Args:
        attempt: see `own_attempt`.
        report: called with a line when the lock is taken over, and when it has to wait.
        give_up: returns whether to stop waiting.
    Raises:
        RunFolderInUseError: another process holds it.
        OSError: the folder cannot be written.
    """
    folder = run_dir / LOCK_FOLDER
    make_folder(folder)
    me = this_process(role, attempt, folder)
    while True:
        entry = _newest(folder)
        reason = None if entry is None else _reason_to_take(entry, me)
        if entry is not None and reason is None:
            reason = _watch(folder, entry, me, report, give_up)
            if reason is None:
                continue  # the lock has another holder now
        lock = _publish(folder, 1 if entry is None else entry.number + 1, me)
        if lock is not None:
            if reason:
                report(f"took over the lock of {run_dir} from {entry}: {reason}")
            return lock


def join(run_dir: Path, attempt: str) -> SharedLock:
    """Wait a short time until rank 0 of this attempt holds the lock.

    If rank 0 starts late, or sees another folder than this node, this rank proceeds: rank 0 connects to the others only
    after it has the lock.

    Raises:
        RunFolderInUseError: another run holds it, and keeps holding it.
    """
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        entry = _newest(run_dir / LOCK_FOLDER)
        if entry is not None and entry.holder is not None and entry.holder.attempt == attempt:
            break
        held = entry is not None and _is_held(entry, run_dir / LOCK_FOLDER)
        if entry is not None and held and waited > REFUSAL_SECONDS + (0.0 if _is_here(entry) else STALE_SECONDS):
            raise _in_use(run_dir, entry)
        if not held and waited > JOIN_SECONDS:
            break
        time.sleep(POLL_SECONDS)
    return SharedLock(run_dir, attempt)


def holder_of(run_dir: Path) -> Holder | None:
    """The live holder of the lock, as far as is known without waiting; None = nobody, or the file is damaged."""
    entry = _newest(run_dir / LOCK_FOLDER)
    return entry.holder if entry is not None and _is_held(entry, run_dir / LOCK_FOLDER) else None


def require_free(run_dir: Path, attempt: str) -> None:
    """A quick check before slow work; only `take` is reliable.

    Raises:
        RunFolderInUseError: a process of this machine holds the lock, and it is not of this attempt.
    """
    entry = _newest(run_dir / LOCK_FOLDER)
    if entry is None or entry.holder is None or entry.holder.attempt == attempt:
        return
    if _is_here(entry) and _is_held(entry, run_dir / LOCK_FOLDER):
        raise _in_use(run_dir, entry)


def own_attempt(environment: Mapping[str, str] = os.environ) -> str:
    """An id that all ranks of this attempt share: set by our launcher, or derived from variables of other launchers."""
    derived = "/".join(environment.get(name, "") for name in DERIVED_FROM)
    return environment.get(ATTEMPT) or derived


def _publish(folder: Path, number: int, me: Holder) -> RunLock | None:
    """Publish this number as ours; None if another process was first."""
    path = folder / f"{number:08d}.json"
    if not publish_first(path, json.dumps(asdict(me)) + "\n"):
        return None
    if max(_numbers(folder), default=0) != number:  # the number was used before, and a later holder exists
        path.unlink(missing_ok=True)
        return None
    for older in _numbers(folder):
        if older < number:
            with suppress(OSError):
                (folder / f"{older:08d}.json").unlink()
    return RunLock(path, me)


def _reason_to_take(entry: _Entry, me: Holder) -> str | None:
    """Why the lock may be taken at once; empty = nothing worth reporting; None = it may be held."""
    holder = entry.holder
    if entry.is_released:
        return ""
    if holder is None:
        return None
    if holder.folder != me.folder:
        return "the run folder is a copy, and the lock belongs to the original"
    if holder.role == Role.launcher and me.role == Role.rank and holder.attempt == me.attempt:
        return ""
    if holder.job is not None and holder.job == me.job and holder.restart < me.restart:
        return "it belongs to an earlier attempt of this Slurm job"
    return "that process has ended" if holder.machine == me.machine and not is_running(holder) else None


def _watch(
    folder: Path, entry: _Entry, me: Holder, report: Callable[[str], None], give_up: Callable[[], bool]
) -> str | None:
    """Wait until a holder on another machine is known to be dead; None = the lock has another holder now.

    Raises:
        RunFolderInUseError: the holder is alive.
    """
    if _is_here(entry):
        raise _in_use(folder.parent, entry)
    left = min(max(STALE_SECONDS - (_server_time(folder, me) - entry.beat), 0.0), STALE_SECONDS)
    if left > 0:
        report(
            f"the lock of {folder.parent} is held by {entry}, which runs on another machine; waiting up to "
            f"{left:.0f} s for its heartbeat"
        )
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = _newest(folder)
        if now is None or now.number != entry.number or now.is_released:
            return None
        if now.beat != entry.beat or give_up():
            raise _in_use(folder.parent, entry)
    return f"it has sent no heartbeat for {STALE_SECONDS:g} s"


def _in_use(run_dir: Path, entry: _Entry) -> RunFolderInUseError:
    return RunFolderInUseError(
        f"train.run_dir={run_dir} is in use by {entry}; wait for it, end it with `python -m launch cancel "
        f"{shlex.quote(str(run_dir))}`, or give another train.run_dir"
    )


def _is_held(entry: _Entry, folder: Path) -> bool:
    """Whether the holder is alive, without writing a file; compares two clocks, which may differ a little."""
    holder = entry.holder
    if entry.is_released or holder is None or holder.folder != folder.stat().st_ino:
        return False
    return is_running(holder) if _is_here(entry) else time.time() - entry.beat < STALE_SECONDS


def _is_here(entry: _Entry) -> bool:
    return entry.holder is not None and entry.holder.machine == machine()


def _numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except OSError:  # the folder does not exist yet, or is not a folder
        return []
    return [int(found[1]) for found in map(FILE_NAME.fullmatch, names) if found]


def _newest(folder: Path) -> _Entry | None:
    """The file with the highest number; None if there is none."""
    while numbers := _numbers(folder):
        path = folder / f"{max(numbers):08d}.json"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a shared filesystem then asks the server
        except FileNotFoundError:
            continue  # taken over since
        except OSError:
            return _Entry(max(numbers), None, time.time())
        try:
            beat = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
        try:
            holder = read_object(path, Holder)
        except DamagedFileError:
            holder = None
        return _Entry(max(numbers), holder, beat)
    return None


def _server_time(folder: Path, me: Holder) -> float:
    """The current time of the file server, which also dates the heartbeats."""
    probe = folder / f".now.{me.host}.{me.pid}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()
