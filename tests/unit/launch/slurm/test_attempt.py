"""What the batch script calls around srun, with a Slurm that only takes notes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.slurm import attempt, records, scheduler
from launch.slurm.verdict import NOTHING_LEFT
from megatron_lite.errors import LaunchError, RunEnd
from megatron_lite.observe.markers import ask_to_stop, leave_marker, read_marker
from tests.unit.launch.holding import held

JOB = 12


class Notes:
    """Answers for a partition of n1 to n4, in which n1 and n2 are the job's."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.states = dict.fromkeys(("n1", "n2", "n3", "n4"), "idle")
        self.refuses: tuple[str, ...] = ()

    def requeue(self, job: int) -> None:
        self.note("requeue", job, signal.getsignal(signal.SIGTERM))

    def exclude(self, job: int, nodes: list[str]) -> None:
        self.note("exclude", job, nodes)

    def note(self, *call: object) -> None:
        if call[0] in self.refuses:
            raise LaunchError("slurm refuses it")
        self.calls.append(call)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    notes = Notes()
    monkeypatch.setattr(scheduler, "requeue", notes.requeue)
    monkeypatch.setattr(scheduler, "exclude", notes.exclude)
    monkeypatch.setattr(scheduler, "excluded", lambda job: [])
    monkeypatch.setattr(scheduler, "node_states", lambda partition: notes.states)
    monkeypatch.setattr(scheduler, "host_names", lambda nodes: ["n1", "n2"])
    for name, value in (("JOB_ID", str(JOB)), ("JOB_NODELIST", "n[1-2]"), ("JOB_PARTITION", "main")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = signal.getsignal(signal.SIGTERM)
    yield notes
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def end(run_dir: Path, code: int = 1, terminated: int = 0) -> int:
    return attempt.main(["end", str(run_dir), str(code), str(terminated), "--max-requeues=9", "--max-stalled=1"])


def begin(run_dir: Path) -> int:
    return attempt.main(["begin", str(run_dir)])


REQUEUE = ("requeue", JOB, signal.SIG_IGN)  # from there on Slurm sends SIGTERM, and the exclusion is still to come


def test_begin_makes_the_folder_ready(slurm: Notes, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_marker(run_dir, RunEnd.HUNG, "")
    ask_to_stop(run_dir)
    (run_dir / "hang.json").write_text("{}")
    (run_dir / "logs" / "error.txt").write_text("old")
    assert begin(run_dir) == 0
    assert capsys.readouterr().out == "job 12: attempt 1 on n1, n2; newest checkpoint: none\n"
    assert {path.name for path in run_dir.iterdir()} == {"logs", "jobs.jsonl", "attempts.jsonl", "lock"}
    assert not list((run_dir / "logs").iterdir())
    assert records.submissions(run_dir) == [[JOB]]  # somebody typed `sbatch job.sh`


def test_second_job_in_one_folder_does_not_begin(
    slurm: Notes, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_marker(run_dir, RunEnd.FAILED, "of the run that holds the folder")
    monkeypatch.setenv("SLURM_JOB_ID", str(JOB - 1))
    with held(run_dir):
        monkeypatch.setenv("SLURM_JOB_ID", str(JOB))
        assert begin(run_dir) == 2
        assert "job 12: error: train.run_dir=" in (out := capsys.readouterr().out)
        assert "is in use by process" in out
        assert read_marker(run_dir) is not None
        assert end(run_dir) == 2
    assert slurm.calls == []


def test_run_that_is_done_is_not_begun_again(slurm: Notes, run_dir: Path) -> None:
    leave_marker(run_dir, RunEnd.DONE, "", 5)
    assert begin(run_dir) == NOTHING_LEFT
    (run_dir / "DONE").write_text("")
    assert begin(run_dir) == 0, "an empty file says nothing"


def test_preempted_goes_back(slurm: Notes, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run_dir)
    (run_dir / "checkpoints" / "step_00000040").mkdir(parents=True)
    leave_marker(run_dir, RunEnd.PREEMPTED, "SIGTERM", 40)
    assert end(run_dir) == 75
    assert slurm.calls == [REQUEUE]
    assert capsys.readouterr().out.endswith(
        "job 12: PREEMPTED at step 40: SIGTERM; requeued, 1 of at most 9; newest checkpoint: step 40\n"
    )


def test_node_of_a_hang_is_excluded(slurm: Notes, run_dir: Path) -> None:
    begin(run_dir)
    leave_marker(run_dir, RunEnd.HUNG, "rank 1 hangs")
    (run_dir / "hang.json").write_text(json.dumps({"node": "n2.example"}))
    end(run_dir)
    assert slurm.calls == [REQUEUE, ("exclude", JOB, ["n2"])]


def test_too_few_nodes_to_exclude_one(slurm: Notes, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run_dir)
    slurm.states = {"n1": "idle", "n2": "down*", "n3": "drained"}
    end(run_dir)
    assert slurm.calls == [REQUEUE]
    assert "job 12: n2 not excluded: of its partition's nodes 1 would be left, and the job needs 2\n" in (
        capsys.readouterr().out
    )


def test_node_that_slurm_has_lost_is_excluded_from_the_job_that_it_requeues(slurm: Notes, run_dir: Path) -> None:
    begin(run_dir)
    slurm.states["n2"] = "down"
    assert end(run_dir, terminated=1) == 143
    assert slurm.calls == [("exclude", JOB, ["n2"])]
    slurm.refuses = ("exclude",)  # the job was cancelled
    assert end(run_dir, terminated=1) == 143


def test_limits_count_this_job_and_forget_progress(slurm: Notes, run_dir: Path) -> None:
    def fails(save: Callable[[], None] = lambda: None) -> bool:
        slurm.calls.clear()
        begin(run_dir)
        save()
        end(run_dir, code=137)
        return slurm.calls == [REQUEUE]

    assert fails()  # the first without a checkpoint may be an accident
    assert fails(lambda: (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True))
    assert fails()
    assert not fails()


def test_a_rollback_is_progress(slurm: Notes, run_dir: Path) -> None:
    for step in (20, 30):
        (run_dir / "checkpoints" / f"step_{step:08}").mkdir(parents=True)
    begin(run_dir)
    (run_dir / "checkpoints" / "step_00000030").rmdir()
    end(run_dir, code=137)
    assert records.attempts(run_dir, "end")[-1].advanced


def test_refusal_is_reported(slurm: Notes, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run_dir)
    slurm.refuses = ("requeue",)
    leave_marker(run_dir, RunEnd.PREEMPTED, "", 3)
    assert end(run_dir) == 2
    assert capsys.readouterr().out.endswith(
        f"job 12: error: slurm refuses it; `python -m launch requeue {run_dir}` submits it again\n"
    )


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_a_job_is_reported(
    slurm: Notes, run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(name)
    assert begin(run_dir) == end(run_dir) == 2
    said = (
        f"error: {name} is not set, as Slurm does within a job; `python -m launch requeue {run_dir}` submits it again"
    )
    assert capsys.readouterr().out.count(said) == 2


def test_an_invalid_count_of_restarts_stops_no_job(
    slurm: Notes, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "two")
    assert begin(run_dir) == 0


@pytest.mark.parametrize(("links", "code"), [([[11, JOB]], 81), ([[11], [JOB]], 0), ([[JOB]], 0)])
def test_later_links_end_with_the_chain(slurm: Notes, run_dir: Path, links: list[list[int]], code: int) -> None:
    """A link knows the links before it; who submits anew means it."""
    for jobs in links:
        records.record_submission(run_dir, jobs)
    leave_marker(run_dir, RunEnd.DIVERGED, "the loss is nan", 7)
    records.record_end(run_dir, job=links[0][0], end="DIVERGED", requeued=False, advanced=True, reason="")
    assert begin(run_dir) == code
    assert (read_marker(run_dir) is None) == (code == 0)
