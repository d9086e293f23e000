"""Stop requests: a signal or a STOP file reaches one rank; all ranks agree to stop at a micro-batch boundary.

A scheduler gives seconds to minutes between its warning and the kill, and a step of a large model may take as long. So
the ranks check between micro-batches, not only between steps. An interrupted step loses nothing but time: weights and
optimizer state are those of the last finished step, and all randomness is derived from the numbers of samples.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_lite.observe.markers import STOP_FILE, asked_because
from megatron_lite.parallel.context import ParallelContext

CHECK_SECONDS = 1.0  # between two checks, each an all-reduce of two numbers on the CPU
MOST_BOUNDARIES = 64  # between two checks, in case a run suddenly slows down


class Reason(IntEnum):
    """Why a run stops early; of several reasons the largest is reported."""

    none = 0
    file = 1
    usr1 = 2
    term = 3
    save = 4


SIGNALS: dict[int, Reason] = {signal.SIGUSR1: Reason.usr1, signal.SIGTERM: Reason.term}


class StopRequested(Exception):  # noqa: N818  # not an error
    """All ranks have agreed to stop; raised on every one of them at the same boundary."""

    def __init__(self, reason: Reason, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class StopRequest:
    """The stop requests that this rank has received.

    Args:
        run_dir: where a STOP file may appear; None = another rank looks for it.
        grace_seconds: a rank that still runs this long after SIGTERM exits at once, with 143: the others may be gone,
            and a collective would wait for them.
    """

    def __init__(self, run_dir: Path | None, grace_seconds: float) -> None:
        self._run_dir = run_dir
        self._grace_seconds = grace_seconds
        self._heard = Reason.none
        self._lock = threading.RLock()  # a signal handler may interrupt `ask` in the same thread

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch SIGTERM and SIGUSR1 within the block; only the main thread of a process can.

        Python runs handlers in the main thread, between two of its instructions: not while that thread waits for a GPU,
        or for a peer that is gone. So a thread of its own acts on signals, which Python's C handler writes into a pipe.
        """

        def remember(number: int, frame: FrameType | None) -> None:
            self.ask(SIGNALS[number])

        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=self._read_signals, args=(reader,), name="signals", daemon=True)
        thread.start()
        earlier_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        earlier = {number: signal.signal(number, remember) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier_writer)
            os.close(writer)
            thread.join()

    def _read_signals(self, reader: int) -> None:
        """Until the other end of the pipe is closed, act on each signal that it brings."""
        is_ending = False
        while content := os.read(reader, 1):
            number = content[0]
            if number == signal.SIGTERM and not is_ending:
                is_ending = True
                timer = threading.Timer(self._grace_seconds, os._exit, (128 + number,))
                timer.daemon = True
                timer.start()
            if number in SIGNALS:
                self.ask(SIGNALS[number])
        os.close(reader)

    def ask(self, reason: Reason) -> None:
        """Request a stop from within the program; any thread may call it."""
        with self._lock:
            self._heard = max(self._heard, reason)

    @property
    def reason(self) -> Reason:
        if self._heard is Reason.none and self._run_dir is not None and (self._run_dir / STOP_FILE).exists():
            return Reason.file
        return self._heard

    def describe(self, reason: Reason) -> str:
        """The reason as text, as far as this rank knows it."""
        if reason is Reason.file and self._run_dir is not None:
            return asked_because(self._run_dir)
        return {
            Reason.file: f"a file named {STOP_FILE}",
            Reason.usr1: "SIGUSR1",
            Reason.term: "SIGTERM",
            Reason.save: "a checkpoint that cannot be written",
        }[reason]


class StopAgreement:
    """Checks with all ranks, about every CHECK_SECONDS, whether one of them has been asked to stop.

    Every rank passes the same micro-batch boundaries, so by counting them all ranks agree when to check next (their
    clocks would not agree). How many fit into CHECK_SECONDS follows from the slowest rank's time, which is part of the
    all-reduce.

    Args:
        group: all ranks, on the CPU, so that the check does not wait for queued GPU work. None = the default group.
    """

    def __init__(
        self,
        request: StopRequest,
        group: dist.ProcessGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request = request
        self._group = group
        self._clock = clock
        self._asked = clock()
        self._passed = 0
        self._wait = 1  # boundaries from one check to the next

    @classmethod
    def of_job(cls, request: StopRequest, context: ParallelContext) -> StopAgreement:
        """A collective of all ranks."""
        return cls(request, dist.new_group(backend="gloo") if context.device.type == "cuda" else None)

    def request(self, reason: Reason) -> None:
        """Stop all ranks, on behalf of this one."""
        self._request.ask(reason)

    def at_boundary(self) -> None:
        """
        Raises:
            StopRequested: on every rank, at the same boundary.
        """
        self._passed += 1
        if self._passed >= self._wait:
            self.ask()

    def ask(self) -> None:
        """Check now; a collective of all ranks.

        Raises:
            StopRequested: a rank has been asked to stop.
        """
        seconds_each = (self._clock() - self._asked) / max(self._passed, 1)
        answer = torch.tensor([float(self._request.reason), seconds_each], dtype=torch.float64)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self._group)
        reason, slowest = Reason(int(answer[0])), float(answer[1])
        if reason is not Reason.none:
            raise StopRequested(reason, self._request.describe(reason))
        fitting = int(CHECK_SECONDS / max(slowest, 1e-9))
        self._wait = max(1, min(fitting, 2 * self._wait, MOST_BOUNDARIES))
        self._asked, self._passed = self._clock(), 0
