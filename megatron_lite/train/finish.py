"""What the user sees at the end of a run: the loss curve, the summary, and how to continue."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.frozen import frozen_path
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import ObjectiveName
from megatron_lite.observe.console import Console
from megatron_lite.observe.metrics import METRICS_FILE
from megatron_lite.observe.plot import PLOT_FILE, plot_run
from megatron_lite.observe.report import REPORT_FILE, write_report
from megatron_lite.observe.run_folder import RunFolder
from megatron_lite.observe.summary import RunSummary, show_summary

BASELINE_EVENT = "baseline"
ALL_TRAINED = "all steps are trained"
"""The text of the marker DONE, and of the report that is written before it."""


@dataclass(frozen=True)
class RunOutcome:
    """What the summary needs besides the run folder."""

    checkpoint: Path
    started: float  # time.monotonic() of this attempt's start
    prompt: str = ""
    sample: str = ""
    done: bool = False  # nothing was left to train


def show_outcome(config: ResolvedConfig, run_dir: Path, console: Console, outcome: RunOutcome) -> None:
    """Draw the loss curve, write the report and print the summary; on the writing rank only."""
    run = RunFolder.read(run_dir)
    evaluation, baseline = run.newest("evaluation"), run.newest(BASELINE_EVENT)
    plot = report = None
    if config.tracking.plot:
        plot = _drawn(
            run_dir / PLOT_FILE,
            lambda: plot_run(run_dir, title=run_dir.name, unigram_loss=baseline.get("loss"), run=run),
            console,
        )
        report = _drawn(run_dir / REPORT_FILE, lambda: write_report(run_dir, ALL_TRAINED, run=run), console)
    first, last, steady = run.history.first, run.history.last, run.history.steady()
    seconds = float(steady["step_seconds"].sum())
    tokens = float((steady["tokens_per_second"] * steady["step_seconds"]).sum())
    show_summary(
        console,
        RunSummary(
            title=run_dir.name,
            steps=config.train.steps,
            first_loss=first.get("loss"),
            last_loss=last.get("loss"),
            validation_loss=evaluation.get("validation_loss"),
            validation_token_loss=evaluation.get("validation_token_loss"),
            validation_accuracy=evaluation.get("validation_accuracy"),
            sequence_accuracy=evaluation.get("validation_sequence_accuracy"),
            unigram_label="unigram entropy" if config.objective.name is ObjectiveName.causal_lm else "frequencies",
            unigram_entropy_nats=baseline.get("entropy_nats"),
            unigram_accuracy=baseline.get("accuracy"),
            tokens=int(last["tokens"]) if isinstance(last.get("tokens"), float) else None,
            seconds=None if outcome.done else time.monotonic() - outcome.started,
            tokens_per_second=tokens / seconds if seconds else None,
            data_wait=float(steady["data_seconds"].sum()) / seconds if seconds else None,
            model_flops_utilization=last.get("model_flops_utilization"),
            prompt=outcome.prompt,
            sample=outcome.sample,
            plot=plot,
            report=report,
            metrics=run_dir / METRICS_FILE,
            checkpoint=outcome.checkpoint,
            logs=run_dir / "logs",
            command=_command(config, run_dir),
            note=_already_done(config) if outcome.done else "",
        ),
    )


def _drawn(path: Path, draw: Callable[[], Path | None], console: Console) -> Path | None:
    """Draw a page; any failure is only reported, because a run that has trained to its end has not failed if a plot
    cannot be drawn, and the command can draw it later."""
    try:
        return draw()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        console.print(f"{path.name} could not be written ({reason}); try `python -m launch report {path.parent}`")
        return None


def _command(config: ResolvedConfig, run_dir: Path) -> str:
    """The command that resumes the run, or reports that it is done; the frozen file replaces all overrides."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "launch", "--config", str(frozen_path(config, run_dir))])


def _already_done(config: ResolvedConfig) -> str:
    return (
        f"This run is done: all {config.train.steps} steps were trained before. Repeat your settings with "
        "a larger train.steps to train on, or with another train.run_dir to start afresh."
    )
