"""What a run folder remembers of its jobs."""

from __future__ import annotations

from pathlib import Path

from launch.slurm import records


def test_newest_checkpoint_is_a_complete_one(tmp_path: Path) -> None:
    assert records.newest_checkpoint(tmp_path) is None
    for name in ("step_00000020", "step_00000100", ".step_00000200.tmp", "step_00000300.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert records.newest_checkpoint(tmp_path) == 100


def test_submissions_and_attempts(tmp_path: Path) -> None:
    assert records.submissions(tmp_path) == []
    records.record_submission(tmp_path, [3, 4])
    records.record_submission(tmp_path, [7])
    assert records.submissions(tmp_path) == [[3, 4], [7]]
    records.record_begin(tmp_path, job=3, restart=1, nodes=["n1", "n2"])
    records.record_end(tmp_path, job=3, end=None, requeued=True, advanced=False, reason="killed")
    records.record_begin(tmp_path, job=7, restart=0, nodes=["n3"])
    assert [entry.nodes for entry in records.attempts(tmp_path, "begin")] == [["n1", "n2"], ["n3"]]
    (end,) = records.attempts(tmp_path, "end", 3)
    assert (end.requeued, end.end, end.checkpoint) == (True, None, None)
