"""The page of a run: everything is shown, texts stay texts, and odd runs get a page as well."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.observe import report
from megatron_lite.observe.charts import MOST_POINTS, Series, chart, thinned
from megatron_lite.observe.panels import PANELS
from megatron_lite.observe.report import render, write_report
from megatron_lite.observe.run_folder import RunFolder
from megatron_lite.observe.spike_view import SpikeView, ranges
from tests.unit.observe.synthetic_run import BATCH, HOSTILE, SyntheticRun, eventful_run


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "eventful"
    eventful_run(path, HOSTILE)
    return path


def text_of(page: str) -> str:
    """What stands in the page besides plotly's own code."""
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def figures_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return list(json.loads(found[1]))


def test_the_page_shows_what_the_run_is_and_how_it_went(eventful: Path) -> None:
    text = text_of(render(RunFolder.read(eventful), "done: all steps are trained"))
    for expected in (
        "done: all steps are trained",
        "gpt_tiny: 6 layers, hidden 128, 4 heads",
        "DP2 x TP2 x PP2, ZeRO-1, fp32",
        "400 of 400",
        "torch 2.13.0",
        "9.6 MFLOP/token x ",
        "rollbacks: 1, samples left out: 64, resumes: 1",
        "7,392 to 7,455",
        "61.5 robust deviations above",
        "web, document 1731",
        '<td>web</td><td class="number">98,765</td><td>not JSON</td><td class="number">1,200</td>',
        "web.jsonl:7: ",
        "8 checkpoints, the latest of step 400",
        "without a word: killed, or its machine was lost",
    ):
        assert expected in text, expected
    assert '<tr class="largest"><td>layers.3</td>' in text


def test_texts_of_documents_stay_texts(eventful: Path) -> None:
    page = render(RunFolder.read(eventful), "<script>alert(1)</script>")
    assert "<script>document.title" not in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;/script&gt;&lt;script&gt;document.title=" in page


def test_texts_of_events_cannot_end_the_script_that_holds_the_charts(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=3)
    run.train(1, 3)
    run.events.write("spike", 2, {"kinds": ["loss"], "loss": 9.0, "text": HOSTILE})
    run.close()
    page = render(RunFolder.read(tmp_path), "running")
    assert HOSTILE not in page
    texts = [text for figure in figures_of(page) for trace in figure["data"] for text in trace.get("text", [])]
    assert texts
    assert not any("<" in text for text in texts)


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    eventful_run(tmp_path)
    text = text_of(render(RunFolder.read(tmp_path), "done"))
    assert not re.findall(r"""(?:src|href)=(?!["']?data:)""", text)
    assert "@import" not in text
    assert "url(" not in text


def test_all_panels_have_points_and_none_has_too_many(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=5000)
    run.begin()
    run.train(1, 3000, spikes={1234: 50.0})
    run.spike(1234)
    run.spike(3000, action="rollback")
    run.roll_back(3000, 2990)
    run.train(2991, 5000)
    run.finish()
    folder = RunFolder.read(tmp_path)
    for panel in PANELS:
        figure = chart(folder, panel)
        assert figure is not None, panel.title
        for trace in figure.data:
            assert 0 < len(trace.y) <= MOST_POINTS, panel.title
    loss = next(trace for trace in chart(folder, PANELS[0]).data if trace.name == "loss")
    assert max(loss.y) > 50


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    values: list[float | None] = [math.sin(step / 700) for step in range(100_000)]
    values[777], values[50_001], values[99_000] = 30.0, -30.0, None
    thin = thinned(Series("x", list(range(100_000)), values))
    assert len(thin.steps) <= MOST_POINTS
    assert (thin.steps[0], thin.steps[-1]) == (0, 99_999)
    assert {777, 50_001, 99_000} <= set(thin.steps)
    assert thin.steps == sorted(set(thin.steps))
    assert thinned(thin) is thin


def test_what_a_rollback_took_back_is_no_part_of_the_curve(eventful: Path) -> None:
    figure = chart(RunFolder.read(eventful), PANELS[0])
    traces = {trace.name: trace for trace in figure.data}
    assert max(traces["loss"].y[200:]) < 4
    assert traces["rolled back"].x == tuple(range(201, 234))
    assert max(traces["rolled back"].y) > 7
    assert list(traces["spike"].x) == [90, 233]
    assert [(shape.name, shape.x0) for shape in figure.layout.shapes] == [("rollback", 200), ("resume", 100)]


