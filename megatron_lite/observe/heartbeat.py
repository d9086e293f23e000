"""Heartbeats: what every rank is doing, in one small file per rank in the run folder that all ranks can read.

The training thread only records the phase that it enters: it replaces one tuple, which the watchdog thread reads and
publishes once per interval. Entering a phase takes 0.2 to 0.3 us (`python -m benchmarks.heartbeat`), and a step of the
demo (DP2 x TP2 x PP2, 4 micro-batches) enters 22: 6 us of its 1.2 s on two cores, 0.0005 %. Publishing takes 50 us in
the other thread, at most four times a second.

The clocks of two nodes are compared only with a tolerance of half of train.timeout_seconds.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

from megatron_lite.errors import DamagedFileError
from megatron_lite.state_files import decode, read_bytes

PACKAGE = str(Path(__file__).parents[1]) + os.sep
COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
LIBRARIES = (f"{os.sep}torch{os.sep}", f"{os.sep}deepspeed{os.sep}")
WAITING_CALLS = ("wait", "synchronize")  # of an asynchronous collective's handle, or of a GPU


class Phase(StrEnum):
    """What a rank can be doing."""

    START = "start"
    MEET = "meet"  # connecting to the other ranks and creating process groups
    BUILD = "build"
    LOAD = "load"
    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    SEND = "send"
    RECEIVE = "receive"
    REDUCE = "reduce"
    OPTIMIZER = "optimizer"
    REPORT = "report"
    EVALUATE = "evaluate"
    SAVE = "save"
    SAMPLE = "sample"
    FINISH = "finish"
    ENDED = "ended"


AFTER_STEP = frozenset({Phase.REPORT, Phase.EVALUATE, Phase.SAVE, Phase.SAMPLE, Phase.FINISH, Phase.ENDED})


class Activity(NamedTuple):
    """What the training thread is doing now."""

    phase: Phase
    micro_batch: int | None
    """Counts from 1 within a step or an evaluation; None = the phase is not about one."""
    step: int
    """The current step, counts from 1; 0 = before the first."""
    position: int
    """Number of phases entered since the step began: ranks of one stage enter the same phases in the same order."""
    since: float
    """time.monotonic()"""


class Heartbeat:
    """What this rank is doing; written by the training thread, read by the watchdog's."""

    __slots__ = ("_now", "_spent")

    def __init__(self) -> None:
        self._now: tuple[Phase, int | None, int, int, float] = (Phase.START, None, 0, 0, time.monotonic())
        self._spent = dict.fromkeys(Phase, 0.0)

    def begin_step(self, step: int) -> None:
        """Start a step (counted from 1) with its data phase."""
        self._now = (Phase.DATA, None, step, 0, time.monotonic())
        self._spent = dict.fromkeys(Phase, 0.0)

    def enter(self, phase: Phase, micro_batch: int | None = None) -> None:
        before, _, step, position, since = self._now
        now = time.monotonic()
        self._spent[before] += now - since
        self._now = (phase, micro_batch, step, position + 1, now)  # an Activity would cost twice as much

    @property
    def spent(self) -> dict[Phase, float]:
        """Seconds in each phase since the step began, without the current phase."""
        return dict(self._spent)

    @property
    def now(self) -> Activity:
        return Activity(*self._now)

    @property
    def seconds(self) -> float:
        """How long the current phase has lasted."""
        return time.monotonic() - self.now.since


@dataclass(frozen=True)
class Place:
    """A rank, its place in the layout and where it runs."""

    rank: int
    node: str
    pid: int
    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Beat(Place):
    """A published heartbeat of a rank, as other ranks read it."""

    phase: str
    micro_batch: int | None
    step: int
    position: int
    seconds: float
    """How long the phase had lasted at `time`."""
    call: str | None
    """The collective, or the wait for a GPU, that the rank is in; None = it computes, reads or writes."""
    where: str
    """The place in our code, as `file:line function`."""
    time: float
    """Seconds since the epoch, by the rank's own clock."""

    @classmethod
    def of(cls, place: Place, heartbeat: Heartbeat) -> Beat:
        now = heartbeat.now
        call, where = _main_thread()
        return cls(
            **asdict(place),
            phase=now.phase,
            micro_batch=now.micro_batch,
            step=now.step,
            position=now.position,
            seconds=time.monotonic() - now.since,
            call=call,
            where=where,
            time=time.time(),
        )

    @property
    def what(self) -> str:
        """The phase with its micro-batch, as a report names it."""
        return self.phase if self.micro_batch is None else f"{self.phase} {self.micro_batch}"

    @property
    def finished_step(self) -> int:
        """The last step that the rank has finished."""
        return self.step if self.phase in AFTER_STEP else max(self.step - 1, 0)

    def seconds_at(self, now: float) -> float:
        """How long the phase has lasted if the rank has not left it since; `now` in seconds since the epoch."""
        return self.seconds + max(now - self.time, 0.0)


def node_name() -> str:
    """The scheduler's name of this machine, which may differ from its host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def publish(folder: Path, beat: Beat) -> None:
    """Replace the rank's line.

    It is written in place and closed, because shared filesystems guarantee that the next process to open the file sees
    it (close-to-open consistency); a new file each time would cost the metadata server three more requests. The rest of
    a longer line before is ignored: readers read only to the first newline.
    """
    line = json.dumps(asdict(beat)) + "\n"
    descriptor = os.open(_path(folder, beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_beats(folder: Path, world_size: int) -> dict[int, Beat]:
    """The heartbeats of all ranks that have sent one, in this attempt at the run or in an earlier one."""
    beats = {}
    for rank in range(world_size):
        with suppress(DamagedFileError):  # for example read while half written: counts as no heartbeat
            content = read_bytes(_path(folder, rank))
            if content is not None:
                beats[rank] = decode(content.partition(b"\n")[0], Beat, f"the heartbeat of rank {rank}")
    return beats


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def _main_thread() -> tuple[str | None, str]:
    """From the training thread's stack: the collective or wait that it is in, and its place in our code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    call, where = None, ""
    for depth, (code, line) in enumerate(_innermost_first(frame)):
        if code.co_filename.endswith(COLLECTIVES) or (depth == 0 and _is_wait(code)):
            call = code.co_name  # the outermost frame is the collective that our code called
        if not where and code.co_filename.startswith(PACKAGE):
            where = f"{code.co_filename.removeprefix(PACKAGE)}:{line} {code.co_name}"
    return call, where


def _innermost_first(frame: FrameType | None) -> Iterator[tuple[CodeType, int]]:
    while frame is not None:
        yield frame.f_code, frame.f_lineno
        frame = frame.f_back


def _is_wait(code: CodeType) -> bool:
    return code.co_name in WAITING_CALLS and any(name in code.co_filename for name in LIBRARIES)
