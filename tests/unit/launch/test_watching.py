"""`python -m launch report` and `compare`."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.comparing import Effect, effect_of
from megatron_lite.config.facts import facts
from megatron_lite.config.keys import leaf_keys
from megatron_lite.config.setting import Forbidden, Resets
from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import leave_marker
from tests.unit.launch.holding import held
from tests.unit.observe.synthetic_run import SyntheticRun, eventful_run
from tests.unit.remedies import obeys


def trained(path: Path, *words: str, steps: int = 60, rise_at: int = 0, data: str = "") -> Path:
    run = SyntheticRun(path, steps=steps, words=words)
    run.begin()
    if data:
        run.events.write("resume", 0, {"data_fingerprint": data})
    run.train(1, steps, spikes={rise_at: 0.5})
    run.finish()
    return path


def outputs(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> list[str]:
    assert main(list(argv)) == code
    captured = capsys.readouterr()
    assert (captured.err if code < 2 else captured.out) == ""
    return (captured.out + captured.err).splitlines()


def test_report_of_ended_killed_and_running_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eventful_run(tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    assert outputs(capsys, "report", str(tmp_path / "run")) == [str(page)]
    assert "not running; no attempt has left word of its end" in page.read_text()
    leave_marker(tmp_path / "run", RunEnd.DIVERGED, "diverged: loss nan", 7)
    outputs(capsys, "report", str(tmp_path / "run"))
    assert "DIVERGED at step 7: diverged (diverged: loss nan)" in page.read_text()
    with held(tmp_path / "run"):
        outputs(capsys, "report", str(tmp_path / "run"), "--out", str(tmp_path / "other.html"))
    assert '<span class="state">running</span>' in (tmp_path / "other.html").read_text()


def test_report_imports_no_torch(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    program = "import sys; from launch.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "report", str(tmp_path / "run")]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "False"


@obeys("megatron_lite/observe/charts.py:from_plotly")
@pytest.mark.parametrize("module", ["graph_objects", "offline", "subplots", "colors"])
def test_broken_plotly_is_one_line(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(eventful_run(tmp_path / "run").path)
    installed = importlib.import_module(f"plotly.{module}")
    monkeypatch.setitem(sys.modules, f"plotly.{module}", None)
    command = ["compare", run, run, "--html", str(tmp_path / "page.html")] if module == "subplots" else ["report", run]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: plotly cannot draw: ")
    assert said.endswith("; run `pip install plotly`\n")
    assert said.count("\n") == 1
    monkeypatch.setitem(sys.modules, f"plotly.{module}", installed)
    assert main(command) in (0, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "none"], "error: none is not a folder; give the run folder that the launcher has named"),
        (["report"], "error: the following arguments are required: RUN_FOLDER; see `python -m launch report --help`"),
        (["report", "none", "--open"], "error: unrecognized arguments: --open; see `python -m launch report --help`"),
        (["compare", "run", "none"], "error: none is not a folder; give the run folder that the launcher has named"),
        (["compare", "run", "run", "--tolerance", "-1"], "error: argument --tolerance: '-1' must be a number >= 0; "
         "see `python -m launch compare --help`"),
        (["report", "run", "--out", "none/page.html"], "error: none/page.html cannot be written (No such file or "
         "directory); name a file in a folder that you may write to"),
        (["compare", "run", "run", "--html", "none/page.html"], "error: none/page.html cannot be written (No such file "
         "or directory); name a file in a folder that you may write to"),
        (["compare", "run", "fresh"], "error: run has logged 5 steps and fresh 0, and none is in both; compare runs "
         "that have trained the same steps"),
    ],
)  # fmt: skip
def test_wrong_words_have_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(Path("run"), steps=5)
    SyntheticRun(Path("fresh"), steps=5).close()
    assert main(argv) == 2
    assert capsys.readouterr().err.splitlines() == [message]


@obeys("launch/arguments.py:error", "launch/watching.py:_unwritable")
def test_a_wrong_argument_and_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained(tmp_path / "run", steps=5))
    (error,) = outputs(capsys, "report", code=2)
    command = error.partition("see `python -m launch ")[2].rstrip("`").split()
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0
    assert re.search(r"--out FILE\]\s+RUN_FOLDER", capsys.readouterr().out)
    for command in (["report", run, "--out"], ["compare", run, run, "--html"]):
        assert main([*command, str(tmp_path / "none" / "page.html")]) == 2
        assert capsys.readouterr().err.endswith("; name a file in a folder that you may write to\n")
        outputs(capsys, *command, str(tmp_path / "page.html"))


def test_two_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b", "tracking=wandb")
    lines = outputs(capsys, "compare", str(first), str(second))
    assert lines[-1] == "the same loss bit for bit over 60 common steps"
    assert "settings          that cannot change the curve" in lines
    assert not any("that can change" in line for line in lines)


def test_where_two_runs_part_and_what_can_explain_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(tmp_path / "a")
    second = trained(
        tmp_path / "b", "parallel=dp4_tp2_pp1", "optimizer.weight_decay=0.2", "launcher.environment.TOKEN=secret",
        rise_at=31, data="other",
    )  # fmt: skip
    lines = outputs(capsys, "compare", str(first), str(second), "--html", str(tmp_path / "page.html"), code=1)
    assert lines[-1].startswith("part at step 31 (samples 960-991): loss ")
    assert lines[-1].endswith("bit for bit the same before step 31")
    text = "\n".join(lines)
    assert "data              differs: c4ca4238a0b9 and other" in text
    learning, rounding = text.index("what is learnt"), text.index("the rounding")
    assert learning < text.index("optimizer.weight_decay: 0.1 and 0.2") < rounding
    assert rounding < text.index("parallel.pipeline_parallel_size: 2 and 1") < text.index("cannot change the curve")
    assert "secret" not in text
    assert "relative difference" in (tmp_path / "page.html").read_text()
    lines = outputs(capsys, "compare", str(first), str(second), "--tolerance", "0.2")
    assert lines[-1] == "the same loss within 0.2 over 60 common steps, though not bit for bit from step 31 on"


def test_samples_are_global_numbers_behind_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trained(tmp_path / "a", rise_at=50)
    run = SyntheticRun(tmp_path / "b", steps=60)
    run.begin()
    run.train(1, 20)
    run.roll_back(20, 15)
    run.train(16, 60)
    run.finish()
    (line,) = [
        line for line in outputs(capsys, "compare", str(first), str(tmp_path / "b"), code=1) if "left out" in line
    ]
    assert line == "left out          differs: no samples and samples 576-639"
    last = outputs(capsys, "compare", str(first), str(tmp_path / "b"), "--tolerance", "0.05", code=1)[-1]
    assert last.startswith("part at step 50 (samples 1568-1599 in the first, samples 1632-1663 in the second)")


def test_every_setting_that_a_resume_takes_seriously_can_explain_a_difference() -> None:
    serious = [key for key, found in facts().items() if isinstance(found.resume, Resets | Forbidden)]
    assert serious
    assert not [key for key in serious if effect_of(key) is Effect.nothing]
    inert = {key.partition(".")[0] for key in leaf_keys() if effect_of(key) is Effect.nothing}
    assert inert == {"debug", "model", "data", "train", "stability", "tracking", "launcher"}


def logged(path: Path, losses: dict[int, float], **more: float) -> str:
    run = SyntheticRun(path, steps=60)
    run.begin()
    for step, loss in losses.items():
        run.metrics.write(step, {"loss": loss, "samples": 8 * step, "global_batch_size": 8, **more})
    run.close()
    return str(path)


EVEN = dict.fromkeys(range(1, 11), 3.0)


@pytest.mark.parametrize(
    ("second", "code", "last"),
    [
        (EVEN | {1: 4.0}, 1, "part at step 1 (samples 0-7): loss 3 and 4; no earlier step is in both"),
        (EVEN | {2: 4.0}, 1, "part at step 2 (samples 8-15): loss 3 and 4; bit for bit the same before step 2"),
        (dict.fromkeys((10, 20), 4.0), 1, "part at step 10 (samples 72-79): loss 3 and 4; no earlier step is in both"),
        ({5: 3.0, 10: 4.0}, 1, "part at step 10 (samples 72-79): loss 3 and 4; bit for bit the same in the 1 common "
         "step before step 10"),
        (EVEN | {1: 3.0000001, 4: 5.0}, 1, "part at step 4 (samples 24-31): loss 3 and 5; not bit for bit the same "
         "from step 1 on, the first in both"),
        (EVEN | {3: math.nan}, 1, "part at step 3 (samples 16-23): loss 3 and nan; bit for bit the same before step 3"),
        (EVEN, 0, "the same loss bit for bit over 10 common steps"),
        ({1: 3.0}, 0, "the same loss bit for bit over 1 common step; the first has logged 9 steps more"),
        (EVEN | {11: 3.0}, 0, "the same loss bit for bit over 10 common steps; the second has logged 1 step more"),
        (EVEN | {2: 3.0000001}, 0, "the same loss within 1e-06 over 10 common steps, though not bit for bit from step "
         "2 on"),
        ({20: 3.0}, 2, "error: a has logged 10 steps and b 1, and none is in both; compare runs that have trained the "
         "same steps"),
    ],
)  # fmt: skip
def test_the_verdict_is_true_at_every_border(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second: dict[int, float],
    code: int, last: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    logged(Path("a"), EVEN)
    logged(Path("b"), second)
    assert main(["compare", "a", "b"]) == code
    captured = capsys.readouterr()
    assert (captured.out + captured.err).splitlines()[-1] == last


def test_nan_in_both_is_no_difference_and_lost_lines_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        logged(Path(name), EVEN | {4: math.nan})
    text = Path("b/metrics.jsonl").read_text().splitlines()
    text[6] = "\0" * len(text[6])
    Path("b/metrics.jsonl").write_text("\n".join(text) + "\n")
    lines = outputs(capsys, "compare", "a", "b")
    assert "lines missing     the second has lost step 7 of metrics.jsonl, which is not part of this" in lines
    assert lines[-1] == "the same loss bit for bit over 9 common steps; the first has logged 1 step more"


def test_runs_without_a_loss_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    logged(Path("a"), {1: 3.0})
    run = SyntheticRun(Path("b"), steps=3)
    run.metrics.write(1, {"grad_norm": 1.0})
    run.close()
    assert main(["compare", "a", "b"]) == 2
    assert "a has logged 1 step and b 1, and no step has a loss in both" in capsys.readouterr().err
