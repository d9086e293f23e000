"""Child processes: they cannot outlive us, are monitored, and are ended within a bounded time."""

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
GENTLE = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send these some time before the kill; Ctrl-C means now
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36


class Ending:
    """Remembers a signal that asks this process to end, for loops to check."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.times = 0
        """How many such signals have arrived."""

    @property
    def exit_code(self) -> int:
        assert self.signal is not None
        return 128 + self.signal

    @property
    def name(self) -> str:
        """The signal's name, such as SIGTERM."""
        assert self.signal is not None
        return signal.Signals(self.signal).name

    @contextlib.contextmanager
    def watching(self) -> Iterator[Ending]:
        """Catch the signals within the block; restores the earlier handlers afterwards."""
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # for nohup
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
    """We had sent it a signal before it ended."""


@dataclass
class Children:
    """A group of processes: when one fails, the others are ended as well.

    Args:
        failure_grace_seconds: time for the others to notice the failure and to log it.
        ending_grace_seconds: time for a process to end after SIGTERM before it gets SIGKILL. 0 = SIGKILL at once, for
            ranks, which take SIGTERM as a request to save first.
    """

    pids: list[int]
    as_groups: bool = False
    """Each process leads its own process group, which gets the signals."""
    failure_grace_seconds: float = 3.0
    ending_grace_seconds: float = 10.0
    each_poll: Callable[[], None] = lambda: None
    """Called several times a second while waiting."""
    ends: dict[int, End] = field(default_factory=dict)
    """pid -> end, in the order in which the processes ended."""
    _signalled: bool = False

    @property
    def running(self) -> list[int]:
        return [pid for pid in self.pids if pid not in self.ends]

    def poll(self) -> None:
        """Record the processes that have ended."""
        for pid in self.running:
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                self.ends[pid] = End(os.waitstatus_to_exitcode(status), by_us=self._signalled)

    def wait(self, ending: Ending, stop: Callable[[], None] | None = None, stop_grace_seconds: float = 0.0) -> None:
        """Wait until all have ended: by themselves, because one failed, or because we are asked to end.

        Args:
            stop: asks the processes to end in their own time after a gentle signal; None = not supported.
            stop_grace_seconds: time that they then have; a second signal cuts it short.
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
        """End those that still run: SIGTERM, and after the grace period SIGKILL."""
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
        """Wait until all have ended, `enough` returns True, or the time is over."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline and not enough():
            time.sleep(POLL_SECONDS)
            self.poll()
            self.each_poll()

    def _send(self, number: int) -> None:
        self._signalled = True
        for pid in self.running:  # not reaped yet, so the pid cannot belong to another process
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if self.as_groups else os.kill)(pid, number)


def start(body: Callable[[], int], *, own_group: bool = False, own_session: bool = False) -> int:
    """Fork a process that runs `body` and exits with its result; returns its pid.

    It starts with default signal handlers but ignores Ctrl-C, which the terminal sends to all processes: the parent
    gets it and decides. It does not read from the terminal, and it is killed when the parent dies, for whatever reason.
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
            with contextlib.suppress(OSError):  # the child may have done it already, or have ended
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
    except BaseException:  # this copy of the parent must never continue the parent's code
        show_traceback()
    finally:
        _leave(code)


def _forget_handlers() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def replace_process(argv: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Replace this process by a program found on the PATH."""
    os.execvpe(argv[0], list(argv), environment)


def die_with(parent: int) -> None:
    """Have this process killed when the parent ends (Linux only; elsewhere it ends when collectives time out)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, instead of init, so that they can be found (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> set[psutil.Process]:
    """All descendants of this process."""
    return set(psutil.Process().children(recursive=True))


def end_descendants(seconds: float, others: set[psutil.Process]) -> bool:
    """End our descendants, except `others`, that do not end by themselves in time; returns whether there were any."""
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
    """Exit without running the parent's exit handlers, which this process must not run."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
