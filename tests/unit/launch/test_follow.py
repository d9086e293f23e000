"""What `python -m launch status|logs|cancel|requeue` says of runs of this machine; jobs: integration/test_slurm.py."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main
from launch.slurm import records
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import freeze
from megatron_lite.errors import RunEnd
from megatron_lite.observe.heartbeat import node_name
from megatron_lite.observe.markers import STOP_FILE, leave_marker
from tests.unit.launch.holding import held as held_folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    freeze(resolve(compose("pretrain_gpt", ["train.steps=200"]), device="cpu"), path)
    (path / "logs").mkdir()
    return path


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def held(run_dir: Path) -> Iterator[None]:
    """A launcher is at work in the folder."""
    with held_folder(run_dir):
        yield


def test_run_on_another_machine(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    """Nobody here can look at its process, so its heartbeat decides."""
    with held_folder(run_dir):
        (path,) = (run_dir / "lock").glob("*.json")
        there = json.loads(path.read_text()) | {"host": "n7", "machine": "n7", "pid": 99}
        path.write_text(json.dumps(there))
        fields = fields_of(capsys, run_dir)
        assert (fields["state"], fields["process"][:21]) == ("running", "99 on n7 (rank 0) sin")
        (run_dir / "job.sh").touch()
        assert "is in use by process 99 on n7" in error_of(capsys, "requeue", str(run_dir))
        os.utime(path, (1e9, 1e9))
        assert "process" not in fields_of(capsys, run_dir)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def fields_of(capsys: pytest.CaptureFixture[str], run_dir: Path) -> dict[str, str]:
    assert main(["status", str(run_dir)]) == 0
    return {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}


def test_run_that_has_not_begun(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    assert fields_of(capsys, run_dir) == {
        "run folder": str(run_dir),
        "state": "not running; no attempt has left word of its end",
        "progress": "step 0 of 200",
        "checkpoint": "none",
    }


def test_run_that_was_stopped(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 4.25, "tokens_per_second": 5559.4}) for step in (39, 40)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    (run_dir / "checkpoints" / "step_00000040").mkdir(parents=True)
    leave_marker(run_dir, RunEnd.PREEMPTED, "SIGTERM", 40)
    fields = fields_of(capsys, run_dir)
    assert fields["state"] == "PREEMPTED at step 40: asked to stop; it has saved and can go on (SIGTERM)"
    assert fields["progress"] == "step 40 of 200, loss 4.25, 5,559 tokens/s"
    assert fields["checkpoint"] == "step 40"


def test_run_of_this_machine(capsys: pytest.CaptureFixture[str], run_dir: Path, held: None) -> None:
    fields = fields_of(capsys, run_dir)
    who = f"{os.getpid()} on {node_name()} (rank 0) since "
    assert fields["state"] == "running"
    assert fields["process"].startswith(who)
    assert main(["cancel", str(run_dir)]) == 0
    assert capsys.readouterr().out.startswith(f"asked process {who}")
    assert (run_dir / STOP_FILE).exists()


@pytest.mark.parametrize("end", RunEnd)
def test_every_end_has_words(capsys: pytest.CaptureFixture[str], run_dir: Path, end: RunEnd) -> None:
    leave_marker(run_dir, end, "")
    assert fields_of(capsys, run_dir)["state"].startswith(f"{end.name}: ")


def test_logs_of_the_rank_that_failed(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    for rank in (0, 3):
        (run_dir / "logs" / f"rank-{rank}.log").write_text(f"I am {rank}\n")
    leave_marker(run_dir, RunEnd.FAILED, "rank 3: ValueError: no")
    assert main(["logs", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"== {run_dir}/logs/rank-3.log\nI am 3\n"


def test_logs_are_followed_to_the_end(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    (run_dir / "logs" / "rank-0.log").write_text("one\ntwo\n")
    assert main(["logs", "--follow", str(run_dir)]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_wrong_words(capsys: pytest.CaptureFixture[str], tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = tmp_path / "empty"
    assert {
        error_of(capsys, "status"),
        error_of(capsys, "status", "a", "b"),
        error_of(capsys, "logs", f"{tmp_path}/none"),
        error_of(capsys, "cancel", str(empty)),
        error_of(capsys, "cancel", "--follow", str(run_dir)),
        error_of(capsys, "status", "--all", str(run_dir)),
        error_of(capsys, "logs", str(run_dir)),
        error_of(capsys, "cancel", str(run_dir)),
        error_of(capsys, "requeue", str(run_dir)),
    } == {
        "error: `python -m launch status` needs one run folder, not 0; write runs/NAME\n",
        "error: `python -m launch status` needs one run folder, not 2; write runs/NAME\n",
        f"error: {tmp_path}/none is not a folder; give the run folder that the launcher has named\n",
        f"error: {empty} holds no run: there is no config-*.yaml in it; give a run folder\n",
        "error: --follow belongs to `python -m launch logs`; leave it out\n",
        "error: --all is not an option of `python -m launch status`; leave it out\n",
        f"error: {run_dir} has no logs: no rank has started yet; see `python -m launch status {run_dir}`\n",
        f"error: nothing of {run_dir} waits or runs, so there is nothing to cancel; see `python -m launch status "
        f"{run_dir}`\n",
        f"error: {run_dir} has no job.sh: launcher=slurm has not submitted it; start it as before, and it goes on from "
        "its newest checkpoint\n",
    }


def test_jobs_without_slurm(capsys: pytest.CaptureFixture[str], run_dir: Path, no_slurm: None) -> None:
    records.record_submission(run_dir, [12])
    assert fields_of(capsys, run_dir)["jobs"] == "no slurm answers on this machine"
    assert error_of(capsys, "cancel", str(run_dir)) == (
        "error: slurm's `squeue` is not on this machine; log in to the cluster (--dry-run shows the job anywhere)\n"
    )


def test_what_is_done_is_not_requeued(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    (run_dir / "job.sh").touch()
    leave_marker(run_dir, RunEnd.DONE, "", 200)
    assert error_of(capsys, "requeue", str(run_dir)) == (
        f"error: {run_dir} is done at step 200; to go on, submit it with more train.steps\n"
    )
