"""Launchers on a stub script: who starts with which arguments, and that every end is an end for all."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch import local, processes
from launch.deepspeed import exit_code
from launch.local import culprit
from launch.processes import End
from megatron_lite.errors import LaunchError

ROOT = Path(__file__).parents[3]
LAYOUT = "parallel=dp2_tp2_pp2"
BOUND_SECONDS = 120  # only to fail instead of hanging


GRACE = "launcher.grace_seconds=0.5"


def start(
    launcher: str, run_dir: Path, what: str, layout: str = LAYOUT, rank: int | None = None
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STUB": what}
    if rank is not None:
        environment["STUB_RANK"] = str(rank)
    command = [sys.executable, "-m", "tests.unit.launch.driver", launcher, str(run_dir), layout, GRACE]
    return subprocess.Popen(command, env=environment, text=True, cwd=ROOT, stdout=-1, stderr=-1)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=BOUND_SECONDS)
    return process.returncode, errors


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ranks_of(run_dir: Path, count: int) -> list[int]:
    """Process numbers of all ranks, once each has started."""
    files = [run_dir / f"pid-{rank}" for rank in range(count)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("launcher", ["fork", "fresh"])
def test_ranks_know_who_they_are(tmp_path: Path, launcher: str) -> None:
    layout = LAYOUT if launcher == "fork" else "parallel=tp2"
    count = 8 if launcher == "fork" else 2
    assert finish(start(launcher, tmp_path, "report", layout)) == (0, "")
    reports = [(tmp_path / f"env-{rank}").read_text().split("\n") for rank in range(count)]
    for rank, report in enumerate(reports):
        assert report[:5] == [str(rank), str(rank), str(count), str(count), "127.0.0.1"]
        assert report[6:8] == ["1", "cpu"]
    assert len({report[5] for report in reports}) == 1, "one port for all"
    assert len({report[8] for report in reports}) == 1, "one folder of extensions for all"
    assert reports[0][8].startswith(f"{tmp_path}/torch_extensions/")
    assert len(list(tmp_path.glob("config-*.yaml"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_warm_parent_has_no_thread_that_a_fork_would_lose() -> None:
    """A thread pool (OpenMP, OpenBLAS, rayon) that exists at the fork is missing in the ranks, which then hang."""
    program = (
        "import importlib, os\n"
        "from launch.environment import apply, rank_environment\n"
        "from launch.local import WARM_MODULES\n"
        "from megatron_lite.config.compose import compose\n"
        "from megatron_lite.config.derived import resolve\n"
        "config = resolve(compose('pretrain_gpt', []), device='cpu')\n"
        "apply(rank_environment(config, one_machine=True), overwrite=True)\n"
        "for name in WARM_MODULES: importlib.import_module(name)\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=BOUND_SECONDS
    )
    assert (finished.returncode, finished.stdout.split()[-1:]) == (0, ["1"]), finished.stderr


@pytest.mark.parametrize("rank", [None, 5])
def test_user_error_is_shown_once_and_ends_all_with_2(tmp_path: Path, rank: int | None) -> None:
    process = start("fork", tmp_path, "user error", rank=rank)
    pids = ranks_of(tmp_path, 8)
    expected = "error: train.steps=3 is bad; use 4\nerror: train.seed=1 is bad; use 2\n"
    assert finish(process) == (2, expected)
    assert not any(map(is_running, pids))


def test_exception_names_the_rank_and_shows_the_end_of_its_log(tmp_path: Path) -> None:
    process = start("fork", tmp_path, "exception", rank=5)
    pids = ranks_of(tmp_path, 8)
    code, errors = finish(process)
    log = tmp_path / "logs" / "rank-5.log"
    assert code == 1
    assert errors.startswith(f"error: rank 5 (pp1 dp0 tp1) ended with exit code 1; see {log}\n  | an earlier line\n")
    assert errors.endswith("  | ValueError: the layer is broken\n")
    assert "Traceback" in log.read_text()
    assert not any(map(is_running, pids))


def test_log_of_an_earlier_attempt_is_not_shown_again(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").write_text("of yesterday\n")
    code, errors = finish(start("fork", tmp_path, "killed", "parallel=tp2", rank=1))
    assert code == 137
    assert errors == "error: rank 1 (pp0 dp0 tp1) was killed by signal 9 (SIGKILL: out of memory, or by hand)\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_launcher_ends_all_ranks(tmp_path: Path, number: int, code: int) -> None:
    process = start("fork", tmp_path, "wait")
    pids = ranks_of(tmp_path, 8)
    process.send_signal(number)
    assert finish(process) == (code, "")
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("launcher", ["fork", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_stop_when_asked_are_not_killed(tmp_path: Path, launcher: str, number: int) -> None:
    process = start(launcher, tmp_path, "stop when asked", "parallel=tp2")
    ranks_of(tmp_path, 2)
    process.send_signal(number)
    assert finish(process)[0] == 75
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("launcher", ["fork", "fresh"])
def test_ranks_die_with_a_killed_launcher(tmp_path: Path, launcher: str) -> None:
    process = start(launcher, tmp_path, "wait", "parallel=tp2")
    pids = ranks_of(tmp_path, 2)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    wait_for(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize("launcher", ["fork", "deepspeed"])
def test_bad_data_starts_no_rank_and_writes_nothing(tmp_path: Path, launcher: str) -> None:
    run_dir = tmp_path / "run"
    assert finish(start(launcher, run_dir, "bad data")) == (2, "error: corpus.txt is empty; give a file with text\n")
    assert not run_dir.exists()


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    process = start("fork", tmp_path, "wait", "parallel=tp2")
    ranks_of(tmp_path, 2)
    code, errors = finish(start("fork", tmp_path, "report", "parallel=tp2"))
    process.send_signal(signal.SIGTERM)
    finish(process)
    rank_0 = (tmp_path / "pid-0").read_text()
    expected = f"train.run_dir={tmp_path} is in use by process {rank_0} on "
    assert (code, expected in errors.splitlines()[-1]) == (1, True), errors
    code, errors = finish(start("fork", tmp_path, "report", "parallel=tp2"))
    assert code == 0, errors
    took_over = f"took over the lock of {tmp_path} from process {rank_0} on "
    assert errors == "" or errors.startswith(took_over), errors  # whether rank 0 was killed before it could release


def test_all_ranks_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def limited(body: Callable[[], int]) -> int:
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(processes.start(body))
        return started[-1]

    monkeypatch.setattr(local, "start", limited)
    with pytest.raises(LaunchError) as caught:
        local._start_ranks(lambda: time.sleep(600) or 0, [{}, {}, {}], lambda: None)
    assert str(caught.value) == (
        "launcher.num_processes=3: only 2 could be started (Resource temporarily unavailable); use a smaller layout, "
        "or raise the limits on processes and memory"
    )
    assert not any(map(is_running, started))


@pytest.mark.slow
def test_deepspeed_starts_the_ranks_and_passes_a_user_error_on(tmp_path: Path) -> None:
    assert finish(start("deepspeed", tmp_path, "report", "parallel=tp2")) == (0, "")
    reports = [(tmp_path / f"env-{rank}").read_text().split("\n") for rank in range(2)]
    assert [report[:3] for report in reports] == [["0", "0", "2"], ["1", "1", "2"]]
    code, errors = finish(start("deepspeed", tmp_path, "user error", "parallel=tp2", rank=1))
    assert (code, errors.count("error: train.steps=3 is bad; use 4")) == (2, 1)


@pytest.mark.slow
def test_sigterm_leaves_no_deepspeed_worker_behind(tmp_path: Path) -> None:
    process = start("deepspeed", tmp_path, "wait", "parallel=tp2")
    pids = ranks_of(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    wait_for(lambda: not any(map(is_running, pids)))


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_passes_their_ends_on(tmp_path: Path) -> None:
    assert finish(start("torchrun", tmp_path, "report", "parallel=tp2")) == (0, "")
    reports = [(tmp_path / f"env-{rank}").read_text().split("\n") for rank in range(2)]
    assert [report[:5] for report in reports] == [[str(rank), str(rank), "2", "2", "127.0.0.1"] for rank in range(2)]
    errors = "error: train.steps=3 is bad; use 4\nerror: train.seed=1 is bad; use 2\n"
    assert finish(start("torchrun", tmp_path, "user error", "parallel=tp2", rank=1)) == (2, errors)
    code, errors = finish(start("torchrun", tmp_path, "killed", "parallel=tp2", rank=1))
    taken, _, error = errors.rpartition("error: ")
    assert (code, error) == (137, f"rank 1 was killed by signal 9 (SIGKILL); see {tmp_path}/logs/rank-1.log\n")
    # The rank 0 before it, which another's error has ended, could not release the lock.
    assert re.fullmatch(r"(took over the lock of .* \(rank 0\) .*: that process has ended\n)?", taken)


@pytest.mark.slow
def test_torchrun_names_the_rank_with_an_exception(tmp_path: Path) -> None:
    code, errors = finish(start("torchrun", tmp_path, "exception", "parallel=tp2", rank=1))
    assert (code, errors) == (1, f"error: rank 1 ended with exit code 1; see {tmp_path}/logs/rank-1.log\n")
    assert (tmp_path / "logs" / "rank-1.log").read_text().endswith("ValueError: the layer is broken\n")


@pytest.mark.slow
def test_torchrun_that_cannot_start_says_so_in_a_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, errors = finish(start("torchrun", tmp_path, "report", f"launcher.master_port={port}"))
    assert code == 2
    assert errors.startswith("error: torchrun could not start the ranks: DistNetworkError: ")
    assert (errors.count("\n"), str(port) in errors) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_rank_of_torchrun_outlives_its_launcher(tmp_path: Path, number: int, code: int) -> None:
    process = start("torchrun", tmp_path, "wait", "parallel=tp2")
    pids = ranks_of(tmp_path, 2)
    process.send_signal(number)
    assert finish(process) == (code, "")
    wait_for(lambda: not any(map(is_running, pids)))


@pytest.mark.slow
def test_ranks_of_a_killed_torchrun_are_ended(tmp_path: Path) -> None:
    """They are in sessions of their own, and would wait for each other."""
    process = start("torchrun", tmp_path, "wait", "parallel=tp2")
    pids = ranks_of(tmp_path, 2)
    psutil.Process(pids[0]).parent().kill()
    errors = f"error: torchrun ended with exit code -9; the ranks' logs lie in {tmp_path}/logs\n"
    assert finish(process) == (137, errors)
    assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("status", "left_behind", "code"),
    [
        (0, False, 0),
        (0, True, 1),  # its worker launcher was killed, and it did not notice
        (1, False, 1),
        (2, False, 2),
        (247, False, 137),  # a worker was killed by signal 9
        (241, True, 143),
        (-15, True, 143),
        (75, False, 75),
        (77, False, 1),
    ],
)
def test_exit_code_of_deepspeed(status: int, left_behind: bool, code: int) -> None:
    assert exit_code(status, left_behind) == code


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({1: End(1, False), 2: End(1, False)}, 1),  # the first one
        ({1: End(1, False), 2: End(2, False)}, 2),  # a user's error explains lost connections
        ({1: End(1, False), 2: End(-9, False)}, 2),  # so does a kill from outside
        ({1: End(0, False), 2: End(-15, True), 3: End(1, True)}, 3),  # our own SIGTERM explains nothing
    ],
)
def test_culprit(ends: dict[int, End], expected: int) -> None:
    assert culprit(ends) == expected
