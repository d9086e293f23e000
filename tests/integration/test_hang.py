"""One rank sleeps, is stopped, dies or raises: all others end in bounded time, and the report names that rank."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import HANG_FILE, read_marker
from tests.integration.runs import REPOSITORY, Finished, launch, run, run_warm

LAYOUT = "parallel=dp2_tp1_pp2"
LIMIT_SECONDS = 10  # no phase of a healthy rank takes so long, even if two tests share two cores
UNFORKED_LIMIT_SECONDS = 15  # if each rank imports torch's compiler by itself while it builds its engine
# Time to import and build, to detect the hang, and for the launcher to kill remaining ranks. torchrun alone gives 30 s.
BOUND_SECONDS = UNFORKED_LIMIT_SECONDS + 90


def _run(command: list[str], fault: str, run_dir: Path) -> Finished:
    finished = run(command, timeout_seconds=BOUND_SECONDS, fault=fault)
    left = [process.pid for process in psutil.process_iter(["cmdline"]) if str(run_dir) in _words(process)]
    assert left == [], f"processes are left\n{finished.out}\n{finished.err}"
    return finished


def _words(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [])


def _require_report(finished: Finished, run_dir: Path, message: str, rank: int, phase: str) -> None:
    report = json.loads((run_dir / HANG_FILE).read_text())
    assert re.fullmatch(message, report["message"]), report["message"]
    assert (report["rank"], report["phase"]) == (rank, phase)
    marker = read_marker(run_dir)
    assert marker is not None
    assert (marker.end, marker.step, marker.message) == (RunEnd.HUNG, 4, report["message"])
    assert finished.err.count(f"error: {report['message']}") == 1


def _stacks(run_dir: Path) -> dict[int, str]:
    return {rank: (run_dir / "logs" / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(4)}


@pytest.mark.slow
def test_a_rank_that_sleeps_in_its_loader(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    words = tiny("run", LAYOUT, f"train.timeout_seconds={LIMIT_SECONDS}")
    finished = _run(launch(*words), "sleep 1 5", tmp_path)
    message = r"rank 1 \(node \S+, tp0 pp0 dp1\) has been in 'data' for \d+ s; 3 others wait in step 5"
    _require_report(finished, tmp_path / "run", message, 1, "data")
    assert finished.code == RunEnd.HUNG
    assert len(re.findall("^error:", finished.err, re.MULTILINE)) == 1
    assert "it was at train/loop.py:" in finished.err
    assert f"raise train.timeout_seconds={LIMIT_SECONDS}" in finished.err
    stacks = _stacks(tmp_path / "run")
    assert "sitecustomize.py" in stacks[1], "where it slept"
    assert all("distributed_c10d.py" in stacks[rank] for rank in (0, 2, 3)), "where the others waited"
    # files that this attempt has left must not confuse the next one
    run_warm([*words, "train.timeout_seconds=60"]).require_success()
    assert not (tmp_path / "run" / HANG_FILE).exists()


@pytest.mark.slow
def test_a_rank_that_is_stopped(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    words = tiny("run", LAYOUT, f"train.timeout_seconds={LIMIT_SECONDS}")
    finished = _run(launch(*words), "stop 2 5", tmp_path)
    message = r"rank 2 \(node \S+, tp0 pp1 dp0\) has sent no heartbeat for \d+ s; 3 others wait in step 5"
    report = json.loads((tmp_path / "run" / HANG_FILE).read_text())
    _require_report(finished, tmp_path / "run", message, 2, report["phase"])
    assert finished.code == RunEnd.HUNG
    stacks = _stacks(tmp_path / "run")
    assert all("distributed_c10d.py" in stacks[rank] for rank in (0, 1, 3)), "where the others waited"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("kill 3 5", 137, r"error: rank 3 \(pp1 dp1 tp0\) was killed by signal 9 \(SIGKILL"),
        (
            "raise 0 5",
            1,
            r"error: rank 0 \(pp0 dp0 tp0\) ended with exit code 1(.|\n)*ValueError: the loader is broken",
        ),
    ],
)
def test_a_rank_that_ends_is_no_hang(
    fault: str, code: int, words: str, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    finished = _run(launch(*tiny("run", LAYOUT, f"train.timeout_seconds={LIMIT_SECONDS}")), fault, tmp_path)
    assert finished.code == code
    assert re.search(words, finished.err), finished.err
    assert not (tmp_path / "run" / HANG_FILE).exists()


@pytest.mark.slow
def test_torchrun_without_our_launcher(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "4"]
    words = tiny("run", LAYOUT, f"train.timeout_seconds={UNFORKED_LIMIT_SECONDS}")
    finished = _run([*torchrun, str(REPOSITORY / "pretrain_gpt.py"), *words], "sleep 1 5", tmp_path)
    message = r"rank 1 \(node \S+, tp0 pp0 dp1\) has been in 'data' for \d+ s; 3 others wait in step 5"
    _require_report(finished, tmp_path / "run", message, 1, "data")
    assert finished.code == 1, "torchrun's own"
    assert len(re.findall("^error:", finished.err, re.MULTILINE)) == 1
    assert "sitecustomize.py" in _stacks(tmp_path / "run")[1]
