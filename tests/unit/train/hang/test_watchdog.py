"""One rank's watchdog in a process of its own; its neighbours are files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.errors import RunEnd
from megatron_lite.files import publish_first
from megatron_lite.observe.heartbeat import Beat, Heartbeat, Phase, Place, publish, read_beats
from megatron_lite.observe.markers import ERROR_FILE, HANG_FILE, read_marker
from megatron_lite.parallel.topology import Topology
from megatron_lite.train.hang.watchdog import interval_seconds, place_of

LIMIT_SECONDS = 2.0
BOUND_SECONDS = 60  # only to fail instead of hanging
PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from tests.plain_console import plain_console
from megatron_lite.observe.heartbeat import Heartbeat, Phase
from megatron_lite.parallel.topology import Topology
from megatron_lite.observe.run_lock import SharedLock
from megatron_lite.train.hang.watchdog import Watchdog, place_of

folder, rank, limit = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
heartbeat = Heartbeat()
console = plain_console()
place = place_of(rank, Topology(data_parallel_size=2))
with Watchdog(
    folder, place, heartbeat, local_rank=rank, world_size=2, limit_seconds=limit, console=console,
    claim=SharedLock(folder, 'this attempt'),
):
    heartbeat.begin_step(5)
    (folder / "started").touch()
    BODY
"""
SLEEP = "def read_forever(): time.sleep(600)\n    read_forever()"


@pytest.fixture
def rank(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., subprocess.Popen[str]]:
    """Starts rank `rank` of two, which runs `body` in step 5."""

    def start(body: str, rank: int = 1, limit: float = LIMIT_SECONDS, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("BODY", body), str(tmp_path), str(rank), str(limit)],
            env={**os.environ, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        request.addfinalizer(process.kill)
        return process

    return start


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def neighbour_waits(folder: Path) -> None:
    """Rank 0 gives a sign of life whenever it is called, from a collective of step 5."""
    heartbeat = Heartbeat()
    heartbeat.begin_step(5)
    heartbeat.enter(Phase.REDUCE)
    (folder / "logs" / "heartbeats").mkdir(parents=True, exist_ok=True)
    publish(folder / "logs" / "heartbeats", Beat.of(Place(0, "n1", 1, 0, 0, 0), heartbeat))


def end(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """Exit code and output of a rank whose neighbour waits for it."""

    def ended() -> bool:
        neighbour_waits(folder)
        return process.poll() is not None

    wait_for(ended)
    return process.returncode, process.communicate()[0]


def test_a_rank_reports_itself_and_ends(tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]) -> None:
    error_file = tmp_path / "error.txt"
    code, output = end(rank(SLEEP, **{ERROR_FILE: str(error_file)}), tmp_path)
    assert (code, output) == (RunEnd.HUNG, "")
    report = json.loads((tmp_path / HANG_FILE).read_text())
    assert (report["rank"], report["phase"], report["step"]) == (1, "data", 5)
    assert report["seconds"] >= LIMIT_SECONDS
    assert re.search(r"^rank 1 \(.*\) has been in 'data' for \d+ s; 1 other waits in step 5$", report["message"])
    assert [beat["rank"] for beat in report["beats"]] == [0, 1]
    marker = read_marker(tmp_path)
    assert marker is not None
    assert (marker.end, marker.step, marker.message) == (RunEnd.HUNG, 4, report["message"])
    first, second = error_file.read_text().splitlines()
    assert first == f"error: {report['message']}"
    assert "raise train.timeout_seconds=2" in second
    assert "read_forever" in (tmp_path / "logs" / "stacks" / "rank-1.txt").read_text()


def test_without_a_launcher_it_prints_what_to_do(tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]) -> None:
    code, output = end(rank(SLEEP), tmp_path)
    assert code == RunEnd.HUNG
    assert output.startswith("error: rank 1 (node ")
    assert output.count("error:") == 1


def test_a_report_of_another_rank_ends_it(tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]) -> None:
    process = rank(SLEEP, limit=60.0)  # too patient to find out by itself
    wait_for((tmp_path / "started").exists)
    assert publish_first(tmp_path / HANG_FILE, "{}")
    assert end(process, tmp_path) == (RunEnd.HUNG, "")
    assert "read_forever" in (tmp_path / "logs" / "stacks" / "rank-1.txt").read_text()


def test_a_report_of_an_earlier_attempt_ends_no_rank(
    tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / HANG_FILE).write_text('{"message": "of yesterday"}')
    code, output = end(rank("time.sleep(1.0)", limit=30.0), tmp_path)
    assert (code, output) == (0, "")


@pytest.mark.parametrize("number", [0, 1])
def test_a_report_of_an_earlier_attempt_gives_way(
    tmp_path: Path, rank: Callable[..., subprocess.Popen[str]], number: int
) -> None:
    (tmp_path / HANG_FILE).write_text('{"message": "of yesterday"}')
    process = rank(SLEEP, rank=number)
    if number == 0:
        wait_for((tmp_path / "started").exists)
        assert not (tmp_path / HANG_FILE).exists(), "rank 0 begins the attempt"
    wait_for(lambda: process.poll() is not None)
    assert process.returncode == RunEnd.HUNG
    other = 1 - number
    assert json.loads((tmp_path / HANG_FILE).read_text())["message"].startswith(f"rank {other} has sent no heartbeat")


def test_an_error_that_follows_from_a_hang_is_not_the_rank_s_own(
    tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]
) -> None:
    """When the first rank has ended, the others lose their connections to it."""
    body = f"""while not (folder / "{HANG_FILE}").exists(): time.sleep(0.001)
    raise RuntimeError("connection closed by peer")"""
    process = rank(body, limit=60.0)
    wait_for((tmp_path / "started").exists)
    assert publish_first(tmp_path / HANG_FILE, "{}")
    assert end(process, tmp_path) == (RunEnd.HUNG, "")


def test_an_error_without_a_hang_is(tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]) -> None:
    code, output = end(rank("raise RuntimeError('of its own')", limit=60.0), tmp_path)
    assert (code, "of its own" in output) == (1, True)
    assert not (tmp_path / HANG_FILE).exists()


def test_a_good_end_leaves_nothing_but_the_last_heartbeat(
    tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]
) -> None:
    process = rank("heartbeat.enter(Phase.FINISH)", limit=60.0)
    assert process.wait(BOUND_SECONDS) == 0
    assert read_beats(tmp_path / "logs" / "heartbeats", 2)[1].phase == Phase.ENDED
    assert list((tmp_path / "logs" / "stacks").iterdir()) == []


def test_a_thread_that_never_lets_go_of_python_still_shows_its_stack(
    tmp_path: Path, rank: Callable[..., subprocess.Popen[str]]
) -> None:
    body = "def hold_the_lock(): ctypes.PyDLL(None).sleep(600)\n    time.sleep(0.3); hold_the_lock()"
    rank(body)
    stacks = tmp_path / "logs" / "stacks" / "rank-1.txt"
    wait_for(lambda: stacks.exists() and "hold_the_lock" in stacks.read_text())


@pytest.mark.parametrize(("limit", "interval"), [(600.0, 10.0), (6.0, 0.25), (120.0, 2.0), (86400.0, 10.0)])
def test_interval(limit: float, interval: float) -> None:
    assert interval_seconds(limit) == interval


def test_place() -> None:
    place = place_of(5, Topology(data_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2))
    assert (place.rank, place.pipeline, place.data, place.tensor) == (5, 1, 0, 1)
