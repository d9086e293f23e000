"""What a run leaves to look at."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from megatron_lite.observe.metrics_writer import EventWriter, MetricsWriter
from megatron_lite.observe.plot import plot_run, smoothed
from megatron_lite.observe.summary import RunSummary, show_summary, summary_panel, summary_rows
from tests.plain_console import plain_console

SUMMARY = RunSummary(
    title="run",
    steps=300,
    first_loss=9.01,
    last_loss=4.2,
    validation_loss=4.5,
    validation_token_loss=4.5,
    validation_accuracy=0.25,
    unigram_entropy_nats=6.25,
    unigram_accuracy=0.0625,
    tokens=1_228_800,
    seconds=183.0,
    tokens_per_second=6714.8,
    data_wait=0.0075,
    model_flops_utilization=0.183,
    prompt="def ",
    sample="f(x):\n    return x\x1b[31m",
    plot=Path("runs/a/loss.png"),
    metrics=Path("/elsewhere/metrics.jsonl"),
    command="python -m launch pretrain_gpt train.steps=400",
)


def test_every_known_fact_is_shown() -> None:
    assert summary_rows(SUMMARY) == [
        ("steps", "300"),
        ("training loss", "9.010 at the first step, 4.200 at the last"),
        ("validation loss", "4.500, perplexity 90.0"),
        ("unigram entropy", "6.250, perplexity 518.0: the model is 1.750 nats below it"),
        ("accuracy", "25.0% of held-out tokens (6.2% by frequency alone)"),
        ("speed", "6,715 tokens/s, MFU 18.3 %, data wait 0.75 %, 1,228,800 tokens, 0:03:03"),
        ("loss curve", "runs/a/loss.png"),
        ("metrics", "/elsewhere/metrics.jsonl"),
        ("run it again", "python -m launch pretrain_gpt train.steps=400"),
    ]


def test_classes_of_samples_have_lines_of_their_own() -> None:
    summary = RunSummary("run", 5, validation_loss=4.5, validation_token_loss=4.0, validation_accuracy=0.25,
                         sequence_accuracy=0.75, unigram_entropy_nats=6.0)  # fmt: skip
    rows = dict(summary_rows(summary))
    assert rows["validation loss"] == "4.500, 4.000 of tokens alone, perplexity 54.6"
    assert rows["accuracy"] == "25.0% of held-out tokens; 75.0% of next-sentence pairs"
    assert rows["unigram entropy"].endswith("the model is 2.000 nats below it")


def test_unknown_facts_are_left_out() -> None:
    assert summary_rows(RunSummary("run", 5)) == [("steps", "5")]


def test_a_diverged_run_still_gets_its_summary() -> None:
    rows = dict(
        summary_rows(
            RunSummary(
                "run", 5, last_loss=math.nan, validation_loss=1e4, validation_token_loss=1e4, unigram_entropy_nats=6.0
            )
        )
    )
    assert rows["training loss"] == "nan"
    assert rows["validation loss"] == "10000.000, perplexity inf"
    assert rows["unigram entropy"].endswith("nats above it")


def test_plain_text_without_a_terminal() -> None:
    stream = io.StringIO()
    show_summary(plain_console(stream), SUMMARY)
    text = stream.getvalue()
    assert "== run ==" in text
    assert "  | def f(x):\n  |     return x\ufffd[31m" in text
    assert "\x1b" not in text


def test_the_panel_folds_long_paths_and_loses_nothing() -> None:
    stream = io.StringIO()
    path = Path("/" + "very-long-folder-name/" * 8 + "loss.png")
    RichConsole(file=stream, width=60).print(summary_panel(RunSummary("run", 5, plot=path)))
    shown = "".join(line.strip("│╭╮╰╯─ \n") for line in stream.getvalue().splitlines())
    assert str(path) in shown.replace(" ", "")


def test_no_plot_without_steps(tmp_path: Path) -> None:
    assert plot_run(tmp_path, title="run") is None


@pytest.mark.parametrize("num_steps", [1, 3, 60])
def test_the_plot_is_a_picture_even_of_odd_runs(tmp_path: Path, num_steps: int) -> None:
    metrics, events = MetricsWriter(tmp_path / "metrics.jsonl"), EventWriter(tmp_path / "events.jsonl")
    for step in range(1, num_steps + 1):
        loss = math.nan if step == 2 else 5.0 / step
        metrics.write(step, {"loss": loss, "learning_rate": 1e-3, "grad_norm": math.inf if step == 1 else 1.0})
    events.write("evaluation", num_steps, {"validation_loss": 4.0})
    path = plot_run(tmp_path, title="run", unigram_loss=6.0)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "events.jsonl", "loss.png"}


def test_smoothing_does_not_lag_behind_a_falling_loss() -> None:
    values = [10.0 - 0.01 * step for step in range(1000)]
    assert smoothed(values)[200:800] == pytest.approx(values[200:800], abs=1e-3)
    assert smoothed([1.0, math.nan, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
