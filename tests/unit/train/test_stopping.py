"""Signals reach a rank whose main thread is inside a C call, where Python runs no handler."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable

import pytest

from megatron_lite.train.stopping import Reason, StopRequest

UNBOUNDED_SECONDS = 600


def exit_status(body: Callable[[], None]) -> int:
    """Of a forked process that runs it; 0 if it returns."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_grace_of_sigterm_ends_while_the_main_thread_waits_in_c() -> None:
    def rank() -> None:
        with StopRequest(None, grace_seconds=0.05).listening():
            # The signal goes to another thread, so that it does not interrupt the main thread's call.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            ctypes.CDLL(None).sleep(UNBOUNDED_SECONDS)

    def rank_and_killer() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        rank()

    assert exit_status(rank_and_killer) == 128 + signal.SIGTERM


def test_a_signal_is_heard_while_the_main_thread_waits_in_c() -> None:
    def rank() -> None:
        request = StopRequest(None, grace_seconds=600)

        def watch() -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            while request.reason is Reason.none:
                pass
            os._exit(7)

        with request.listening():
            threading.Timer(0.05, watch).start()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            ctypes.CDLL(None).sleep(UNBOUNDED_SECONDS)

    assert exit_status(rank) == 7


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGUSR1, Reason.usr1), (signal.SIGTERM, Reason.term)])
def test_what_was_there_before_comes_back(number: signal.Signals, reason: Reason) -> None:
    handler, descriptor = signal.getsignal(number), signal.set_wakeup_fd(-1)
    threads = threading.active_count()
    request = StopRequest(None, grace_seconds=600)
    with request.listening():
        signal.raise_signal(number)
        assert request.reason is reason
    assert signal.getsignal(number) is handler
    assert signal.set_wakeup_fd(descriptor) == -1
    assert threading.active_count() <= threads + 1, "only the timer of the grace goes on"
