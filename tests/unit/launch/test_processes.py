"""Child processes: they end when one fails, when asked, and when they refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch.processes import Children, Ending, adopt_orphans, descendants, end_descendants, start


def sleeper() -> int:
    time.sleep(600)
    return 0


def group_of(*bodies: Callable[[], int], as_groups: bool = False) -> Children:
    pids = [start(body, own_group=as_groups) for body in bodies]
    return Children(pids, as_groups=as_groups, failure_grace_seconds=0.1, ending_grace_seconds=0.3)


def test_result_of_the_body_is_the_exit_code() -> None:
    children = group_of(lambda: 0, lambda: 0)
    children.wait(Ending())
    assert [children.ends[pid].status for pid in children.pids] == [0, 0]
    assert not children.failed


@pytest.mark.parametrize("status", [1, 2])
def test_one_failure_ends_the_others(status: int) -> None:
    children = group_of(sleeper, lambda: status, sleeper)
    children.wait(Ending())
    ends = [children.ends[pid] for pid in children.pids]
    assert [end.status for end in ends] == [-signal.SIGTERM, status, -signal.SIGTERM]
    assert [end.by_us for end in ends] == [True, False, True]
    assert next(iter(children.ends)) == children.pids[1], "the first end is the cause"


def test_exception_in_the_body_does_not_run_on_in_the_parents_place(capfd: pytest.CaptureFixture[str]) -> None:
    def broken() -> int:
        raise RuntimeError("broken body")

    here = os.getpid()
    children = group_of(broken)
    children.wait(Ending())
    assert os.getpid() == here
    assert children.ends[children.pids[0]].status == 1
    assert "broken body" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_CHILD_SUBREAPER")
def test_orphans_in_sessions_of_their_own_are_found_and_ended(tmp_path: Path) -> None:
    """As torchrun's ranks are when it has been killed; a process that was there before is left alone."""
    file = tmp_path / "pids"

    def body() -> int:
        adopt_orphans()
        bystander = start(sleeper)
        others = descendants()
        subprocess.run(["sh", "-c", f"setsid sleep 600 & echo $! > {file}"], check=True)
        first = end_descendants(0.2, others)
        second = end_descendants(0.2, others)
        spared = os.waitpid(bystander, os.WNOHANG) == (0, 0)
        os.kill(bystander, signal.SIGKILL)
        return 0 if (first, second, spared) == (True, False, True) else 1

    children = group_of(body)
    children.wait(Ending())
    assert not children.failed
    assert not psutil.pid_exists(int(file.read_text()))


def test_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def stubborn() -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ready.touch()
        return sleeper()

    children = group_of(stubborn)
    while not ready.exists():
        time.sleep(0.01)
    children.end()
    assert children.ends[children.pids[0]].status == -signal.SIGKILL


def test_group_ends_with_its_leader(tmp_path: Path) -> None:
    """The workers that prepare data are grandchildren: they must not outlive a Ctrl-C."""
    note = tmp_path / "pid"

    def with_worker() -> int:
        worker = os.fork()
        if worker == 0:
            sleeper()
        (tmp_path / "new").write_text(str(worker))
        (tmp_path / "new").rename(note)
        return sleeper()

    children = group_of(with_worker, as_groups=True)
    while not note.exists():
        time.sleep(0.01)
    children.end()
    worker = int(note.read_text())
    deadline = time.monotonic() + 30
    while _runs(worker):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    if sys.platform != "linux":
        return _exists(pid)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_signals_are_remembered_and_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Ending().watching() as ending:
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.signal == signal.SIGTERM
        assert ending.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Ending().watching() as ending:
            os.kill(os.getpid(), signal.SIGHUP)
            assert ending.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_child_is_deaf_to_ctrl_c_and_reads_nothing(tmp_path: Path) -> None:
    report = tmp_path / "report"

    def body() -> int:
        report.write_text(f"{signal.getsignal(signal.SIGINT) is signal.SIG_IGN} {os.read(0, 1)!r}")
        return 0

    children = group_of(body)
    children.wait(Ending())
    assert report.read_text() == "True b''"
