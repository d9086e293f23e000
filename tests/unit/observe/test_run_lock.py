"""The lock of a run folder: one holder, stale ones taken over by exactly one, and lost ones noticed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main as launch
from megatron_lite.config.frozen import freeze
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import RunFolderInUseError, RunFolderLostError
from megatron_lite.observe import lock_holder, run_lock
from megatron_lite.observe.markers import STOP_FILE
from megatron_lite.observe.run_lock import Role, holder_of, join, own_attempt, require_free, take
from tests.unit.remedies import obeys


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waits in hundredths of a second."""
    for name, seconds in (("STALE", 0.3), ("HEARTBEAT", 0.02), ("JOIN", 0.1), ("REFUSAL", 0.1), ("POLL", 0.01)):
        monkeypatch.setattr(run_lock, f"{name}_SECONDS", seconds)


def lock_file(run_dir: Path) -> Path:
    (path,) = (run_dir / "lock").glob("*.json")
    return path


def rewritten(run_dir: Path, **fields: Any) -> Path:
    """The holder's file with other words in it, and its heartbeat as it was."""
    path = lock_file(run_dir)
    before = path.stat()
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


def elsewhere(run_dir: Path) -> Path:
    """As a process of another machine holds it."""
    return rewritten(run_dir, host="n7", machine="another boot", pid=99)


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@obeys("megatron_lite/observe/run_lock.py:_in_use")
def test_the_second_process_is_refused_with_the_name_of_the_holder(tmp_path: Path) -> None:
    tmp_path = tmp_path / "my run"  # a shell would take it for two words
    freeze(RunConfig(), tmp_path)
    lock = take(tmp_path, Role.rank, "a")
    began = time.monotonic()
    with pytest.raises(RunFolderInUseError) as caught:
        take(tmp_path, Role.launcher, "b")
    assert time.monotonic() - began < run_lock.HEARTBEAT_SECONDS / 2, "of this machine it is known at once"
    text = str(caught.value)
    who = f"is in use by process {os.getpid()} on {os.uname().nodename} (rank 0) since 20"
    for part in (f"train.run_dir={tmp_path}", who, "wait for it", "launch cancel", "give another train.run_dir"):
        assert part in text
    with pytest.raises(RunFolderInUseError):
        require_free(tmp_path, "b")
    take(tmp_path / "another", Role.launcher, "b").release()
    command = text.partition("`python -m launch ")[2].partition("`")[0]
    assert launch(shlex.split(command)) == 0
    assert (tmp_path / STOP_FILE).exists()
    lock.release()
    require_free(tmp_path, "b")
    take(tmp_path, Role.rank, "b")


def test_no_space_is_needed_to_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = take(tmp_path, Role.rank, "a")
    before = lock_file(tmp_path).read_bytes()
    lock.release()
    assert lock_file(tmp_path).read_bytes() == before
    assert holder_of(tmp_path) is None


def test_rank_0_takes_over_from_its_own_launcher_alone(tmp_path: Path) -> None:
    launcher = take(tmp_path, Role.launcher, "a")
    with pytest.raises(RunFolderInUseError):
        take(tmp_path, Role.rank, "b")
    with pytest.raises(RunFolderInUseError):
        take(tmp_path, Role.launcher, "a")
    told: list[str] = []
    rank = take(tmp_path, Role.rank, "a", report=told.append)
    assert told == []
    launcher.release()  # of what it holds no more
    assert holder_of(tmp_path) is not None
    assert rank.is_ours()
    assert not launcher.is_ours()


def test_whatever_byte_of_the_lock_is_damaged_it_is_read(tmp_path: Path) -> None:
    take(tmp_path, Role.rank, "a")
    path = lock_file(tmp_path)
    sound = path.read_bytes()
    for place in range(len(sound)):
        path.write_bytes(sound[:place] + b"e" + sound[place + 1 :])  # of 1e9 seconds it makes 1e90
        assert str(holder_of(tmp_path))


def test_process_that_has_ended_is_no_holder(tmp_path: Path) -> None:
    take(tmp_path, Role.rank, "a")
    rewritten(tmp_path, pid=ended_process())
    assert holder_of(tmp_path) is None
    told: list[str] = []
    take(tmp_path, Role.rank, "b", report=told.append)
    (line,) = told
    assert f"took over the lock of {tmp_path} from process " in line
    assert line.endswith("that process has ended")


