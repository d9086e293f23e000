"""Long and damaged records: bounded memory, nothing lost in silence, the same sentences at every border."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.observe import history, lines, metrics
from megatron_lite.observe.charts import MOST_POINTS
from megatron_lite.observe.comparison import Comparison
from megatron_lite.observe.envelope import Envelope, Means
from megatron_lite.observe.history import MOST_GROUP_POINTS, History, Table
from megatron_lite.observe.lines import Gap, Line, blocks, line_type, sound_object
from megatron_lite.observe.metrics import entries, newest_entries, read_metrics
from megatron_lite.observe.metrics_writer import EventWriter, MetricsWriter
from megatron_lite.observe.report import render
from megatron_lite.observe.run_folder import RunFolder
from megatron_lite.observe.trackers import build_trackers
from tests.unit.observe.synthetic_run import SyntheticRun


def written(path: Path, steps: range, **figures: Any) -> MetricsWriter:
    writer = MetricsWriter(path)
    for step in steps:
        writer.write(step, {"loss": 5.0 / step, **figures})
    writer.close()
    return writer


def steps_in(gaps: list[Gap], logged: range) -> set[int]:
    return {step for step in logged if any(gap.first <= step <= gap.last for gap in gaps)}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 10]))
def test_a_resume_finds_and_reports_any_damage(data: st.DataObject, interval: int) -> None:
    """Any bytes of the lines up to the checkpoint, replaced by others."""
    logged = range(interval, 30 * interval + 1, interval)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        known = written(path, logged).logged(logged[-1])
        before = path.read_bytes()
        first = data.draw(st.integers(0, len(before) - 1))
        size = data.draw(st.sampled_from([1, 1, 1, 40, 4096]))
        filler = data.draw(st.binary(min_size=1, max_size=1))
        after = before[:first] + filler * len(before[first : first + size]) + before[first + size :]
        path.write_bytes(after)
        writer = MetricsWriter(path, resume_step=logged[-1], logged=known)
        writer.close()
        kept = read_metrics(path)
        assert (writer.loss is None) == (after == before)
        steps = [entry["step"] for entry in kept]
        assert steps == sorted(set(steps))
        if writer.loss is not None:
            assert steps_in(writer.loss.gaps, logged) == set(logged) - set(steps)
        again = MetricsWriter(path, resume_step=logged[-1], logged=writer.logged(logged[-1]))
        again.close()
        assert again.loss is None, "what is told once is known"


def test_damage_is_reported_and_drawn(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=40)
    run.begin()
    run.train(1, 20)
    known = run.metrics.logged(20)
    run.close()
    path = tmp_path / "metrics.jsonl"
    text = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*text[:4], text[4].replace(b"\n", b"\x8a"), *text[5:]]))
    told: list[str] = []
    trackers = build_trackers(run.config, tmp_path, True, resume_step=20, logged=known, report=told.append)
    trackers.event("resume", 20, {})
    trackers.report_missing_lines(20)
    for step in range(21, 31):
        trackers.log(step, {"loss": 1.0})
    trackers.finish({})
    (warning,) = told
    assert warning.startswith(f"warning: {path} has lost the lines of steps 5 to 6 (up to step 20")
    folder = RunFolder.read(tmp_path)
    assert [entry["ranges"] for entry in folder.of_kind("metrics_lost")] == [["5-6"]]
    assert folder.history.gaps == [Gap(5, 6)]
    steps, values = folder.history.curve("loss")
    assert values[steps.index(5)] is None
    page = render(folder, "running")
    assert "metrics.jsonl lacks lines that had been written: steps 5 to 6." in page
    assert '"name":"lines missing"' in page


def test_a_file_of_zeros_and_no_file_are_losses(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    known = written(path, range(1, 11)).logged(10)
    for damage in (lambda: path.write_bytes(b"\0" * path.stat().st_size), path.unlink):
        written(path, range(1, 11))
        damage()
        assert History.read(path, logged=known).gaps == [Gap(1, 10)]
        writer = MetricsWriter(path, resume_step=10, logged=known)
        writer.close()
        assert writer.loss is not None
        assert writer.loss.gaps == [Gap(1, 10)]


def test_intervals_rollbacks_and_older_checkpoints_are_no_losses(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(10, 101, 10):
        writer.write(step, {"loss": 1.0, "rollbacks": 0})
    writer.rewind(50, 1)
    at_50 = writer.logged(50)
    for step in range(51, 61):  # another train.log_interval
        writer.write(step, {"loss": 1.0, "rollbacks": 1})
    at_60 = writer.logged(60)
    writer.close()
    assert at_60.steps == ((10, 50, 10), (51, 60, 1))
    for known, step in ((at_60, 60), (at_50, 50)):
        again = MetricsWriter(path, step, 1, known)
        again.close()
        assert again.loss is None
        assert History.read(path, logged=at_60).gaps == []
    assert [entry["step"] for entry in entries(path)] == list(range(10, 51, 10))


def test_lost_steps_that_are_trained_again_are_no_gap(tmp_path: Path) -> None:
    events = EventWriter(tmp_path / "events.jsonl")
    events.write("metrics_lost", 20, {"ranges": ["5-6", "12-14", "nonsense"], "text": ""})
    events.close()
    written(tmp_path / "metrics.jsonl", range(7, 21))
    assert RunFolder.read(tmp_path).history.gaps == [Gap(5, 6)]


def test_damaged_events_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "start", "step": 0}\n\xff\n\0\0\n{"event": "save", "step": 1}\n{"event": "sa')
    writer = EventWriter(path)
    writer.close()
    assert writer.damaged == 2
    assert [entry["event"] for entry in read_metrics(path)] == ["start", "save"]
    path.write_bytes(b"\0" * path.stat().st_size)
    writer = EventWriter(path)
    writer.close()
    assert writer.damaged == 1, "zeros are no line that a kill tore"
    assert path.read_bytes() == b""


NO_FIGURES = ('"nan"', '"x"')
FIGURE_TEXTS = st.sampled_from(
    ["1.5", "-3", "null", "true", '"NaN"', '"-Infinity"', "1e5", str(10**30), "1" + "0" * 400, *NO_FIGURES]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FIGURE_TEXTS, FIGURE_TEXTS | st.just("{}") | st.just("[1]"), FIGURE_TEXTS), min_size=1))
def test_a_value_that_is_not_a_number_is_left_out_and_its_line_kept(rows: list[tuple[str, str, str]]) -> None:
    """By both readers alike: of whole lines, and of the wanted keys of each."""
    kind = line_type(["loss", "accuracy"], ["layers"])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text(
            "".join(
                f'{{"step": {step}, "loss": {loss}, "accuracy": {accuracy}, "layers": {{"a": 0.5, "b": {inner}}}}}\n'
                for step, (loss, accuracy, inner) in enumerate(rows, 1)
            )
        )
        whole = read_metrics(path)
        found = list(blocks(path, kind))
        lines = [line for block in found for line in block.lines]
        assert [entry["step"] for entry in whole] == [line.step for line in lines] == list(range(1, len(rows) + 1))
        texts = [text for row in rows for text in row]
        assert sum(block.dropped for block in found) == sum(text in (*NO_FIGURES, "{}", "[1]") for text in texts)
        table = Table.joined([Table.of(block, ["loss", "accuracy"]) for block in found if block.lines])
        for entry, value, there in zip(whole, table.values[:, 0], table.there[:, 0], strict=True):
            assert there == (entry.get("loss") is not None)
            assert np.array_equal(value, math.nan if not there else float(entry["loss"]), equal_nan=True)
        for line, entry in zip(lines, whole, strict=True):
            assert line.layers.keys() == entry["layers"].keys()


def test_values_that_are_left_out_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "two"}\n{"step": 3, "loss": 1.0, "lo\u00e4": 7}\n')
    path.write_bytes(path.read_bytes().replace("\u00e4".encode(), b"\xff\xff"))  # a damaged name is not a damaged line
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]
    told = f"warning: 1 value of {path} is not a number and is left out\n"
    assert capsys.readouterr().err == told
    folder = RunFolder.read(tmp_path)
    page = render(folder, "running")
    assert capsys.readouterr().err == told
    assert folder.history.curve("loss") == ([1, 3], [2.0, 1.0])
    assert "1 value of metrics.jsonl is not a number and is left out." in page


@pytest.mark.parametrize("block_bytes", [16, 64, 2**22])
def test_blocks_of_any_size_hold_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 41))
    text = path.read_text().splitlines()
    text[9], text[20], text[30] = "{}", text[20].replace('"step": 21', '"step": 99'), "\0" * 200
    path.write_text("\n".join(text) + '\n{"step": 41, "lo')
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(lines, "LONGEST_LINE_BYTES", 150)
    found = list(blocks(path, Line))
    assert [line.step for block in found for line in block.lines] == [
        step for step in range(1, 41) if step not in (10, 21, 31)
    ]
    assert [gap for block in found for gap in block.gaps] == [Gap(10, 10), Gap(21, 21), Gap(31, 31)]
    assert sum(block.damaged for block in found) == 3
    assert [entry.get("step") for entry in newest_entries(path)][:9] == list(range(40, 31, -1))


def test_the_first_and_last_line_are_whole_if_the_last_block_was_reduced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no line waits at the end of the file."""
    monkeypatch.setattr(history, "MOST_NEW", 0)
    written(tmp_path / "metrics.jsonl", range(1, 4), tokens=7)
    found = History.read(tmp_path / "metrics.jsonl")
    assert (found.first["step"], found.first["tokens"]) == (1, 7)
    assert (found.last["step"], found.last["tokens"]) == (3, 7)


