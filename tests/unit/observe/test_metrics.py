"""JSONL that survives kills and replays."""

import json
import math
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from megatron_lite.observe import metrics_writer
from megatron_lite.observe.metrics import ROLLED_BACK_FILE, newest_entries, read_metrics
from megatron_lite.observe.metrics_writer import EventWriter, MetricsWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write_steps(path: Path, steps: range, loss: float, resume_step: int = 0) -> None:
    writer = MetricsWriter(path, resume_step)
    for step in steps:
        writer.write(step, {"loss": loss})
    writer.close()


def test_one_line_a_step_visible_at_once(path: Path) -> None:
    writer = MetricsWriter(path)
    writer.write(1, {"loss": 2.5, "name": "x", "list": [1, 2]})
    assert path.read_text() == '{"step": 1, "loss": 2.5, "name": "x", "list": [1, 2]}\n'


def test_replayed_steps_stand_once(path: Path) -> None:
    write_steps(path, range(1, 11), loss=1.0)
    write_steps(path, range(7, 13), loss=2.0, resume_step=6)
    entries = read_metrics(path)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert [entry["loss"] for entry in entries] == [1.0] * 6 + [2.0] * 6
    assert not list(path.parent.glob("*.tmp"))


def test_fresh_start_begins_an_empty_file(path: Path) -> None:
    write_steps(path, range(1, 4), loss=1.0)
    write_steps(path, range(1, 2), loss=2.0)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_resume_at_the_last_step_leaves_the_file_alone(path: Path) -> None:
    write_steps(path, range(1, 4), loss=1.0)
    before = path.stat().st_ino
    write_steps(path, range(4, 5), loss=1.0, resume_step=3)
    assert path.stat().st_ino == before
    assert len(read_metrics(path)) == 4


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}', b"\xff\xfe\n", b"[1]\n", b"\n"])
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes) -> None:
    write_steps(path, range(1, 3), loss=1.0)
    with path.open("ab") as file:
        file.write(torn)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
    write_steps(path, range(3, 4), loss=1.0, resume_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_nan_and_infinity_stay_valid_json(path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    writer = MetricsWriter(path)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "nested": {"low": [-math.inf]}})
    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "nested": {"low": ["-Infinity"]}}
    (entry,) = read_metrics(path)
    assert math.isnan(entry["loss"])
    assert (entry["grad_norm"], entry["nested"]) == (math.inf, {"low": [-math.inf]})


def test_numbers_of_numpy_and_torch(path: Path) -> None:
    MetricsWriter(path).write(
        1, {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.int64(3), "d": torch.tensor(math.inf)}
    )
    assert read_metrics(path) == [{"step": 1, "a": 0.5, "b": 2, "c": 3, "d": math.inf}]


def branch(path: Path, steps: range, rollbacks: int) -> None:
    writer = MetricsWriter(path, steps.start - 1, rollbacks)
    for step in steps:
        writer.write(step, {"loss": 1.0, "rollbacks": rollbacks})
    writer.close()


def places(path: Path) -> list[tuple[int, int]]:
    return [(entry["rollbacks"], entry["step"]) for entry in read_metrics(path)]


def test_a_rollback_keeps_what_it_takes_back(path: Path) -> None:
    writer = MetricsWriter(path)
    for step in range(1, 6):
        writer.write(step, {"rollbacks": 0, "loss": math.nan})
    writer.rewind(3, 1)
    writer.write(4, {"rollbacks": 1})
    writer.rewind(2, 2)
    writer.write(3, {"rollbacks": 2})
    writer.close()
    assert places(path) == [(0, 1), (0, 2), (2, 3)]
    aside = path.with_name(ROLLED_BACK_FILE)
    assert places(aside) == [(0, 4), (0, 5), (0, 3), (1, 4)]
    assert math.isnan(read_metrics(aside)[0]["loss"])


@pytest.mark.parametrize("killed_before", ["set aside", "shortened", "rewind"])
def test_a_kill_within_a_rollback_loses_and_doubles_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    branch(path, range(1, 6), rollbacks=0)
    if killed_before != "rewind":
        step = "replace_file" if killed_before == "set aside" else "shorten"
        writer = MetricsWriter(path, 5)
        with monkeypatch.context() as patch:
            patch.setattr(metrics_writer, step, Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                writer.rewind(3, 1)
        assert path.with_name(ROLLED_BACK_FILE).exists() == (killed_before == "shortened")
    branch(path, range(4, 7), rollbacks=1)
    assert places(path) == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6)]
    assert places(path.with_name(ROLLED_BACK_FILE)) == [(0, 4), (0, 5)]


def test_a_replay_within_a_branch_is_no_rollback(path: Path) -> None:
    branch(path, range(1, 6), rollbacks=1)
    branch(path, range(3, 7), rollbacks=1)
    assert places(path) == [(1, step) for step in range(1, 7)]
    assert not path.with_name(ROLLED_BACK_FILE).exists()


def test_missing_file_has_no_metrics(path: Path) -> None:
    assert read_metrics(path) == []


def test_events_are_a_history(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for attempt in (1, 2):
        writer = EventWriter(path)
        writer.write("start", 0, {"attempt": attempt})
        writer.close()
        with path.open("ab") as file:
            file.write(b'{"event": "sa')  # killed while writing
    assert [(entry["event"], entry["attempt"]) for entry in read_metrics(path)] == [("start", 1), ("start", 2)]
    assert all(entry["time"].endswith("+00:00") for entry in read_metrics(path))


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "nothing"])
def test_what_is_not_a_regular_file_has_no_lines_and_does_not_block(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: os.symlink(path, path)}
    if kind != "nothing":
        make[kind](path)
    assert [*read_metrics(path), *newest_entries(path)] == []
    assert capsys.readouterr().err.count("it counts as empty") == (0 if kind == "nothing" else 2)
