"""report.html in a real browser, opened from disk: charts are drawn, no errors are logged, texts are escaped."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from megatron_lite.observe.comparison import Comparison, write_chart
from megatron_lite.observe.panels import PANELS
from megatron_lite.observe.report import write_report
from megatron_lite.observe.run_folder import RunFolder
from tests.browser import Opened, find_browser, open_page
from tests.integration.runs import TINY, run_warm
from tests.unit.observe.synthetic_run import HOSTILE, SyntheticRun, eventful_run


@pytest.fixture(scope="module")
def browser() -> str:
    return find_browser()


def points_of(page: Opened) -> list[int]:
    """The points of each chart that has been drawn."""
    found = re.search(r'data-points="([\d ]*)"', page.dom)
    assert found is not None, f"the charts were not drawn: {page.console}"
    return [int(word) for word in found[1].split()]


def test_every_chart_is_drawn_and_nothing_complains(browser: str, tmp_path: Path) -> None:
    eventful_run(tmp_path, HOSTILE)
    page = open_page(browser, write_report(tmp_path, "running"))
    assert page.console == []
    points = points_of(page)
    assert len(points) == len(PANELS)
    assert min(points) > 0
    assert points[0] >= 400
    assert page.dom.count('class="main-svg"') >= len(PANELS)


def test_hostile_texts_stay_texts(browser: str, tmp_path: Path) -> None:
    run = eventful_run(tmp_path / "run", HOSTILE)
    run.events = type(run.events)(run.path / "events.jsonl")
    run.events.write("spike", 300, {"kinds": [HOSTILE], "action": HOSTILE, "loss": 9.0, "text": HOSTILE})
    run.events.write("stop", 400, {"reason": HOSTILE})
    page = open_page(browser, write_report(run.path, HOSTILE))
    assert page.console == []
    assert "<title>run</title>" in page.dom, "a text of the run was run as a script"
    assert page.dom.count(html.escape(HOSTILE, quote=False).split("document.title")[0]) >= 4
    assert "<img" not in page.dom


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun(browser: str, tmp_path: Path, steps: int) -> None:
    run = SyntheticRun(tmp_path, steps=9)
    if steps:
        run.metrics.write(1, run.figures(1, 0.0))
    run.close()
    page = open_page(browser, write_report(tmp_path, "running"))
    assert page.console == []
    assert "so far" in page.dom or "yet" in page.dom
    if steps:
        assert min(points_of(page)) > 0


def test_two_curves_on_a_page(browser: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        eventful_run(tmp_path / name)
    text = (tmp_path / "b" / "metrics.jsonl").read_text()
    (tmp_path / "b" / "metrics.jsonl").write_text(text.replace('"step": 31, "loss": ', '"step": 31, "loss": 9', 1))
    compared = Comparison.of(RunFolder.read(tmp_path / "a"), RunFolder.read(tmp_path / "b"), 1e-6)
    assert compared.partings["loss"].first_beyond == 31
    write_chart(tmp_path / "page.html", ("a", "<b>b"), compared)
    page = open_page(browser, tmp_path / "page.html")
    assert page.console == []
    assert "relative difference" in page.dom
    assert 'class="main-svg"' in page.dom


@pytest.mark.slow
def test_a_real_run_ends_with_its_report(browser: str, corpus: list[str], tmp_path: Path) -> None:
    words = [word for word in TINY if word != "tracking.plot=false"]
    finished = run_warm([*words, *corpus, f"train.run_dir={tmp_path / 'run'}"]).require_success()
    report = tmp_path / "run" / "report.html"
    assert re.search(rf"^report +{re.escape(str(report))}$", finished.out, re.MULTILINE)
    page = open_page(browser, report)
    assert page.console == []
    assert "12 of 12" in page.dom
    assert min(points_of(page)) > 0
