"""Failures, stop requests and full disks during a save: the run ends cleanly, and can be resumed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.checkpoint.folder import newest_complete
from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import ask_to_stop, read_marker
from megatron_lite.observe.metrics import EVENTS_FILE, read_metrics
from tests.integration.runs import launch, run, start, wait_for_step
from tests.mounts import small_disk

WORDS = ("parallel=dp2_tp1_pp1", "train.save_interval=4", "train.eval_interval=0", "train.keep_last=0")
SLOW_SAVES = "1.0"  # seconds for each kind of tensor: a save takes longer than the steps until the next one
TinyWords = Callable[..., list[str]]


def saved(run_dir: Path) -> list[str]:
    """All names in the checkpoint folder; the newest checkpoint must be complete."""
    found = newest_complete(run_dir / "checkpoints", pytest.fail)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert found is not None
    assert found[0].name == names[-1]
    return names


def saves(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run_dir / EVENTS_FILE) if event["event"] == "save"]


@pytest.mark.slow
def test_save_is_completed_when_a_rank_raises_meanwhile(
    tiny: TinyWords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT_SLOW_SAVES", SLOW_SAVES)
    finished = run(launch(*tiny("run", *WORDS)), fault="raise 1 5")
    assert finished.code == RunEnd.FAILED
    assert "ValueError: the loader is broken at https://***@host/x" in finished.err
    told = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert sum(b"the loader is broken" in content for content in told) >= 2, "in the log and in the marker"
    assert not any(b"planted" in content for content in told), "a password in an exception's message"
    assert saved(tmp_path / "run") == ["latest", "step_00000004"]


@pytest.mark.slow
def test_stop_during_a_save_ends_with_both_checkpoints(
    tiny: TinyWords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop arrives while step 4 is being written and step 5 is done; the ranks agree on it within a few steps."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("FAULT_SLOW_SAVES", SLOW_SAVES)
    monkeypatch.setenv("FAULT_DIR", str(run_dir))
    process = start(launch(*tiny("run", *WORDS)), fault="pause 0 6")
    wait_for_step(process, run_dir, 5)
    ask_to_stop(run_dir, "the test")
    out, err = process.communicate(timeout=200)
    assert process.returncode == RunEnd.PREEMPTED, err
    assert "saved in" in out
    marker = read_marker(run_dir)
    assert marker is not None
    assert marker.step is not None
    steps = sorted({*range(4, marker.step + 1, 4), marker.step})
    assert len(steps) > 1
    assert saved(run_dir) == ["latest", *(f"step_{step:08d}" for step in steps)]
    assert [event["step"] for event in saves(run_dir)] == steps


@pytest.mark.slow
def test_disk_that_is_full_for_a_while_costs_no_step(tiny: TinyWords, tmp_path: Path) -> None:
    """No save is due meanwhile, so training continues, and pending lines are written later."""
    with small_disk(tmp_path / "disk", kibibytes=1024) as disk:
        run_dir = disk / "run"
        words = (*WORDS[:1], f"train.run_dir={run_dir}", "train.save_interval=0", "train.eval_interval=0")
        process = start(launch(*tiny("run", *words, "train.steps=60", "train.async_save=false")))
        wait_for_step(process, run_dir, 3)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
        while not process.poll() and (line := process.stdout.readline()):  # type: ignore[union-attr]
            if "training goes on" in line:
                break
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert "metrics.jsonl can be written again" in out
        assert [entry["step"] for entry in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 61))
        assert "Traceback" not in (run_dir / "logs" / "rank-0.log").read_text()


@pytest.mark.slow
def test_full_disk_ends_the_run_with_one_error_and_it_goes_on_with_more_room(tiny: TinyWords, tmp_path: Path) -> None:
    """A disk with space for one checkpoint but not for two."""
    with small_disk(tmp_path / "disk", kibibytes=1040) as disk:
        run_dir = disk / "run"
        words = tiny("run", *WORDS, f"train.run_dir={run_dir}", "train.async_save=false")
        finished = run(launch(*words))
        assert finished.code == RunEnd.DISK_ERROR, finished.err
        for part in ("KiB for a checkpoint, but its disk has", "free some space", "train.keep_last", "train.run_dir"):
            assert part in finished.err
        assert len(finished.err.splitlines()) == 1, finished.err
        marker = read_marker(run_dir)
        assert marker is not None
        assert marker.end is RunEnd.DISK_ERROR
        assert saved(run_dir) == ["latest", "step_00000004"]
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        again = run(launch(*words)).require_success()
        assert "resuming after step 4 " in again.out
        assert saved(run_dir) == ["latest", "step_00000004", "step_00000008", "step_00000012"]
        assert [event["step"] for event in saves(run_dir)] == [4, 8, 12]
        assert all(event["stall_seconds"] == event["total_seconds"] for event in saves(run_dir)), "training waits"
