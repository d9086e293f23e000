"""Runs that end before their last step: each kind of end has its marker and exit code; resumable ones are resumed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import read_marker
from megatron_lite.observe.metrics import read_metrics
from megatron_lite.observe.wandb_record import history
from megatron_lite.observe.wandb_tracker import run_id
from tests.integration.runs import Finished, launch, losses, run_warm, start, wait_for_step

STEPS = ("train.steps=60", "train.save_interval=0", "train.eval_interval=10", "model.hidden_dropout=0.1")
USED_UP = ["data.max_epochs=1", "data.validation_fraction=0.9", "train.steps=1000", "train.global_batch_size=64"]
DIVERGING = (  # each step multiplies matrices by 1 - learning rate x weight decay, so the seventh overflows fp32
    "optimizer.learning_rate=1000", "optimizer.weight_decay=1000", "optimizer.decay=constant",
    "optimizer.warmup_steps=0",
)  # fmt: skip
WANDB = ("tracking.wandb=offline",)


def _ask_after(step: int, command: list[str], run_dir: Path, number: int) -> Finished:
    process = start(command)
    wait_for_step(process, run_dir, step)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    return Finished(process.returncode, out, err)


def _end(run_dir: Path) -> tuple[RunEnd, int | None]:
    marker = read_marker(run_dir)
    assert marker is not None
    return marker.end, marker.step


def _evaluations(run_dir: Path) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for event in read_metrics(run_dir / "events.jsonl"):
        if event["event"] == "evaluation":
            found.setdefault(event["step"], []).append(event["validation_loss"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "number"),
    [
        (["parallel=dp2_tp1_pp2"], signal.SIGTERM),
        (["parallel=dp2_tp1_pp1", "parallel.zero_stage=2"], signal.SIGUSR1),
    ],
)
def test_run_that_is_asked_to_stop_goes_on_bit_identically(
    layout: list[str], number: int, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_warm(tiny("whole", *layout, *STEPS)).require_success()
    words = [*layout, *STEPS, *WANDB]
    stopped = _ask_after(12, launch(*tiny("parts", *words)), tmp_path / "parts", number)
    assert stopped.code == RunEnd.PREEMPTED, stopped.err
    end, step = _end(tmp_path / "parts")
    assert end is RunEnd.PREEMPTED
    assert step is not None
    assert 12 <= step < 60
    assert f"stopped by {signal.Signals(number).name} after step {step}" in stopped.out
    assert stopped.err == ""
    again = run_warm(tiny("parts", *words)).require_success()
    assert f"resuming after step {step}" in again.out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert _evaluations(tmp_path / "parts") == _evaluations(tmp_path / "whole")
    assert _end(tmp_path / "parts") == (RunEnd.DONE, 60)
    rows = list(history(tmp_path / "parts", run_id(tmp_path / "parts")))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 61))


@pytest.mark.slow
def test_evaluation_that_was_broken_off_is_made_after_the_resume(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A long evaluation at the last step: the stop arrives in the middle of it, after all steps are trained."""
    words = ["train.steps=3", "train.save_interval=1", "train.eval_batches=4000", "train.eval_interval=0"]
    command = launch(*tiny("run", *words))
    stopped = _ask_after(3, command, tmp_path / "run", signal.SIGTERM)
    assert stopped.code == RunEnd.PREEMPTED, stopped.err
    assert _end(tmp_path / "run") == (RunEnd.PREEMPTED, 3)
    assert _evaluations(tmp_path / "run") == {}
    run_warm(tiny("run", *words[:2], "train.eval_batches=1", "train.eval_interval=0")).require_success()
    assert list(_evaluations(tmp_path / "run")) == [3]
    assert _end(tmp_path / "run") == (RunEnd.DONE, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "end", "message"),
    [
        (
            [*DIVERGING, "parallel=dp1_tp1_pp2"],
            RunEnd.DIVERGED,
            r"diverged: loss nan",
        ),
        (
            ["model.ffn_hidden_size=2000000000", "parallel=dp1_tp1_pp2", "model.vocab_size=512"],
            RunEnd.OUT_OF_MEMORY,
            "planned for it: stage ",
        ),
    ],
)
def test_each_end_has_its_code_its_marker_and_one_line(
    words: list[str], end: RunEnd, message: str, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    finished = run_warm(tiny("run", *words))
    assert finished.code == end, finished.err
    assert message in finished.err
    assert len(finished.err.splitlines()) == 1
    marker = read_marker(tmp_path / "run")
    assert marker is not None
    assert marker.end is end
    assert message in marker.message


@pytest.mark.slow
def test_non_finite_weights_are_never_saved(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    words = [*DIVERGING, "train.save_interval=1", "train.keep_last=0"]
    run_warm(tiny("run", *words))
    sound = {entry["step"] for entry in _metrics(tmp_path / "run") if _is_number(entry["loss"])}
    saved = {int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").glob("step_*")}
    assert saved
    assert saved <= sound


@pytest.mark.slow
def test_data_that_is_used_up_is_trained_and_saved(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    first = run_warm(tiny("run", *USED_UP))
    assert first.code == RunEnd.OUT_OF_DATA, first.err
    assert len(first.err.splitlines()) == 1
    assert _end(tmp_path / "run")[0] is RunEnd.OUT_OF_DATA
    last = max(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:08d}").is_dir()
    assert list(_evaluations(tmp_path / "run"))[-1] == last
    assert _metrics(tmp_path / "run")[-1]["samples"] == 64 * last
    again = run_warm(tiny("run", *USED_UP))
    assert (again.code, again.err) == (RunEnd.OUT_OF_DATA, first.err)
    assert f"or set train.steps={last}" in first.err
    run_warm(tiny("run", *USED_UP, f"train.steps={last}")).require_success()


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")


def _is_number(loss: Any) -> bool:
    return isinstance(loss, int | float) and loss == loss and abs(loss) != float("inf")
