"""A thread in each rank that publishes its heartbeat and ends the process when any rank hangs.

A rank that has been in one phase for longer than train.timeout_seconds knows that something is wrong, but not what. It
then reads all heartbeats, finds the cause and reports it; every rank that sees the report dumps the stacks of its
threads and exits. Collectives time out later than that (`train/distributed.py`), because they cannot name the cause.

At first only rank 0 reads the heartbeats, after two intervals the first rank of each node, after two more all ranks:
a thousand ranks notice a hang at the same time, and if all of them read all files at once, the filesystem suffers.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import RunEnd
from megatron_lite.files import publish_first
from megatron_lite.observe.console import Console
from megatron_lite.observe.heartbeat import Beat, Heartbeat, Phase, Place, node_name, publish, read_beats
from megatron_lite.observe.markers import ERROR_FILE, HANG_FILE, leave_marker
from megatron_lite.observe.run_lock import Claim
from megatron_lite.parallel.topology import Topology
from megatron_lite.train.hang.diagnosis import Finding, HangKind, find_culprit

if TYPE_CHECKING:  # it imports DeepSpeed
    from megatron_lite.train.distributed import ProcessEnvironment

TURN_INTERVALS = 2  # between the ranks that read first, second and last
EXIT_DELAY_INTERVALS = 2  # from seeing the report to exiting: the others must see it before our connections close


def interval_seconds(limit_seconds: float) -> float:
    """Between two heartbeats of a rank: a sixtieth of the limit, within bounds for tests and for filesystems."""
    return min(max(limit_seconds / 60, 0.25), 10.0)


class Watchdog:
    """Use it as a context manager around everything that a rank does.

    Args:
        folder: the run folder, on a filesystem that all nodes share.
        local_rank: this rank's number on its node.
        limit_seconds: train.timeout_seconds.
        console: shows the report to the user if no launcher does.
        claim: the lock of the run folder; ranks that have lost it must not end another attempt at the run.
    """

    def __init__(
        self,
        folder: Path,
        place: Place,
        heartbeat: Heartbeat,
        *,
        local_rank: int,
        world_size: int,
        limit_seconds: float,
        console: Console,
        claim: Claim,
    ) -> None:
        self._folder = folder
        self._place = place
        self._heartbeat = heartbeat
        self._world_size = world_size
        self._limit = limit_seconds
        self._console = console
        self._claim = claim
        self._interval = interval_seconds(limit_seconds)
        turn = 0 if place.rank == 0 else 1 if local_rank == 0 else 2
        self._patience = limit_seconds + turn * TURN_INTERVALS * self._interval
        self._started = time.time()
        self._beats = folder / "logs" / "heartbeats"
        self._report = folder / HANG_FILE
        self._stacks = folder / "logs" / "stacks" / f"rank-{place.rank}.txt"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        for folder in (self._beats, self._stacks.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self._stacks_file = self._stacks.open("w")
        if self._place.rank == 0:
            self._report.unlink(missing_ok=True)
        self._earlier_report = self._identity()  # rank 0 may start after us
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._is_reported():  # the error: a connection to a rank that has already exited
            self._thread.join()  # the watchdog thread exits the process with the code for a hang
        self._stop.set()
        self._thread.join()
        self._heartbeat.enter(Phase.ENDED)
        self._publish()
        faulthandler.cancel_dump_traceback_later()
        self._stacks_file.close()
        self._stacks.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._publish()
            if not self._is_reported() and self._heartbeat.seconds > self._patience:
                with suppress(OSError):  # the report cannot be written: the timeout of the collectives ends the job
                    self._find_and_report()
            if self._is_reported():
                self._end()

    def _publish(self) -> None:
        with suppress(OSError):  # a full disk must not end the run here; what has to be written raises its own error
            publish(self._beats, Beat.of(self._place, self._heartbeat))
        # If the training thread never releases the GIL, this thread cannot dump any stack; faulthandler's C thread can.
        faulthandler.dump_traceback_later(self._limit / 2, file=self._stacks_file)

    def _is_reported(self) -> bool:
        return self._identity() not in (None, self._earlier_report)

    def _identity(self) -> tuple[int, int] | None:
        """Distinguishes the report of this attempt from that of an earlier one."""
        with suppress(OSError):
            status = self._report.stat()
            return status.st_ino, status.st_mtime_ns
        return None

    def _find_and_report(self) -> None:
        if not self._claim.is_ours():
            self._console.error(f"error: {self._folder} now belongs to another attempt at the run", own=False)
            os._exit(RunEnd.CONFIG_ERROR)
        beats = read_beats(self._beats, self._world_size)
        finding = find_culprit(
            beats, self._world_size, now=time.time(), limit_seconds=self._limit, started=self._started
        )
        if self._identity() == self._earlier_report is not None:
            self._report.unlink(missing_ok=True)  # rank 0, which should have done it, has not started
        if not publish_first(self._report, json.dumps(_as_dict(finding, beats), indent=1) + "\n"):
            return
        # All ranks finish a step together, so the maximum holds for all. A stopped rank's own figure may be old.
        step = max((beat.finished_step for beat in beats.values() if beat.time >= self._started), default=None)
        leave_marker(self._folder, RunEnd.HUNG, finding.message, step)
        text = f"{finding.message}\n  {self._remedy(finding, beats)}"
        error_file = os.environ.get(ERROR_FILE)
        if error_file:
            publish_first(Path(error_file), f"error: {text}\n")
        else:
            self._console.error(f"error: {text}", own=False)

    def _remedy(self, finding: Finding, beats: Mapping[int, Beat]) -> str:
        stacks = f"the stacks of all ranks are in {self._stacks.parent}"
        if finding.kind is not HangKind.BUSY:
            return stacks
        return (
            f"it was at {beats[finding.ranks[0]].where}; {stacks}. If '{finding.phase}' may take so long, raise "
            f"train.timeout_seconds={self._limit:g}"
        )

    def _end(self) -> None:
        """Dump all threads' stacks and end the process, whatever its other threads are doing."""
        faulthandler.dump_traceback(self._stacks_file)
        self._console.release()
        time.sleep(EXIT_DELAY_INTERVALS * self._interval)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(RunEnd.HUNG)


def place_of(rank: int, topology: Topology) -> Place:
    """This process, as its heartbeats describe it."""
    at = topology.coordinates(rank)
    return Place(rank, node_name(), os.getpid(), at.pipeline, at.data, at.tensor)


def _as_dict(finding: Finding, beats: Mapping[int, Beat]) -> dict[str, object]:
    """The content of hang.json: the finding, and the heartbeats behind it."""
    rank = finding.ranks[0]
    return {"rank": rank, **asdict(finding), "time": time.time(), "beats": [asdict(beat) for beat in beats.values()]}


def watchdog_of(
    config: ResolvedConfig, environment: ProcessEnvironment, heartbeat: Heartbeat, console: Console, claim: Claim
) -> Watchdog:
    """The watchdog of this rank."""
    return Watchdog(
        config.run_dir,
        place_of(environment.rank, config.topology),
        heartbeat,
        local_rank=environment.local_rank,
        world_size=environment.world_size,
        limit_seconds=config.train.timeout_seconds,
        console=console,
        claim=claim,
    )
