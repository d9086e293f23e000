"""Damage any file of a run folder in any way: no command ends in a traceback, and no unattended job stops for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.cli import main
from launch.slurm import attempt, records, scheduler
from megatron_lite.data.samples.skips import read_rollbacks, rollbacks_to_go_on_with
from megatron_lite.errors import MegatronLiteError, RunEnd
from megatron_lite.observe.heartbeat import Beat, publish, read_beats
from megatron_lite.observe.markers import ask_to_stop, leave_marker
from megatron_lite.observe.run_lock import Role, holder_of, take
from tests.unit.observe.synthetic_run import SyntheticRun

JOB = 12
FOREIGN = ('{"a": [1, 2], "step": "x", "event": 7, "time": []}', "[]", '"text"', "{}", "[" * 100_000)


def make_run(path: Path) -> None:
    """Everything that runs, launchers and jobs leave, with an attempt that was stopped and had saved."""
    run = SyntheticRun(path, steps=30)
    run.begin()
    run.train(1, 12, spikes={12: 4.1})
    run.spike(12, checkpoint=10)
    run.save(10)
    run.roll_back(12, 10)
    run.train(11, 25)
    run.close()
    (path / "logs").mkdir()
    (path / "logs" / "error.txt").write_text("error: of a rank\n")
    (path / "logs" / "rank-0.log").write_text("a line\n")
    (path / "logs" / f"slurm-{JOB}.out").write_text("a line\n")
    (path / "logs" / "heartbeats").mkdir()
    publish(path / "logs" / "heartbeats", Beat(0, "n1", 7, 0, 0, 0, "forward", 1, 5, 3, 0.1, None, "x:1 f", 1e9))
    (path / "checkpoints" / "step_00000010").mkdir(parents=True)
    records.record_submission(path, [JOB])
    records.record_begin(path, job=JOB, restart=0, nodes=["n1", "n2"])
    (path / "checkpoints" / "step_00000020").mkdir()
    (path / "job.sh").write_text("#!/bin/bash\n")
    (path / "hang.json").write_text(json.dumps({"node": "n2"}))
    (path / "wandb").mkdir()
    (path / "wandb" / "run-id").write_text("a1b2\n")
    leave_marker(path, RunEnd.PREEMPTED, "SIGTERM at rank 0", 20)
    ask_to_stop(path, "the time limit")
    take(path, Role.rank, "a").release()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged") / "original"
    make_run(path)
    return path


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Jobs that go back into the queue."""
    requeued: list[int] = []
    monkeypatch.setattr(scheduler, "requeue", requeued.append)
    monkeypatch.setattr(scheduler, "exclude", lambda job, nodes: None)
    monkeypatch.setattr(scheduler, "excluded", lambda job: [])
    monkeypatch.setattr(scheduler, "node_states", lambda partition: dict.fromkeys(("n1", "n2", "n3"), "idle"))
    monkeypatch.setattr(scheduler, "host_names", lambda nodes: ["n1", "n2"])
    monkeypatch.setenv("PATH", "/nowhere")  # a Slurm that is installed here would be asked
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")  # 4 MB of each page
    for name, value in (("JOB_ID", str(JOB)), ("JOB_NODELIST", "n[1-2]"), ("JOB_PARTITION", "main")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    return requeued


def write(content: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": write(b""),
    "zeroed": zeroed,
    "cut": cut,
    "not UTF-8": write(b"\xff\xfe{\x80}\n"),
    "folder": replaced(lambda path: path.mkdir()),
    "unreadable": replaced(lambda path: path.symlink_to(path)),
    "pipe": replaced(os.mkfifo),
    **{f"foreign {number}": write(text + "\n") for number, text in enumerate(FOREIGN)},
}
DRAWN = ("cut", "folder", "foreign 0")
REPORTED = ("metrics.jsonl", "rolled_back.jsonl", "events.jsonl", "skipped_samples.json", "attempts.jsonl", "PREEMPTED")


def files_of(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file())


def require_answers(run_dir: Path, original: Path, name: str, *, draws: bool = True) -> None:
    """Every command ends with an exit code. Drawing costs a third of a second each time."""
    for command in ("status", "logs", "cancel", "requeue"):
        assert main([command, str(run_dir)]) in (0, 2), command
    if draws and (name in REPORTED or name.startswith(("config", "spikes"))):
        assert main(["report", str(run_dir)]) in (0, 2)
        assert main(["compare", str(run_dir), str(original)]) in (0, 1, 2)
    if name == "skipped_samples.json":
        assert [one.window.first for one in rollbacks_to_go_on_with(run_dir)] in ([320], [])
    for read in (
        lambda: read_beats(run_dir / "logs" / "heartbeats", 2),
        lambda: holder_of(run_dir),
        lambda: read_rollbacks(run_dir),
    ):
        try:
            read()
        except MegatronLiteError:
            continue


def require_requeue(run_dir: Path, requeued: list[int]) -> None:
    """The attempt has saved, so the job goes back into the queue and begins again."""
    requeued.clear()
    attempt.main(["end", str(run_dir), "1", "0", "--max-requeues=9", "--max-stalled=0"])
    assert requeued == [JOB]
    assert attempt.main(["begin", str(run_dir)]) == 0
    (begun,) = records.attempts(run_dir, "begin", JOB)[-1:]
    assert begun.checkpoint in (10, 20)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(
    damage: str, original: Path, tmp_path: Path, slurm: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_lite.observe.run_lock.STALE_SECONDS", 0.0)
    for number, name in enumerate(files_of(original)):
        run_dir = tmp_path / str(number)
        shutil.copytree(original, run_dir)
        DAMAGES[damage](run_dir / name)
        require_answers(run_dir, original, name, draws=damage in DRAWN)
        require_requeue(run_dir, slurm)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("missing", "cut")])
