"""Lines on a disk that is full, fails or is away for a while: whole, in order, once each."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.errors import ConfigError, DiskError, RunEnd, TrainingError, disk_error, end_of
from megatron_lite.observe import line_writer
from megatron_lite.observe.console import Forgiving
from megatron_lite.observe.line_writer import LineWriter
from megatron_lite.observe.markers import RESERVE_FILE, leave_marker, read_marker, reserve_space
from megatron_lite.observe.metrics import read_metrics
from megatron_lite.observe.metrics_writer import EventWriter, MetricsWriter
from tests.mounts import small_disk


class Disk:
    """In place of `os.write`: takes `room` bytes, then what it says; files only, by their descriptors."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.error = errno.ENOSPC
        self.write = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room is None:
            return self.write(descriptor, data)
        if self.room == 0:
            raise OSError(self.error, os.strerror(self.error))
        taken = self.write(descriptor, data[: self.room])
        self.room -= taken
        return taken


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.text(max_size=30), st.none() | st.integers(0, 60)), max_size=12),
    error=st.sampled_from([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EACCES]),
)
def test_any_line_on_any_disk(
    steps: list[tuple[str, int | None]], error: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At each moment the file holds whole lines, the first ones; once there is room, all of them."""
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    disk, told = Disk(), list[str]()
    disk.error = error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_writer.os, "write", disk)
        writer = LineWriter(path, told.append)
        written = [json.dumps(text) + "\n" for text, _ in steps]
        for line, (_, room) in zip(written, steps, strict=True):
            disk.room = room
            writer.write(line)
            content = path.read_bytes()
            assert "".join(written).encode().startswith(content)
            assert content in (b"", *("".join(written[: n + 1]).encode() for n in range(len(written))))
        disk.room = None
        assert writer.flush()
        writer.close()
    assert path.read_text() == "".join(written)
    warnings = [line for line in told if line.startswith("warning")]
    assert len(told) == 2 * len(warnings), "one word when lines begin to wait, and one when they are written"


def test_memory_is_bounded_and_the_oldest_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = Disk(), list[str]()
    monkeypatch.setattr(line_writer.os, "write", disk)
    monkeypatch.setattr(line_writer, "MOST_BYTES", 30)
    writer = LineWriter(tmp_path / "file", told.append)
    disk.room = 0
    for number in range(10):
        writer.write(f"line {number}\n")
    disk.room = None
    writer.write("the last\n")
    assert (tmp_path / "file").read_text() == "line 7\nline 8\nline 9\nthe last\n"
    assert told[1].endswith("3 lines have waited in memory; 7 lines before them are lost")


def test_end_on_a_full_disk_says_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = Disk(), list[str]()
    monkeypatch.setattr(line_writer.os, "write", disk)
    writer = LineWriter(tmp_path / "file", told.append)
    disk.room = 3
    writer.write("a line\n")
    writer.close()
    assert told[-1] == f"warning: 1 line of {tmp_path / 'file'} could not be written and is lost"
    assert (tmp_path / "file").read_text() == ""


def fill(path: Path) -> None:
    """Until nothing more fits."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_metrics_events_and_the_log_of_a_full_disk(tmp_path: Path) -> None:
    """A real one: nothing raises, the marker finds its place, and with more room nothing is missing."""
    with small_disk(tmp_path / "disk", kibibytes=256) as disk:
        told: list[str] = []
        reserve_space(disk)
        metrics, events = MetricsWriter(disk / "metrics.jsonl", report=told.append), EventWriter(disk / "events.jsonl")
        log = os.open(disk / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        fill(disk / "filler")
        for step in range(1, 40):
            metrics.write(step, {"loss": 1.0, "layer_grad_norm": dict.fromkeys(map(str, range(40)), 0.5)})
            events.write("save", step, {"folder": "x" * 300})
            Forgiving(log).write("a line of a log\n" * 100)
        assert len(told) == 1
        leave_marker(disk, RunEnd.DISK_ERROR, "full", 39)
        marker = read_marker(disk)
        assert marker is not None
        assert marker.end is RunEnd.DISK_ERROR
        assert not (disk / RESERVE_FILE).exists()
        (disk / "filler").unlink()
        metrics.write(40, {"loss": 2.0})
        events.write("finish", 40, {})
        assert [entry["step"] for entry in read_metrics(disk / "metrics.jsonl")] == list(range(1, 41))
        assert [entry["step"] for entry in read_metrics(disk / "events.jsonl")] == list(range(1, 41))
        metrics.close()
        events.close()
        os.close(log)


@pytest.mark.parametrize("rollbacks", [0, 1])
def test_a_resume_on_a_full_disk_shortens_what_it_has_to(rollbacks: int, tmp_path: Path) -> None:
    """Lines beyond the checkpoint, damaged ones in between and a torn last one go without a byte of room."""
    with small_disk(tmp_path / "disk", kibibytes=1024) as disk:
        lines = [f'{{"step": {step}, "loss": 1.5, "rollbacks": {rollbacks}}}\n' for step in range(1, 4001)]
        lines[99] = "\0" * 60 + "\n"
        (disk / "metrics.jsonl").write_text("".join(lines) + '{"step": 4001, "lo')
        (disk / "events.jsonl").write_text("".join([*lines[:5], "damaged\n", *lines[5:9]]) + '{"event": "sa')
        fill(disk / "filler")
        metrics = MetricsWriter(disk / "metrics.jsonl", resume_step=3000, rollbacks=rollbacks)
        events = EventWriter(disk / "events.jsonl")
        assert [entry["step"] for entry in read_metrics(disk / "metrics.jsonl")] == [*range(1, 100), *range(101, 3001)]
        assert (disk / "events.jsonl").read_text() == "".join(lines[:9])
        assert events.damaged == 1
        assert {path.name for path in disk.iterdir()} == {"metrics.jsonl", "events.jsonl", "filler"}
        metrics.write(3001, {"loss": 1.0})
        assert metrics.logged(3001).lines == 3000
        metrics.close()
        events.close()


@pytest.mark.parametrize("has_room_again", [True, False])
def test_a_rollback_on_a_full_disk_takes_back_what_it_has_to_once_there_is_room(
    has_room_again: bool, tmp_path: Path
) -> None:
    """Two in a row: the lines of the steps up to each, those taken back and those that follow all wait. Killed before,
    the next attempt finds all that was on the disk."""
    with small_disk(tmp_path / "disk", kibibytes=256) as disk:
        told: list[str] = []
        path = disk / "metrics.jsonl"
        writer = MetricsWriter(path, report=told.append)
        for step in range(1, 201):
            writer.write(step, {"loss": 1.5})
        assert writer.logged(150) is not None  # as of a checkpoint
        fill(disk / "filler")
        for step in range(201, 401):  # some of them wait
            writer.write(step, {"loss": 1.5})
        writer.rewind(300, 1)
        for step in range(301, 311):
            writer.write(step, {"loss": 2.5, "rollbacks": 1})
        writer.rewind(250, 2)
        for step in range(251, 261):
            writer.write(step, {"loss": 3.5, "rollbacks": 2})
        assert writer.logged(260) is None, "a checkpoint needs room as well"
        assert len(told) == 1, told
        if has_room_again:
            (disk / "filler").unlink()
            writer.write(261, {"loss": 3.5, "rollbacks": 2})
            logged = writer.logged(261)
            assert logged is not None
            assert logged.lines == 261
            writer.close()
            aside = [(entry.get("rollbacks", 0), entry["step"]) for entry in read_metrics(disk / "rolled_back.jsonl")]
            assert aside == [(0, step) for step in (*range(301, 401), *range(251, 301))] + [
                (1, step) for step in range(301, 311)
            ]
            assert [entry["step"] for entry in read_metrics(path)] == list(range(1, 262))
        else:
            writer.close()
            assert f"warning: 20 lines of {path} could not be written; a resume repeats them" in told
            steps = [entry["step"] for entry in read_metrics(path)]
            assert steps == list(range(1, len(steps) + 1))
            assert len(steps) >= 200


def test_log_that_lost_something_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    stream = Forgiving(log)
    monkeypatch.setattr("megatron_lite.observe.console.os.write", disk)
    disk.room = 2
    stream.write("abcd\n")
    disk.room = None
    stream.write("more\n")
    os.close(log)
    assert (tmp_path / "log").read_text() == "ab\n--- 3 bytes could not be written here ---\nmore\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS])
def test_whatever_the_disk_causes_ends_as_its_error(number: int) -> None:
    cause = OSError(number, os.strerror(number), "/runs/x/file")
    assert end_of(cause) is RunEnd.DISK_ERROR
    wrapped = ConfigError("train.run_dir=/runs/x cannot be written")
    wrapped.__cause__ = cause
    outer = TrainingError("no")
    outer.__cause__ = wrapped
    assert end_of(outer) is RunEnd.DISK_ERROR
    explained = disk_error(cause)
    assert explained is not None
    assert "/runs/x/file" in str(explained)


def test_other_errors_end_as_before() -> None:
    assert end_of(ConfigError("no")) is RunEnd.CONFIG_ERROR
    assert end_of(ValueError()) is RunEnd.FAILED
    assert end_of(PermissionError(errno.EACCES, "no")) is RunEnd.FAILED
    assert disk_error(PermissionError(errno.EACCES, "no")) is None
    assert DiskError.end == 85