def long_run(path: Path, count: int) -> None:
    layers = json.dumps({f"layers.{layer}": 0.5 for layer in range(8)})
    with path.open("w") as file:
        for step in range(1, count + 1):
            loss = 50.0 if step == 777 else '"NaN"' if step == 778 else 3.0 + step % 7
            more = f', "layer_grad_norm": {layers}' if step % 20 == 0 else ""
            file.write(
                f'{{"step": {step}, "loss": {loss}, "grad_norm": 1.5, "tokens_per_second": 1e4, "step_seconds": 0.1, '
                f'"data_seconds": 0.01{more}}}\n'
            )


def peak_bytes(do: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        do()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_run_twice_as_long_takes_no_more_memory_and_no_larger_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 2**18)  # many blocks in either
    path = tmp_path / "metrics.jsonl"
    peaks, sizes = [], []
    for count in (50_000, 100_000):
        long_run(path, count)
        peaks.append(peak_bytes(lambda: History.read(path)))
        folder = RunFolder.read(tmp_path)
        assert folder.history.count == count
        steps, values = folder.history.curve("loss")
        assert 300 < len(steps) <= MOST_POINTS
        assert 50.0 in values
        assert None in values[: values.index(50.0) + 9], "the step without a number is a gap"
        groups = folder.history.group("layer_grad_norm")
        assert sum(len(points[0]) for points in groups.values()) <= MOST_GROUP_POINTS
        sizes.append(len(render(folder, "running")))
    assert peak_bytes(lambda: MetricsWriter(path, resume_step=100_000).close()) < 8 * 2**20
    assert peaks[1] < peaks[0] + 2**20
    assert max(peaks) < 16 * 2**20
    assert sizes[1] < 1.3 * sizes[0] < 8e6


