"""The progress line: its words, its intervals, its bar on a terminal."""

import io
import os
import pty
import select
import sys
import time

import pytest

from megatron_lite.observe.console import Console
from megatron_lite.observe.progress import (
    Progress,
    StepFigures,
    duration,
    figure_text,
    step_line,
    validation_line,
)
from tests.plain_console import plain_console

FIGURES = StepFigures(loss=8.1234, grad_norm=1.2, tokens_per_second=12345.4, model_flops_utilization=0.1234)


def test_the_plain_line() -> None:
    expected = "step 10/300 | loss 8.123 | grad norm 1.20 | 12,345 tokens/s | MFU 12.3 % | ETA 0:04:10"
    assert step_line(10, 300, FIGURES, 250.2) == expected


def test_unknown_figures_are_left_out() -> None:
    assert step_line(1, 2, StepFigures(loss=float("nan")), None) == "step 1/2 | loss nan"


def test_the_compact_form_fits_eighty_columns() -> None:
    assert len("step 9999/10000 " + figure_text(FIGURES, 36000, compact=True)) <= 80


def test_validation_line() -> None:
    line = validation_line(100, 5.1234, 167.9, 0.1234)
    assert line == "validation at step 100 | loss 5.123 | perplexity 167.9 | accuracy 12.3 %"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (250.2, "0:04:10"), (3600, "1:00:00"), (180061, "2 days, 2:01:01"), (-3, "0:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def lines(log_interval: int, first_step: int = 0, enabled: bool = True) -> list[str]:
    stream = io.StringIO()
    with Progress(
        plain_console(stream), 7, first_step=first_step, log_interval=log_interval, enabled=enabled
    ) as progress:
        for step in range(first_step + 1, 8):
            progress.update(step, FIGURES)
    return stream.getvalue().splitlines()


def test_a_line_each_interval_and_at_the_end() -> None:
    assert [line.split(" |")[0] for line in lines(3)] == ["step 3/7", "step 6/7", "step 7/7"]
    assert [line.split(" |")[0] for line in lines(3, first_step=5)] == ["step 6/7", "step 7/7"]


def test_disabled_is_silent() -> None:
    assert lines(1, enabled=False) == []


def test_silent_on_ranks_without_a_console() -> None:
    with Progress(Console(None, io.StringIO()), 3) as progress:
        progress.update(1, FIGURES)
        progress.line("nothing")


@pytest.mark.parametrize(
    ("steps", "seconds_left"),
    [
        ([(1, 100.0), (2, 2.0), (3, 2.0), (4, 2.0)], [100 * 49, 2 * 48, 2 * 47, 2 * 46]),
        ([(1, 100.0), (2, 2.0), (3, 2.0), (2, 60.0), (3, 4.0)], [100 * 49, 2 * 48, 2 * 47, 2 * 48, 4 * 47]),
    ],
    ids=["first_step_is_slow", "gone_back"],
)
def test_eta_is_the_mean_of_the_last_steps(
    steps: list[tuple[int, float]], seconds_left: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the first step, which warms up, nor the way back counts once there are others."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(plain_console(stream), 50)
    for step, seconds in steps:
        now += seconds
        progress.update(step, FIGURES)
    etas = [line.rsplit("ETA ", 1)[1] for line in stream.getvalue().splitlines()]
    assert etas == list(map(duration, seconds_left))


def test_the_bar_leaves_the_terminal_usable_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pseudo terminal: the cursor is shown again, and the error starts on a line of its own."""
    monkeypatch.setenv("TERM", "xterm")
    read_end, write_end = pty.openpty()
    with os.fdopen(write_end, "w") as terminal:
        console = Console(terminal, sys.stderr)
        assert console.is_terminal
        with pytest.raises(ValueError, match="boom"):
            _fail_under_a_bar(console)
        console.print("the error")
        terminal.flush()
        screen = _read_all(read_end)
    os.close(read_end)
    assert "step 2/5" in screen
    assert "validation line" in screen
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")
    assert "\nthe error" in screen[screen.rindex("step 2/5") :].replace("\x1b[?25h", "")


def _fail_under_a_bar(console: Console) -> None:
    with Progress(console, 5) as progress:
        progress.update(2, FIGURES)
        progress.line("validation line")
        raise ValueError("boom")


def _read_all(descriptor: int) -> str:
    data = b""
    while select.select([descriptor], [], [], 0.2)[0]:
        data += os.read(descriptor, 1 << 16)
    return data.decode()