def test_a_branch_that_two_rollbacks_took_back_is_one_curve_and_windows_overlap(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=60)
    run.begin()
    run.train(1, 50)
    run.roll_back(50, 40)
    run.train(41, 49)
    run.roll_back(49, 30)
    run.train(31, 60)
    run.close()
    folder = RunFolder.read(tmp_path)
    steps = [steps for steps, _ in folder.taken_back.branches("loss").values()]
    assert steps == [list(range(31, 51)), list(range(41, 50))]
    assert folder.num_skipped() == 3 * BATCH  # steps 49 and 50, then 48 and 49


def test_evaluations_of_a_left_branch_do_not_stand(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=100)
    run.begin()
    for step, loss in ((10, 5.0), (20, 1.0)):
        run.events.write("evaluation", step, {"validation_loss": loss})
    run.roll_back(22, 15)
    folder = RunFolder.read(tmp_path)
    assert [entry["step"] for entry in folder.standing("evaluation")] == [10]
    run.events.write("evaluation", 20, {"validation_loss": 4.0})
    run.events.write("evaluation", 20, {"validation_loss": 4.0})  # reported again after a resume
    folder = RunFolder.read(tmp_path)
    assert [entry["validation_loss"] for entry in folder.standing("evaluation")] == [5.0, 4.0]


@pytest.mark.parametrize(("steps", "notice"), [(0, "No step has been logged yet"), (1, "One step has been logged")])
def test_a_run_that_has_hardly_begun(tmp_path: Path, steps: int, notice: str) -> None:
    run = SyntheticRun(tmp_path, steps=300)
    run.begin()
    run.train(1, steps)
    page = render(RunFolder.read(tmp_path), "running")
    assert notice in page
    assert f"{steps} of 300" in page
    assert "running" in page


def test_a_folder_without_a_single_event(tmp_path: Path) -> None:
    page = write_report(tmp_path, "not running").read_text()
    assert "None has begun to train." in page
    assert not [path for path in tmp_path.iterdir() if path.name != "report.html"]


def test_a_run_that_diverged(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=9)
    run.begin()
    run.train(1, 4)
    for step in range(5, 9):
        run.metrics.write(step, run.figures(step, 0.0) | {"loss": math.nan, "grad_norm": math.inf})
    run.events.write(
        "spike", 5, {"kinds": ["not_finite"], "loss": math.nan, "usual_loss": 5.0, "spike_report": "spikes/x"}
    )
    page = render(RunFolder.read(tmp_path), "DIVERGED")
    assert "<b>nan</b>" in page
    assert "not finite" in page
    assert "Its spike report is missing or cannot be read" in page
    loss = figures_of(page)[0]["data"][0]
    assert loss["y"][4:] == [None] * 4


def test_the_reason_of_a_jobs_end_is_shown(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=9)
    for kind, time, step in (("start", "2026-01-01T00:00:00+00:00", 0), ("resume", "2026-01-01T02:00:00+00:00", 4)):
        run.events.write(kind, step, {"time": time})
    run.events.write("stop", 6, {"reason": "SIGTERM", "time": "2026-01-01T03:00:00+00:00"})
    end = {"event": "end", "job": 7, "reason": "node n3 was lost", "time": 1767229200.0}  # 01:00
    (tmp_path / "attempts.jsonl").write_text(json.dumps(end) + "\n")
    ends = [attempt.end for attempt in RunFolder.read(tmp_path).attempts()]
    assert ends == ["node n3 was lost", "stopped by SIGTERM after step 6"]


def test_layers_without_a_number_have_jumped_most() -> None:
    norms = {"4": {"a": 1.0, "b": 2.0}, "5": {"a": 50.0, "b": math.nan}, "6": {"a": 1.0, "b": 2.0}}
    spike_report = SpikeView.of({"step": 5}, {"layer_grad_norm": norms})
    assert [row.jump for row in spike_report.layers] == [50.0, math.inf]
    assert spike_report.largest is not None
    assert spike_report.largest.layer == "b"


def test_many_ranges_of_samples_are_counted() -> None:
    assert ranges([[0, 32]]) == "0 to 31"
    assert ranges([[10 * n, 10 * n + 1] for n in range(5)]) == "0, 10, 20, 30 and 1 more range"
    assert ranges([[10 * n, 10 * n + 1] for n in range(7)]) == "0, 10, 20, 30 and 3 more ranges"


def test_only_the_latest_of_very_many_spikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_SPIKE_REPORTS", 3)
    run = SyntheticRun(tmp_path, steps=9)
    for step in range(1, 8):
        run.spike(step)
    page = render(RunFolder.read(tmp_path), "running")
    assert page.count("<details class=") == 3
    assert "4 earlier ones are in events.jsonl" in page