def test_no_valid_line_is_parsed_the_slow_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading for a report, for a comparison, and for a resume; a million lines would take a minute otherwise."""
    calls: list[bytes] = []

    def counted(line: bytes) -> dict[str, Any] | None:
        calls.append(line)
        return sound_object(line)

    run = SyntheticRun(tmp_path, steps=100)
    run.begin()
    run.train(1, 60)
    run.close()
    folder = RunFolder.read(tmp_path)
    monkeypatch.setattr(lines, "sound_object", counted)
    assert folder.history.count == 60
    assert Comparison.of(folder, folder, 1e-6).common_steps == 60
    monkeypatch.setattr(metrics, "sound_object", counted)
    MetricsWriter(tmp_path / "metrics.jsonl", resume_step=60, rollbacks=1).close()
    assert calls == []
    MetricsWriter(tmp_path / "metrics.jsonl", resume_step=57, rollbacks=1).close()
    beyond = {json.loads(line)["step"] for line in calls}
    assert beyond == {58, 59, 60}, "what a rollback took back is decoded whole, to be kept"


def test_what_an_envelope_keeps_does_not_depend_on_how_the_points_came() -> None:
    steps = np.arange(1, 30_001)
    values = np.sin(steps / 700)
    values[7_000], values[8_000] = 40.0, math.nan
    whole, parts = Envelope(), Envelope()
    whole.add(steps, values)
    for part in np.array_split(np.arange(len(steps)), 37):
        parts.add(steps[part], values[part])
    assert whole.points() == parts.points()
    assert {7_001, 8_001} <= set(whole.points()[0])
    means = Means(100)
    means.add(steps, np.where(np.isfinite(values), values, 0.0))
    assert len(means.points()[0]) <= 100
    assert np.mean(means.points()[1]) == pytest.approx(np.nanmean(values), abs=0.05)