def test_number_of_a_process_that_is_used_again(tmp_path: Path) -> None:
    take(tmp_path, Role.rank, "a")
    rewritten(tmp_path, started=1)
    take(tmp_path, Role.rank, "b")


def test_zombie_is_no_holder(tmp_path: Path) -> None:
    """A launcher may reap a killed rank late."""
    take(tmp_path, Role.rank, "a")
    child = subprocess.Popen(["true"])
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
        time.sleep(0.01)
    rewritten(tmp_path, pid=child.pid, started=lock_holder.state_of(child.pid)[1])
    take(tmp_path, Role.rank, "b")
    child.wait()


def test_suspended_process_of_this_machine_is_a_holder(tmp_path: Path, quick: None) -> None:
    program = "import sys, time; from pathlib import Path; from megatron_lite.observe.run_lock import *; "
    program += "take(Path(sys.argv[1]), Role.rank, 'a'); print('has it', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        process.send_signal(signal.SIGSTOP)
        os.utime(lock_file(tmp_path), (1e9, 1e9))
        with pytest.raises(RunFolderInUseError, match=f"process {process.pid} on"):
            take(tmp_path, Role.rank, "b")
    finally:
        process.kill()
        process.wait()
    take(tmp_path, Role.rank, "b")


def test_holder_elsewhere_that_beats_is_left_alone(tmp_path: Path, quick: None) -> None:
    lock = take(tmp_path, Role.rank, "a")
    elsewhere(tmp_path)
    lock.keep(on_loss=pytest.fail)
    told: list[str] = []
    with pytest.raises(RunFolderInUseError, match="process 99 on n7"):
        take(tmp_path, Role.rank, "b", report=told.append)
    assert "waiting up to 0 s for its heartbeat" in told[0]
    lock.release()
    take(tmp_path, Role.rank, "b")


def test_holder_elsewhere_without_a_heartbeat_is_waited_for_and_taken_over(tmp_path: Path, quick: None) -> None:
    take(tmp_path, Role.rank, "a")
    elsewhere(tmp_path)
    told: list[str] = []
    take(tmp_path, Role.rank, "b", report=told.append)
    assert [line.split()[0] for line in told] == ["the", "took"]
    assert all("process 99 on n7" in line for line in told)


def test_wait_is_bounded_for_a_heartbeat_from_the_future(tmp_path: Path, quick: None) -> None:
    """A clock that was set back, or a file that somebody has touched."""
    take(tmp_path, Role.rank, "a")
    path = elsewhere(tmp_path)
    os.utime(path, (4e9, 4e9))
    take(tmp_path, Role.rank, "b")


def test_wait_can_be_given_up(tmp_path: Path) -> None:
    take(tmp_path, Role.rank, "a")
    elsewhere(tmp_path)
    with pytest.raises(RunFolderInUseError):
        take(tmp_path, Role.launcher, "b", give_up=lambda: True)


def test_earlier_attempt_of_the_same_slurm_job_is_stale_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm ends an attempt before it begins the next, also where the node was lost and nobody can look."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    take(tmp_path, Role.rank, own_attempt())
    elsewhere(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    told: list[str] = []
    take(tmp_path, Role.rank, own_attempt(), report=told.append)
    assert "Slurm job 7" in told[0]
    assert told[0].endswith("it belongs to an earlier attempt of this Slurm job")


def test_copy_of_a_run_folder_is_free(tmp_path: Path) -> None:
    take(tmp_path / "run", Role.rank, "a")
    subprocess.run(["cp", "-r", tmp_path / "run", tmp_path / "copy"], check=True)
    assert holder_of(tmp_path / "copy") is None
    take(tmp_path / "copy", Role.rank, "b")
    assert holder_of(tmp_path / "run") is not None


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"{", b"[]", b"{}", b"\xff\xfe", b'{"pid": "x"}'])
def test_damaged_lock_is_stale_after_a_while(content: bytes, tmp_path: Path, quick: None) -> None:
    take(tmp_path, Role.rank, "a")
    lock_file(tmp_path).write_bytes(content)
    assert holder_of(tmp_path) is None
    lock = take(tmp_path, Role.rank, "b")
    assert lock.is_ours()
    assert holder_of(tmp_path) is not None


