"""Child processes: started so that they cannot outlive us, watched, and ended in bounded time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import psutil

from launch.messages import show_traceback

POLL_SECONDS = 0.05
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GENTLE = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send ahead of the end; Ctrl-C means now
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


class Ending:
    """Remembers the signal that asks this process to end, for loops to look at."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.times = 0
        """How often we have been asked."""

    @property
    def exit_code(self) -> int:
        assert self.signal is not None
        return 128 + self.signal

    @property
    def name(self) -> str:
        """Such as SIGTERM."""
        assert self.signal is not None
        return signal.Signals(self.signal).name

    @contextlib.contextmanager
    def watching(self) -> Iterator[Ending]:
        """Catch the signals within the block; the earlier handlers come back after it."""
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup stays nohup
        earlier = {number: signal.signal(number, self._remember) for number in heard}
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.times += 1


@dataclass
class End:
    """How one process ended."""

    status: int
    """Exit code, or minus the number of the signal that killed it."""
    by_us: bool
    """We had sent it a signal before."""


@dataclass
class Children:
    """Processes that belong together: when one fails, the others end as well.

    Args:
        failure_grace_seconds: how long the others may take to notice the failure and to log it.
        ending_grace_seconds: how long a process may take to end after SIGTERM; then comes SIGKILL. 0 = SIGKILL at once,
            for ranks, which take SIGTERM as a request to save first.
    """

    pids: list[int]
    as_groups: bool = False
    """Each process leads a group of its own, which is signalled as a whole."""
    failure_grace_seconds: float = 3.0
    ending_grace_seconds: float = 10.0
    each_poll: Callable[[], None] = lambda: None
    """Called some times a second as long as we wait."""
    ends: dict[int, End] = field(default_factory=dict)
    """pid -> end, in the order of the ends."""
    _signalled: bool = False

    @property
    def running(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self.ends]

    def poll(self) -> None:
        """Take note of the processes that have ended."""
        for pid in self.running:
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                self.ends[pid] = End(os.waitstatus_to_exitcode(status), by_us=self._signalled)

    def wait(self, ending: Ending, stop: Callable[[], None] | None = None, stop_grace_seconds: float = 0.0) -> None:
        """Until all have ended: by themselves, because one failed, or because we are asked to end.

        Args:
            stop: asks the processes to end in their own time after a gentle signal; None = there is no such way.
            stop_grace_seconds: that they then have; a second signal cuts it short.
        """
        self._pause(float("inf"), lambda: self.failed or ending.signal is not None)
        if self.running and stop is not None and ending.signal in GENTLE:
            asked = ending.times
            stop()
            self._pause(stop_grace_seconds, lambda: self.failed or ending.times > asked)
        if self.running and self.failed:
            self._pause(self.failure_grace_seconds, lambda: ending.times > 1)
        self.end()

    def end(self) -> None:
        """End those that still run: SIGTERM, and after the grace SIGKILL."""
        if self.ending_grace_seconds and self.running:
            self._send(signal.SIGTERM)
            self._pause(self.ending_grace_seconds)
        if self.running:
            self._send(signal.SIGKILL)
            self._pause(float("inf"))

    @property
    def failed(self) -> bool:
        return any(end.status != 0 for end in self.ends.values())

    def _pause(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Until all have ended, or it is enough, or the time is over."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline and not enough():
            time.sleep(POLL_SECONDS)
            self.poll()
            self.each_poll()

    def _send(self, number: int) -> None:
        self._signalled = True
        for pid in self.running:  # not reaped yet, so the number cannot belong to another process
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if self.as_groups else os.kill)(pid, number)


def start(body: Callable[[], int], *, own_group: bool = False, own_session: bool = False) -> int:
    """Fork a process that runs `body` and ends with its result; returns its pid.

    It starts with default signal handlers, but deaf to Ctrl-C, which reaches the whole terminal: the parent hears it
    and decides. It reads nothing from the terminal, and it is killed when the parent dies, however that happens.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none may reach the child while it has our handlers
    try:
        pid = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if own_group:
            with contextlib.suppress(OSError):  # the child may have done it, or be gone
                os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        _forget_handlers()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if own_session:
            os.setsid()
        elif own_group:
            os.setpgid(0, 0)
        die_with(parent)
        _close_stdin()
        code = body()
    except BaseException:  # whatever it is, this copy of the parent must not run on in the parent's place
        show_traceback()
    finally:
        _leave(code)


def _forget_handlers() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def replace_process(argv: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Become another program, found on the PATH."""
    os.execvpe(argv[0], list(argv), environment)


def die_with(parent: int) -> None:
    """Be killed when the parent ends (Linux only; elsewhere an orphan ends when its collectives time out)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, instead of init, so that they can be found (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> set[psutil.Process]:
    """All processes that descend from this one."""
    return set(psutil.Process().children(recursive=True))


def end_descendants(seconds: float, others: set[psutil.Process]) -> bool:
    """End what descends from us, `others` apart, and has not ended by itself within the time; whether there was any."""
    _, left = psutil.wait_procs(descendants() - others, timeout=seconds)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left)
    return bool(left)


def _close_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _leave(code: int) -> NoReturn:
    """End without the parent's exit handlers, which are not ours to run."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