def test_damaged_marker_of_an_end_that_did_not_happen(
    damage: str, original: Path, tmp_path: Path, slurm: list[int]
) -> None:
    """A crash of a filesystem can leave files of any name, DONE and CONFIG_ERROR included."""
    for end in RunEnd:
        run_dir = tmp_path / end.name
        shutil.copytree(original, run_dir)
        (run_dir / end.name).write_text("x")
        DAMAGES[damage](run_dir / end.name)
        require_requeue(run_dir, slurm)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bit(
    data: st.DataObject,
    original: Path,
    tmp_path_factory: pytest.TempPathFactory,
    slurm: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_lite.observe.run_lock.STALE_SECONDS", 0.0)
    name = data.draw(st.sampled_from(files_of(original)))
    content = bytearray((original / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    run_dir = tmp_path_factory.mktemp("flipped") / "run"
    shutil.copytree(original, run_dir)
    (run_dir / name).write_bytes(content)
    require_answers(run_dir, original, name)
    if name not in ("attempts.jsonl", "PREEMPTED"):  # a flipped bit there can be another truth
        require_requeue(run_dir, slurm)
    shutil.rmtree(run_dir.parent)


def test_torn_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "attempts.jsonl").write_text('{"event": "begin", "jo')
    records.record_begin(tmp_path, job=JOB, restart=3, nodes=["n1"])
    assert [entry.restart for entry in records.attempts(tmp_path, "begin", JOB)] == [3]
    assert (tmp_path / "attempts.jsonl").read_bytes().count(b"\n") == 2


def test_requeues_whose_records_are_lost_still_count(original: Path, tmp_path: Path, slurm: list[int]) -> None:
    """Else a job whose records cannot be written would come back for ever."""
    for restart, goes_back in ((8, True), (9, False)):
        run_dir = tmp_path / str(restart)
        shutil.copytree(original, run_dir)
        (run_dir / "attempts.jsonl").unlink()
        os.environ["SLURM_RESTART_COUNT"] = str(restart)
        slurm.clear()
        try:
            attempt.main(["end", str(run_dir), "1", "0", "--max-requeues=10", "--max-stalled=0"])
        finally:
            del os.environ["SLURM_RESTART_COUNT"]
        assert (slurm == [JOB]) == goes_back