def test_something_else_where_the_lock_should_be(tmp_path: Path, quick: None) -> None:
    (tmp_path / "lock").write_text("not a folder")
    take(tmp_path, Role.rank, "a").release()
    lock_file(tmp_path).unlink()
    (tmp_path / "lock" / "00000005.json").mkdir()
    take(tmp_path, Role.rank, "b")
    assert (tmp_path / "lock" / "00000006.json").is_file()


def contend(run_dir: Path, go: float) -> int:
    """A process that tries to take the lock, and holds it for a moment; its exit code: 0 = it had it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        time.sleep(max(go - time.monotonic(), 0))
        lock = take(run_dir, Role.rank, str(os.getpid()))
        # The process that makes this file holds the lock: two at the same time would meet here.
        os.close(os.open(run_dir / "held", os.O_CREAT | os.O_EXCL))
        deadline = time.monotonic() + 30
        while not (run_dir / "over").exists() and time.monotonic() < deadline:  # one that came later might take it over
            time.sleep(0.01)
        os.unlink(run_dir / "held")
        code = 0 if lock.is_ours() else 3
    except RunFolderInUseError:
        code = 1
    except BaseException:
        code = 4
    finally:
        os._exit(code)


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    for round_ in range(4):
        run_dir = tmp_path / str(round_)
        take(run_dir, Role.rank, "a")
        rewritten(run_dir, pid=ended_process())
        go = time.monotonic() + 0.05
        children = {contend(run_dir, go) for _ in range(6)}
        codes = []
        while len(children) > 1:
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes.append(os.waitstatus_to_exitcode(status))
                    children.remove(pid)
            time.sleep(0.01)
        (run_dir / "over").touch()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(children.pop(), 0)[1]))
        assert codes == [1, 1, 1, 1, 1, 0]


def test_slow_one_that_knew_of_an_older_lock_does_not_get_in(tmp_path: Path) -> None:
    """It judged number 1, slept while others came and went, and now publishes number 2."""
    take(tmp_path, Role.rank, "a").release()
    me = lock_holder.this_process(Role.rank, "slow", tmp_path / "lock")
    take(tmp_path, Role.rank, "b").release()
    lock = take(tmp_path, Role.rank, "c")
    assert run_lock._publish(tmp_path / "lock", 2, me) is None
    assert lock.is_ours()
    assert len(list((tmp_path / "lock").iterdir())) == 1


def test_holder_that_was_suspended_notices_and_writes_nothing_more(tmp_path: Path, quick: None) -> None:
    lock = take(tmp_path, Role.rank, "a")
    elsewhere(tmp_path)  # so that the newer attempt sees its heartbeat alone
    newer = take(tmp_path, Role.rank, "b")
    with pytest.raises(RunFolderLostError) as caught:
        lock.confirm()
    text = str(caught.value)
    assert f"train.run_dir={tmp_path} was taken over by process {os.getpid()}" in text
    lost: list[str] = []
    lock.keep(lost.append)
    while not lost:
        time.sleep(0.01)
    assert lost == [text]
    lock.release()
    assert holder_of(tmp_path) is not None
    newer.confirm()


def test_thread_beats_while_the_process_computes(tmp_path: Path, quick: None) -> None:
    lock = take(tmp_path, Role.rank, "a")
    os.utime(lock_file(tmp_path), (1e9, 1e9))
    lock.keep(on_loss=pytest.fail)
    while lock_file(tmp_path).stat().st_mtime == 1e9:
        sum(range(10_000))
    lock.release()
    assert lock_file(tmp_path).stat().st_mtime == 0


def test_other_ranks_join_their_own_rank_0_and_refuse_another(tmp_path: Path, quick: None) -> None:
    assert join(tmp_path, "a").is_ours(), "rank 0 may be late, or its folder another one"
    lock = take(tmp_path, Role.rank, "a")
    claim = join(tmp_path, "a")
    with pytest.raises(RunFolderInUseError, match="is in use by process"):
        join(tmp_path, "b")
    lock.release()
    take(tmp_path, Role.rank, "b")
    assert not claim.is_ours()
    with pytest.raises(RunFolderLostError):
        claim.confirm()


def test_attempts_differ_by_what_launchers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}
    slurm = torchrun | {"SLURM_JOB_ID": "7"}
    attempts = [torchrun, slurm, slurm | {"SLURM_RESTART_COUNT": "1"}, torchrun | {"MEGATRON_LITE_ATTEMPT": "x"}]
    assert len({own_attempt(environment) for environment in attempts}) == 4
    assert own_attempt(attempts[3]) == "x"
